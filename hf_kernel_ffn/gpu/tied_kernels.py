"""Tied rows with knots on a GPU: the elementwise step of checkpoint_code/knots.py by Triton.

    forward   g, u → c
    backward  ∂c, g, u → ∂g, ∂u, c, and per tile of tokens the sums that ∂knot and ∂amount take

A program has one tile of tokens and units and reads each number of it once; pieces are summed in
float32. Sums over tokens are added up by torch afterwards, so that they are the same every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint_code.knots import KnotGradients, Knots
from .triton_kernels import _jit, tl

TOKENS = 16
"""Tokens of a forward tile."""
BACKWARD_TOKENS = 64
"""Tokens of a backward tile: as many share one sum of each piece."""
UNITS = 128
"""Units of a tile."""
WARPS = 4
"""Of a forward program."""
BACKWARD_WARPS = 8
"""Of a backward program."""


@_jit
def _clamp(numbers, low, high):
    """``numbers`` from ``low`` to ``high``; a NaN stays one."""
    least = tl.maximum(numbers, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(least, high, propagate_nan=tl.PropagateNan.ALL)


@_jit
def knots_kernel(
    gate,
    up,
    knot,
    amount,
    coefficients,
    far,
    tokens,
    units,
    PIECES: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """One tile of ``coefficients`` (tokens, units)."""
    down = tl.program_id(0)
    row = tl.arange(0, BLOCK_TOKENS)
    unit = tl.program_id(1) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    there = unit < units
    both = (row < tokens - down * BLOCK_TOKENS)[:, None] & there[None, :]
    base = down.to(tl.int64) * BLOCK_TOKENS * units
    place = row[:, None] * units + unit[None, :]
    score = tl.load(gate + base + place, mask=both, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_UNITS), tl.float32)
    for piece in tl.static_range(PIECES):
        k = tl.load(knot + piece * units + unit, mask=there, other=0.0)
        a = tl.load(amount + piece * units + unit, mask=there, other=0.0)
        signed = tl.where(k < 0, -a, a)
        low = tl.where(k > 0, 0.0, k)[None, :]
        high = tl.where(k < 0, 0.0, k)[None, :]
        total += signed[None, :] * _clamp(score, low, high)
    if GATED:
        factor = tl.load(up + base + place, mask=both, other=0.0).to(tl.float32)
        total *= _clamp(factor, -far, far)
    tl.store(coefficients + base + place, total.to(coefficients.dtype.element_ty), mask=both)


@_jit
def knots_backward_kernel(
    gradient,
    gate,
    up,
    knot,
    amount,
    coefficients,
    d_gate,
    d_up,
    sum_knot,
    sum_amount,
    far,
    tokens,
    units,
    PIECES: tl.constexpr,
    GATED: tl.constexpr,
    OF_PIECES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """One tile of ``coefficients``, ``d_gate`` and ``d_up`` (tokens, units), and its row of
    ``sum_knot`` and ``sum_amount`` (tiles, PIECES, units): Σ ∂f beyond the knot, Σ ∂f |clamp|."""
    down = tl.program_id(0)
    row = tl.arange(0, BLOCK_TOKENS)
    unit = tl.program_id(1) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    there = unit < units
    both = (row < tokens - down * BLOCK_TOKENS)[:, None] & there[None, :]
    base = down.to(tl.int64) * BLOCK_TOKENS * units
    place = row[:, None] * units + unit[None, :]
    score = tl.load(gate + base + place, mask=both, other=0.0).to(tl.float32)
    change = tl.load(gradient + base + place, mask=both, other=0.0).to(tl.float32)
    by_gate = change
    if GATED:
        raw = tl.load(up + base + place, mask=both, other=0.0).to(tl.float32)
        factor = _clamp(raw, -far, far)
        by_gate = change * factor
    total = tl.zeros((BLOCK_TOKENS, BLOCK_UNITS), tl.float32)
    slope = tl.zeros((BLOCK_TOKENS, BLOCK_UNITS), tl.float32)
    sums = down.to(tl.int64) * PIECES * units + unit
    for piece in tl.static_range(PIECES):
        k = tl.load(knot + piece * units + unit, mask=there, other=0.0)
        a = tl.load(amount + piece * units + unit, mask=there, other=0.0)
        signed = tl.where(k < 0, -a, a)
        low = tl.where(k > 0, 0.0, k)[None, :]
        high = tl.where(k < 0, 0.0, k)[None, :]
        clamped = _clamp(score, low, high)
        total += signed[None, :] * clamped
        slope += tl.where(clamped == score, signed[None, :], 0.0)
        if OF_PIECES:
            beyond = (clamped != score) & (clamped != 0)
            of_knot = tl.sum(tl.where(beyond, by_gate, 0.0), 0)
            of_amount = tl.sum(by_gate * clamped, 0)
            tl.store(sum_knot + sums + piece * units, of_knot * signed, mask=there)
            tl.store(
                sum_amount + sums + piece * units,
                tl.where(k < 0, -of_amount, of_amount),
                mask=there,
            )
    slope = tl.where(score == 0, 0.0, slope)
    tl.store(d_gate + base + place, (by_gate * slope).to(d_gate.dtype.element_ty), mask=both)
    if GATED:
        d_factor = tl.where(factor == raw, change * total, 0.0)
        tl.store(d_up + base + place, d_factor.to(d_up.dtype.element_ty), mask=both)
        total *= factor
    tl.store(coefficients + base + place, total.to(coefficients.dtype.element_ty), mask=both)


class TritonStep:
    """The step by the kernels of this file; see :class:`checkpoint_code.knots.KnotStep`."""

    def forward(self, gate: Tensor, up: Tensor | None, knots: Knots) -> Tensor:
        """c (tokens, units), in the dtype of ``gate``."""
        written = torch.empty_like(gate)
        if not gate.numel():
            return written
        with torch.cuda.device_of(gate):
            knots_kernel[_grid(gate, TOKENS)](
                gate,
                gate if up is None else up,
                knots.knot.contiguous(),
                knots.amount.contiguous(),
                written,
                knots.far or 0.0,
                *gate.shape,
                PIECES=len(knots.knot),
                GATED=up is not None,
                BLOCK_TOKENS=TOKENS,
                BLOCK_UNITS=UNITS,
                num_warps=WARPS,
            )
        return written

    def backward(
        self, gradient: Tensor, gate: Tensor, up: Tensor | None, knots: Knots, of_pieces: bool
    ) -> KnotGradients:
        """All gradients; that of g takes the place of ``gradient``."""
        written = torch.empty_like(gate)
        of_up = None if up is None else torch.empty_like(up)
        grid = _grid(gate, BACKWARD_TOKENS)
        knot = knots.knot.contiguous()
        sums = knot.new_empty(2, grid[0] if of_pieces else 1, *knot.shape)
        if gate.numel():
            with torch.cuda.device_of(gate):
                knots_backward_kernel[grid](
                    gradient,
                    gate,
                    gate if up is None else up,
                    knot,
                    knots.amount.contiguous(),
                    written,
                    gradient,
                    gradient if of_up is None else of_up,
                    sums[0],
                    sums[1],
                    knots.far or 0.0,
                    *gate.shape,
                    PIECES=len(knot),
                    GATED=up is not None,
                    OF_PIECES=of_pieces,
                    BLOCK_TOKENS=BACKWARD_TOKENS,
                    BLOCK_UNITS=UNITS,
                    num_warps=BACKWARD_WARPS,
                )
        if not of_pieces:
            return KnotGradients(gradient, of_up, written, None, None)
        of_knot, of_amount = sums.sum(1)
        return KnotGradients(gradient, of_up, written, of_knot, of_amount)


def _grid(gate: Tensor, block: int) -> tuple[int, int]:
    tokens, units = gate.shape
    return -(-tokens // block), -(-units // UNITS)


TRITON_STEP = TritonStep()
