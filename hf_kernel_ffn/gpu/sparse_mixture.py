"""Sparse mixtures of output prototypes on a GPU: a sum over the few that are active."""

from __future__ import annotations

import torch
from torch import Tensor, library

from ..checkpoint_code.operators import namespace
from .optional_triton import jit, tl

BLOCK_SLOTS = 32
"""Active prototypes that a program reads at once."""
BLOCK_FEATURES = 128
"""Features that a program writes."""
WARPS = 4
"""Of a program."""
NAMESPACE = namespace(__name__)


def active(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Find the coefficients (T, P) that are not zero, without waiting for the device.

    Returns:
        indices (T, P) int64, in order, −1 past the last; how many there are, (T,).
    """
    is_active = coefficients != 0
    place = is_active.cumsum(-1)
    slots = place.where(is_active, torch.zeros_like(place))  # 0: for all that are zero
    tokens, prototypes = place.shape
    indices = torch.full((tokens, prototypes + 1), -1, dtype=torch.int64, device=place.device)
    numbers = torch.arange(prototypes, device=place.device).expand_as(place)
    return indices.scatter(1, slots, numbers)[:, 1:], place[:, -1]


@jit
def gather_kernel(
    coefficients,
    indices,
    counts,
    dictionary,
    written,
    slots,
    prototypes,
    size,
    by_feature,
    by_prototype,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """BLOCK_FEATURES features of one token's Σ c_j v_{i_j}, summed in float32."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1).to(tl.int64) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    total = tl.zeros((BLOCK_FEATURES,), tl.float32)
    count = tl.load(counts + token)
    start = 0
    while start < count:
        slot = start + tl.arange(0, BLOCK_SLOTS)
        inside = slot < count
        index = tl.load(indices + token * slots + slot, mask=inside, other=-1).to(tl.int64)
        coefficient = tl.load(coefficients + token * slots + slot, mask=inside, other=0.0).to(
            tl.float32
        )
        read = (index >= 0) & (index < prototypes) & (coefficient != 0)
        place = dictionary + index[:, None] * by_prototype + feature[None, :] * by_feature
        part = tl.load(place, mask=read[:, None] & (feature < size)[None, :], other=0.0).to(
            tl.float32
        )
        total += tl.sum(part * coefficient[:, None], 0)
        start += BLOCK_SLOTS
    tl.store(
        written + token * size + feature, total.to(written.dtype.element_ty), mask=feature < size
    )


@library.custom_op(
    f"{NAMESPACE}::gather",
    mutates_args=(),
    schema="(Tensor coefficients, Tensor indices, Tensor counts, Tensor dictionary) -> Tensor",
)
def gather(coefficients: Tensor, indices: Tensor, counts: Tensor, dictionary: Tensor) -> Tensor:
    """``Σ_{j < counts} coefficients_j · v_{indices_j}``, summed in float32; no gradients.

    Args:
        coefficients, indices: (T, slots). Slots with a coefficient 0 or an index outside of
            0 … P − 1 are skipped unread.
        counts: (T,) integers.
        dictionary: (d, P) of any strides, columns v_i: quickest where the numbers of a column lie
            side by side.

    Returns:
        (T, d) in the dtype of ``coefficients``.
    """
    size, prototypes = dictionary.shape
    written = coefficients.new_empty(len(coefficients), size)
    with torch.cuda.device_of(coefficients):
        if written.numel():
            gather_kernel[(len(coefficients), -(-size // BLOCK_FEATURES))](
                coefficients.contiguous(),
                indices.contiguous(),
                counts.contiguous(),
                dictionary,
                written,
                indices.shape[1],
                prototypes,
                size,
                dictionary.stride(0),
                dictionary.stride(1),
                BLOCK_SLOTS=BLOCK_SLOTS,
                BLOCK_FEATURES=BLOCK_FEATURES,
                num_warps=WARPS,
            )
    return written


@gather.register_fake
def _(coefficients: Tensor, indices: Tensor, counts: Tensor, dictionary: Tensor) -> Tensor:
    return coefficients.new_empty(coefficients.shape[0], dictionary.shape[0])
