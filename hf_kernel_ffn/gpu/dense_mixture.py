"""Dense mixtures of output prototypes on a GPU: Triton kernels around plain matrix products.

    forward   c = κ·scale·u, or κ^(1/τ)·u and its row mass, in the epilogue of x·w;
              then y = c·Vᵀ (divided by the mass)
    backward  dc = dy·V;   c, ds, du and all sums in the epilogue of x·w, computed again;
              then dx = ds·W, dW = dsᵀ·x, dV = dyᵀ·c

The conic mixture is the function of checkpoint_code/one_pass.py, the convex one
softmax(log κ / τ): κ^(1/τ) is written relative to the power of two above its tile's largest, so
that it neither over- nor underflows, and a row's tiles are brought to one such power afterwards,
exactly. No (tokens, prototypes) matrix is held in more than the working dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from ..checkpoint_code.operators import (
    ARGUMENTS,
    TENSORS,
    MixtureArguments,
    chunks,
    differentiate,
    empty_gradients,
    namespace,
)
from .dense_backward import MixtureBackward
from .dense_kernels import forward_tuned
from .dense_operands import Operands, count_tokens, multiply_in_float32

TOKENS = 128
"""Most tokens of a tile of scores; half as many where a longer epilogue needs the registers."""
PROTOTYPES = 128
"""Prototypes of a tile. Every tile has as many: row masses are kept per tile."""
NAMESPACE = namespace(__name__)


def fused_mixture(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    dictionary: Tensor,
    epsilon: Tensor,
    factor: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    one_sided: bool,
    mix: torch.dtype,
    limit: int,
    convex: bool = False,
) -> Tensor:
    """Compute the function :func:`hf_kernel_ffn.checkpoint_code.operators.plain`, of the same
    arguments, in any strides and float32, bfloat16 or float16. Differentiable."""
    return _mixture(
        x, rows, bias, dictionary, epsilon, factor, up, up_bias, one_sided, mix, limit, convex
    )[0]


@library.custom_op(
    f"{NAMESPACE}::mixture",
    mutates_args=(),
    schema=f"({ARGUMENTS}) -> (Tensor written, Tensor log_mass)",
)
def _mixture(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The mixture, and if convex log₂ Σ κ^(1/τ) (N,) float32, +∞ where nothing fires."""
    given = MixtureArguments(*arguments)
    x = given.x
    prototypes = len(given.rows)
    has_short_epilogue = given.up is None and not given.convex
    operands = Operands(given, TOKENS if has_short_epilogue else TOKENS // 2, PROTOTYPES)
    tiles = operands.tiles
    width = tiles * PROTOTYPES
    mixed = given.dictionary.to(given.mix)
    written = x.new_empty(len(x), len(given.dictionary), dtype=given.mix)
    log_mass = x.new_empty(len(x) if given.convex else 0, dtype=torch.float32)

    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        for part in chunks(len(x), given.limit, width * given.mix.itemsize):
            count = count_tokens(part, x)
            coefficients = x.new_empty(count, width, dtype=given.mix)
            tops = x.new_empty(count if given.convex else 1, tiles, dtype=torch.float32)
            masses = torch.empty_like(tops)
            operands.launch(
                forward_tuned,
                part,
                coefficients=coefficients,
                tops=tops,
                masses=masses,
                tiles=tiles,
                width=width,
            )
            if not given.convex:
                torch.mm(coefficients[:, :prototypes], mixed.T, out=written[part])
                continue
            total, log_mass[part] = _bring_to_one_power(coefficients, tops, masses)
            written[part] = multiply_in_float32(coefficients[:, :prototypes], mixed.T) / total
    return written, log_mass


def _bring_to_one_power(
    coefficients: Tensor, tops: Tensor, masses: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale the tiles of ``coefficients`` (tokens, tiles · PROTOTYPES) in place, each by a power
    of two, from relative to their own ``tops`` (tokens, tiles) to relative to a row's highest.

    Returns:
        (tokens, 1) the rows' masses so, 1 where nothing fires; and (tokens,) the logarithms of
        their whole masses, to base 2, +∞ where nothing fires.
    """
    highest = tops.amax(1, keepdim=True)
    fires = highest > -torch.inf
    share = torch.exp2(tops - highest.where(fires, torch.zeros_like(highest)))
    mass = (masses * share).sum(1, keepdim=True)
    coefficients.view(*tops.shape, PROTOTYPES).mul_(share[:, :, None])
    total = mass.where(fires, torch.ones_like(mass))
    log_mass = (highest + total.log2()).where(fires, torch.full_like(total, torch.inf))
    return total, log_mass[:, 0]


@_mixture.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = MixtureArguments(*arguments)
    x = given.x
    written = x.new_empty(x.shape[0], given.dictionary.shape[0], dtype=given.mix)
    return written, x.new_empty(x.shape[0] if given.convex else 0, dtype=torch.float32)


@library.custom_op(
    f"{NAMESPACE}::mixture_backward",
    mutates_args=(),
    schema=(
        f"(Tensor gradient, Tensor written, Tensor log_mass, bool[] wanted, {ARGUMENTS})"
        f" -> ({', '.join(['Tensor'] * TENSORS)})"
    ),
)
def _mixture_backward(
    gradient: Tensor, written: Tensor, log_mass: Tensor, wanted: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    """Gradients of the eight tensors among the arguments, empty where not wanted."""
    given = MixtureArguments(*arguments)
    x = given.x
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        operands = Operands(given, TOKENS // 2, PROTOTYPES)
        backward = MixtureBackward(given, operands, gradient, written, log_mass, wanted)
        itemsize = max(given.mix.itemsize, operands.x.dtype.itemsize)
        for part in chunks(len(x), given.limit, 4 * len(given.rows) * itemsize):
            backward.add_chunk(part)
        return backward.finish()


@_mixture_backward.register_fake
def _(
    gradient: Tensor, written: Tensor, log_mass: Tensor, wanted: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    return empty_gradients(arguments[0], arguments[:TENSORS], wanted)


differentiate(_mixture, _mixture_backward)
