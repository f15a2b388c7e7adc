"""Decoding: one token without gradients, for which few of the prototypes are read.

Most coefficients of a sparse readout are zero, so only the output prototypes of the others are
read; and where the coefficients are the kernel itself, it is computed in as few operations as
it takes, since each of them costs more than its arithmetic.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .compat import get_tensor_version
from .kernels import HalfYat, Yat
from .linears import is_plain, lay_out_by_prototypes

if TYPE_CHECKING:
    from .ffn import KernelFFN

EXACT = (torch.float32, torch.float64)
"""dtypes in which scores are computed as they stand."""
WHOLE_DICTIONARY_SHARE = 4
"""With more than one prototype in this many active, reading all of them is quicker."""


def is_one_token(hidden_states: Tensor) -> bool:
    """Whether ``hidden_states`` (..., hidden_size) is one token, and no gradients are asked for."""
    return hidden_states.numel() == hidden_states.shape[-1] and not torch.is_grad_enabled()


def has_fixed_shapes(tensor: Tensor) -> bool:
    """Whether a shape that depends on the data costs time.

    It makes the host wait for a device, and a compiler start anew.
    """
    return torch.compiler.is_compiling() or tensor.device.type != "cpu"


class RowNorms:
    """Computes ‖w‖² of the input prototypes, and can reuse it for the next token.

    What was kept is used while the weight is the same: its memory, its version counter, its shape
    and dtype, and one number of every row, since what merges an adapter into ``weight.data``
    leaves the version counter as it was.
    """

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        """(prototypes,) what was kept."""
        self.weight: Tensor | None = None
        """Whose norms they are; held so that no other weight can come to lie in its memory."""
        self.facts: tuple = ()
        self.column: Tensor | None = None

    def compute(self, weight: Tensor, keep: bool) -> Tensor:
        """(prototypes,) in the dtype of ``weight`` (prototypes, hidden_size).

        ``keep``: reuse what was kept if the weight is the same, and keep what is computed.
        """
        version = None
        if keep and not torch.compiler.is_compiling() and not weight.is_inference():
            version = get_tensor_version(weight)
        if version is None:
            return _square_norms(weight)

        facts = (weight.data_ptr(), version, weight.shape, weight.dtype)
        column = weight[:, weight.shape[1] // 2]
        if self.squares is not None and self._is_same(facts, column):
            return self.squares

        self.squares = _square_norms(weight)
        self.weight = weight.detach()
        self.facts = facts
        self.column = column.clone()
        return self.squares

    def _is_same(self, facts: tuple, column: Tensor) -> bool:
        """Whether a weight with these facts and numbers is the one whose norms were kept."""
        return self.facts == facts and self.column is not None and torch.equal(self.column, column)

    def __getstate__(self) -> dict:
        """Nothing: the version counter of a copy starts anew."""
        return dict(vars(RowNorms()))


def _square_norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=-1).square()


def score_token(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, squares: Tensor
) -> tuple[Tensor, Tensor]:
    """x·w + b and ‖x − w‖² of one token (…, hidden_size), float32 or float64 as it is.

    ``squares``: ‖w‖² (prototypes,).
    """
    x = hidden_states.flatten()
    dot = nn.functional.linear(hidden_states, weight)
    distance2 = torch.add(squares, x @ x).sub(dot, alpha=2).clamp_min(0)
    return (dot if bias is None else dot + bias), distance2


def decode_token(ffn: KernelFFN, hidden_states: Tensor) -> Tensor:
    """The output of a sparse readout at one token, by its active output prototypes alone.

    plan.py says whether ``ffn`` is one at ``hidden_states`` (1, …, 1, hidden_size).
    """
    fixed = has_fixed_shapes(hidden_states)
    if ffn.config.settings.sparse and ffn.config.settings.coefficients_are_kernel and not fixed:
        active, coefficients = _select_by_loudness(ffn, hidden_states)
    else:
        every = ffn.coefficients(hidden_states).to(hidden_states.dtype).flatten()
        if fixed:
            active = every.abs().topk(_count_kept(ffn, every), sorted=False).indices
        else:
            active = every.nonzero()[:, 0]
        coefficients = every[active]
    written = _sum_active(ffn.output_prototypes, coefficients, active)
    return written.view(hidden_states.shape)


def sum_kept(linear: nn.Linear, coefficients: Tensor) -> Tensor:
    """Σ c_i v_i + b_out (..., hidden_size) at one token, over the coefficients that are not zero.

    plan.py says whether that serves ``coefficients`` (1, …, 1, prototypes).
    """
    flat = coefficients.flatten()
    active = flat.nonzero()[:, 0]
    written = _sum_active(linear, flat.index_select(0, active), active)
    return written.view(*coefficients.shape[:-1], -1)


def _select_by_loudness(ffn: KernelFFN, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Which prototypes (n,) a sparse map keeps, and their coefficients (n,), scale · κ · u."""
    ups = ffn.compute_ups(hidden_states)
    kernel, loudness, least = _compute_kernel(ffn, hidden_states, ups)
    if least is None:
        active = loudness.topk(_count_kept(ffn, loudness), sorted=False).indices
    else:
        active = (loudness >= least).nonzero()[:, 0]

    coefficients = kernel.index_select(0, active)
    if ups is not None:
        coefficients = coefficients * ups.flatten().index_select(0, active)
    return active, coefficients.to(hidden_states.dtype)


def _compute_kernel(
    ffn: KernelFFN, hidden_states: Tensor, ups: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :meth:`KernelFFN.kernel_and_loudness`, flat; by :func:`scale_yat_kernel` if it can be."""
    rows = ffn.input_prototypes
    dtype = hidden_states.dtype
    is_yat = type(ffn.kernel) in (Yat, HalfYat)
    if not (is_yat and is_plain(rows) and rows.weight.dtype == dtype and dtype in EXACT):
        kernel, loudness, least = ffn.kernel_and_loudness(hidden_states, ups)
        return kernel.flatten(), loudness.flatten(), least

    log_scale = ffn.log_positive("scale")
    kernel = scale_yat_kernel(
        hidden_states.flatten(),
        rows.weight,
        rows.bias,
        squares=ffn.square_norms(rows.weight),
        epsilon=ffn.positive("epsilon").item(),
        scale=log_scale.exp().item(),
        one_sided=type(ffn.kernel) is HalfYat,
    )
    loudness = kernel if ups is None else kernel * ups.flatten().abs()
    return kernel, loudness, ffn.least_loudness(log_scale)


def scale_yat_kernel(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    *,
    squares: Tensor,
    epsilon: float,
    scale: float,
    one_sided: bool,
) -> Tensor:
    """scale · κ (P,) at one token ``x`` (d,), for the kernel yat, or half-yat if ``one_sided``.

    ``rows`` (P, d), ``bias`` (P,) and ``squares`` = ‖w‖² (P,) are in the dtype of ``x``.
    """
    score = torch.mv(rows, x)
    denominator = torch.add(squares, score, alpha=-2).add_(torch.dot(x, x))
    denominator.clamp_min_(0).add_(epsilon)
    score.add_(bias)
    if one_sided:
        score.relu_()
    return torch.div(score, denominator).mul_(score).mul_(scale)


def _count_kept(ffn: KernelFFN, values: Tensor) -> int:
    """How many of ``values`` (prototypes,) the simplex map top-k keeps."""
    return min(ffn.config.settings.top_k or 0, len(values))


def _sum_active(linear: nn.Linear, coefficients: Tensor, active: Tensor) -> Tensor:
    """Σ c_i v_i + b_out (hidden_size,) over the output prototypes ``active`` (n,) of ``linear``.

    ``coefficients`` (n,) are theirs.
    """
    prototypes = linear.in_features
    if WHOLE_DICTIONARY_SHARE * len(active) > prototypes:
        return linear(coefficients.new_zeros(prototypes).index_copy(0, active, coefficients))
    if not has_fixed_shapes(coefficients) and not linear.weight.T.is_contiguous():
        lay_out_by_prototypes(linear)
    return torch.addmv(linear.bias, linear.weight.T.index_select(0, active).T, coefficients)
