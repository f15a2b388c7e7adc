"""Tied rows with knots in one elementwise step between the stock products.

With g = gate (..., units), u = up of the same shape or None, and P pieces of each unit:

    f(g) = Σ_p a_p |clamp(g, min(0, k_p), max(0, k_p))|,    c = f(g) · clamp(u, −far, far) or f(g)
    y = c · Vᵀ + b_out

f is linear between its bends, the knots k_p and zero. Only g and u are kept for the backward pass,
in their own dtype: c and all of f are computed again. Pieces are summed in float32 at least.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .kernels import get_kernel
from .parameters import to_at_least_float32

BROWNIAN = get_kernel("brownian")


class Bounds(NamedTuple):
    """What c of a few tokens is made of: a sum of clamped g, and a clamped u."""

    low: Tensor
    """(pieces, units) min(0, k), where the clamp of g begins."""
    high: Tensor
    """(pieces, units) max(0, k), where it ends."""
    signed: Tensor
    """(pieces, units) a with the sign of k; 0 where k is 0."""
    least: Tensor | None
    """(1,) −far; None where coefficients are not multiplied by u."""
    most: Tensor | None
    """(1,) far."""


class Knots(NamedTuple):
    """The numbers of a layer's pieces, in float32 at least."""

    knot: Tensor
    """(pieces, units) k of either sign."""
    amount: Tensor
    """(pieces, units) a, the layer's scale included."""
    far: float | None
    """Where u is clamped; None where coefficients are not multiplied by it."""
    bounds: Bounds | None = None
    """What follows from the others, where it has been made; see :func:`make_bounds`."""


class KnotGradients(NamedTuple):
    """What :meth:`KnotStep.backward` finds."""

    gate: Tensor
    """(tokens, units) in the dtype of g."""
    up: Tensor | None
    """(tokens, units) in the dtype of u; None without u."""
    coefficients: Tensor
    """(tokens, units) c, computed again."""
    knot: Tensor | None
    """(pieces, units); None where not asked for."""
    amount: Tensor | None
    """(pieces, units); None where not asked for."""


class KnotStep(Protocol):
    """A way to compute the step."""

    compiled_backward: Callable[..., tuple[Tensor, ...]]
    """``backward`` as :func:`differentiate_knots`, for a compiler."""

    def forward(self, gate: Tensor, up: Tensor | None, knots: Knots) -> Tensor:
        """c, shape (..., units) and dtype of ``gate``."""
        ...

    def backward(
        self,
        gradient: Tensor,
        gate: Tensor,
        up: Tensor | None,
        knots: Knots,
        *,
        of_gate: Tensor,
        of_pieces: bool,
    ) -> KnotGradients:
        """Gradients by that of c, ``gradient``; it, g and u are contiguous and (tokens, units).

        Args:
            of_gate: where the gradient of g is written, for which ``gradient`` itself may be given.
            of_pieces: whether those of the pieces are wanted.
        """
        ...


def make_bounds(knot: Tensor, amount: Tensor, far: float | None) -> Bounds:
    """The bounds of the pieces ``knot`` and ``amount`` (pieces, units), the scale included."""
    least = None
    most = None
    if far is not None:
        # Tensors, not numbers: u is then clamped in their dtype, not in its own.
        least = knot.new_full((1,), -far)
        most = knot.new_full((1,), far)
    return Bounds(knot.clamp_max(0), knot.clamp_min(0), amount * knot.sign(), least, most)


def sum_knots(gate: Tensor, knot: Tensor, amount: Tensor) -> Tensor:
    """f(g), shape and dtype of ``gate``, by its formula: the form that a compiler fuses.

    Args:
        gate: (..., units) float32 at least.
        knot, amount: (pieces, units).
    """
    total = torch.zeros_like(gate)
    for piece in range(len(knot)):
        kernel = BROWNIAN.value(gate, None, knot=knot[piece])
        total = torch.addcmul(total, kernel, amount[piece])
    return total


def differentiate_knots(
    gradient: Tensor,
    gate: Tensor,
    up: Tensor | None,
    knot: Tensor,
    amount: Tensor,
    far: float | None,
    of_pieces: bool,
) -> tuple[Tensor, ...]:
    """Gradients of g, u, knot and amount by that of c, all (tokens, units).

    A compiler fuses them into one loop. Those that do not exist, or are not wanted, are empty.
    """
    change = gradient.to(knot.dtype)
    score = gate.to(knot.dtype)
    nothing = gate.new_empty(0)

    of_up = nothing
    by_gate = change
    if up is not None and far is not None:
        raw = up.to(knot.dtype)
        factor = raw.clamp(-far, far)
        by_gate = change * factor
        by_up = change * sum_knots(score, knot, amount)
        of_up = by_up.where(factor == raw, 0.0).to(up.dtype)

    signed = amount * knot.sign()
    low = knot.clamp_max(0)
    high = knot.clamp_min(0)

    slope = torch.zeros_like(score)
    beyond = []
    everywhere = []
    for piece in range(len(knot)):
        clamped = score.clamp(low[piece], high[piece])
        inside = clamped == score
        slope = slope + torch.where(inside, signed[piece], 0.0)
        share = by_gate * clamped
        beyond.append(share.masked_fill(inside, 0.0).sum(0))
        everywhere.append(share.sum(0))

    of_gate = (by_gate * slope.where(score != 0, 0.0)).to(gate.dtype)
    if not of_pieces:
        return of_gate, of_up, nothing, nothing
    of_knot = torch.stack(beyond) / knot.where(knot != 0, 1.0) * signed
    return of_gate, of_up, of_knot, torch.stack(everywhere) * knot.sign()


def flatten_tokens(tensor: Tensor) -> Tensor:
    """``tensor`` (..., units) as (tokens, units), contiguous."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def compute_coefficients(gate: Tensor, up: Tensor | None, knots: Knots) -> Tensor:
    """c, in float32 at least."""
    coefficients = sum_knots(to_at_least_float32(gate), knots.knot, knots.amount)
    if up is None or knots.far is None:
        return coefficients
    return coefficients * to_at_least_float32(up).clamp(-knots.far, knots.far)
