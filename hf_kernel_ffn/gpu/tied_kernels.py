"""Tied rows with knots on a GPU: the elementwise step of checkpoint_code/knots.py by Triton.

    forward   g, u → c
    backward  ∂c, g, u → ∂g, ∂u, c, and per block of tokens what they add to ∂knot and ∂amount

A program goes through a block of tokens with the pieces of its units in registers: each number of
(tokens, units) is read or written once. Pieces are summed in float32. What the blocks add is summed
by torch afterwards, so that it is the same every time.
"""

# Tuples grow in the kernels, which Triton unrolls.
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, library

from ..checkpoint_code.knots import KnotGradients, Knots, flatten_tokens
from ..checkpoint_code.operators import namespace
from .optional_triton import jit, tl

UNITS = 256
"""Units of a forward program."""
BACKWARD_UNITS = 128
"""Units of a backward program, which has sums of each piece in registers too."""
TOGETHER = 4
"""Tokens that a forward program reads at once."""
BACKWARD_TOGETHER = 2
"""Tokens that a backward program reads at once."""
WARPS = 4
"""Of a program."""
TOKENS = (8, 64)
"""Least and most tokens of a forward program."""
BACKWARD_TOKENS = (32, 256)
"""Least and most tokens of a backward program: the fewer, the more sums there are to add up."""
PROGRAMS = 1024
"""That a GPU has enough work with."""


@jit
def _clamp(numbers, low, high):
    """``numbers`` from ``low`` to ``high``; a NaN stays one."""
    least = tl.maximum(numbers, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(least, high, propagate_nan=tl.PropagateNan.ALL)


@jit
def _load_pieces(knot, amount, unit, units, PIECES: tl.constexpr):
    """Of every piece, where its clamp begins and ends, and its amount on g's side of zero."""
    lows = ()
    highs = ()
    slopes = ()
    there = unit < units
    for piece in tl.static_range(PIECES):
        k = tl.load(knot + piece * units + unit, mask=there, other=0.0)
        a = tl.load(amount + piece * units + unit, mask=there, other=0.0)
        lows = lows + (tl.where(k > 0, 0.0, k),)
        highs = highs + (tl.where(k < 0, 0.0, k),)
        slopes = slopes + (tl.where(k < 0, -a, tl.where(k > 0, a, 0.0)),)
    return lows, highs, slopes


@jit
def _load_rows(matrix, base, here, unit, tokens, units, TOGETHER: tl.constexpr):
    """TOGETHER rows of ``matrix`` from ``here`` on, (BLOCK_UNITS,) each, asked for at once."""
    rows = ()
    for row in tl.static_range(TOGETHER):
        mask = (unit < units) & (here + row < tokens)
        number = tl.load(matrix + base + row * units + unit, mask=mask, other=0.0)
        rows = rows + (number.to(tl.float32),)
    return rows


@jit
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
    TOGETHER: tl.constexpr,
):
    """``coefficients`` (tokens, units) of BLOCK_TOKENS tokens and BLOCK_UNITS units."""
    unit = tl.program_id(1) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    lows, highs, slopes = _load_pieces(knot, amount, unit, units, PIECES)
    for start in range(0, BLOCK_TOKENS, TOGETHER):
        here = tl.program_id(0) * BLOCK_TOKENS + start
        base = here.to(tl.int64) * units
        scores = _load_rows(gate, base, here, unit, tokens, units, TOGETHER)
        if GATED:
            factors = _load_rows(up, base, here, unit, tokens, units, TOGETHER)
        for row in tl.static_range(TOGETHER):
            total = tl.zeros((BLOCK_UNITS,), tl.float32)
            for piece in tl.static_range(PIECES):
                total += slopes[piece] * _clamp(scores[row], lows[piece], highs[piece])
            if GATED:
                total *= _clamp(factors[row], -far, far)
            tl.store(
                coefficients + base + row * units + unit,
                total.to(coefficients.dtype.element_ty),
                mask=(unit < units) & (here + row < tokens),
            )


@jit
def knots_backward_kernel(
    gradient,
    gate,
    up,
    knot,
    amount,
    coefficients,
    d_gate,
    d_up,
    of_knot,
    of_amount,
    far,
    tokens,
    units,
    PIECES: tl.constexpr,
    GATED: tl.constexpr,
    OF_PIECES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """``coefficients``, ``d_gate`` and ``d_up`` (tokens, units) of BLOCK_TOKENS tokens, and what
    these add to the gradients of knot and amount (blocks, PIECES, units): from Σ ∂f · clamp where g
    is outside of a piece, ``beyond`` its knot or on the other side of zero, and ``within``."""
    unit = tl.program_id(1) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    lows, highs, slopes = _load_pieces(knot, amount, unit, units, PIECES)
    beyond = ()
    within = ()
    for _piece in tl.static_range(PIECES):
        beyond = beyond + (tl.zeros((BLOCK_UNITS,), tl.float32),)
        within = within + (tl.zeros((BLOCK_UNITS,), tl.float32),)
    for start in range(0, BLOCK_TOKENS, TOGETHER):
        here = tl.program_id(0) * BLOCK_TOKENS + start
        base = here.to(tl.int64) * units
        scores = _load_rows(gate, base, here, unit, tokens, units, TOGETHER)
        changes = _load_rows(gradient, base, here, unit, tokens, units, TOGETHER)
        if GATED:
            raws = _load_rows(up, base, here, unit, tokens, units, TOGETHER)
        for row in tl.static_range(TOGETHER):
            mask = (unit < units) & (here + row < tokens)
            score = scores[row]
            by_gate = changes[row]
            if GATED:
                factor = _clamp(raws[row], -far, far)
                by_gate *= factor
            total = tl.zeros((BLOCK_UNITS,), tl.float32)
            slope = tl.zeros((BLOCK_UNITS,), tl.float32)
            next_beyond = ()
            next_within = ()
            for piece in tl.static_range(PIECES):
                clamped = _clamp(score, lows[piece], highs[piece])
                inside = clamped == score
                total += slopes[piece] * clamped
                slope += tl.where(inside, slopes[piece], 0.0)
                if OF_PIECES:
                    share = by_gate * clamped
                    next_beyond = next_beyond + (beyond[piece] + tl.where(inside, 0.0, share),)
                    next_within = next_within + (within[piece] + tl.where(inside, share, 0.0),)
            if OF_PIECES:
                beyond = next_beyond
                within = next_within
            d_score = by_gate * tl.where(score == 0, 0.0, slope)
            place = base + row * units + unit
            tl.store(d_gate + place, d_score.to(d_gate.dtype.element_ty), mask=mask)
            if GATED:
                d_factor = tl.where(factor == raws[row], changes[row] * total, 0.0)
                tl.store(d_up + place, d_factor.to(d_up.dtype.element_ty), mask=mask)
                total *= factor
            tl.store(coefficients + place, total.to(coefficients.dtype.element_ty), mask=mask)
    if OF_PIECES:
        base = tl.program_id(0).to(tl.int64) * PIECES * units
        for piece in tl.static_range(PIECES):
            place = base + piece * units + unit
            k = lows[piece] + highs[piece]
            d_knot = slopes[piece] * (beyond[piece] / tl.where(k == 0, 1.0, k))
            d_amount = beyond[piece] + within[piece]
            tl.store(of_knot + place, d_knot, mask=unit < units)
            tl.store(of_amount + place, tl.where(k < 0, -d_amount, d_amount), mask=unit < units)


class TritonStep:
    """The step by the kernels of this file; see :class:`checkpoint_code.knots.KnotStep`."""

    def __init__(self) -> None:
        self.compiled_backward = _make_operator(self)

    def forward(self, gate: Tensor, up: Tensor | None, knots: Knots) -> Tensor:
        """c, shape (..., units) and dtype of ``gate``."""
        shape = gate.shape
        gate = flatten_tokens(gate)
        up = None if up is None else flatten_tokens(up)
        written = torch.empty_like(gate)
        if not gate.numel():
            return written.view(shape)
        block = _choose_tokens(gate, UNITS, TOKENS)
        with device_of(gate):
            knots_kernel[_grid(gate, block, UNITS)](
                gate,
                gate if up is None else up,
                knots.knot.contiguous(),
                knots.amount.contiguous(),
                written,
                knots.far or 0.0,
                *gate.shape,
                PIECES=len(knots.knot),
                GATED=up is not None,
                BLOCK_TOKENS=block,
                BLOCK_UNITS=UNITS,
                TOGETHER=TOGETHER,
                num_warps=WARPS,
            )
        return written.view(shape)

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
        """All gradients by one kernel, and a sum over its blocks of tokens."""
        written = torch.empty_like(gate)
        of_up = None if up is None else torch.empty_like(up)
        block = _choose_tokens(gate, BACKWARD_UNITS, BACKWARD_TOKENS)
        grid = _grid(gate, block, BACKWARD_UNITS)
        knot = knots.knot.contiguous()
        sums = knot.new_empty(2, grid[0] if of_pieces else 1, *knot.shape)
        if gate.numel():
            with device_of(gate):
                knots_backward_kernel[grid](
                    gradient,
                    gate,
                    gate if up is None else up,
                    knot,
                    knots.amount.contiguous(),
                    written,
                    of_gate,
                    of_gate if of_up is None else of_up,
                    sums[0],
                    sums[1],
                    knots.far or 0.0,
                    *gate.shape,
                    PIECES=len(knot),
                    GATED=up is not None,
                    OF_PIECES=of_pieces,
                    BLOCK_TOKENS=block,
                    BLOCK_UNITS=BACKWARD_UNITS,
                    TOGETHER=BACKWARD_TOGETHER,
                    num_warps=WARPS,
                )
        if not of_pieces:
            return KnotGradients(of_gate, of_up, written, None, None)
        of_knot, of_amount = sums.sum(1)
        return KnotGradients(of_gate, of_up, written, of_knot, of_amount)


def _make_operator(step: TritonStep) -> Callable[..., tuple[Tensor, ...]]:
    """The backward pass of ``step`` as an operator of torch, which a compiler calls and does not
    look into."""

    @library.custom_op(
        f"{namespace(__name__)}::knots_backward",
        mutates_args=(),
        schema="(Tensor gradient, Tensor gate, Tensor? up, Tensor knot, Tensor amount, float? far, "
        "bool of_pieces) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    def operator(*arguments: Any) -> tuple[Tensor, ...]:
        gradient, gate, up, knot, amount, far, of_pieces = arguments
        knots = Knots(knot, amount, far)
        of_gate = torch.empty_like(gate)
        found = step.backward(gradient, gate, up, knots, of_gate=of_gate, of_pieces=of_pieces)
        # An operator may not return views of one tensor, as those of the pieces are.
        of_knot = None if found.knot is None else found.knot.clone()
        of_amount = None if found.amount is None else found.amount.clone()
        every = (found.gate, found.up, of_knot, of_amount)
        return tuple(gate.new_empty(0) if tensor is None else tensor for tensor in every)

    @operator.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        _, gate, up, knot, amount, _, of_pieces = arguments
        every = (gate, up, knot if of_pieces else None, amount if of_pieces else None)
        return tuple(
            gate.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in every
        )

    return operator


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the device of ``tensor``; nothing to do where it is the current."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device_of(tensor)


def _choose_tokens(gate: Tensor, units_at_once: int, bounds: tuple[int, int]) -> int:
    """Tokens of a program, a power of two, so that there are PROGRAMS if there can be."""
    tokens, units = gate.shape
    least, most = bounds
    block = most
    while block > least and -(-tokens // block) * -(-units // units_at_once) < PROGRAMS:
        block //= 2
    return block


def _grid(gate: Tensor, block: int, units_at_once: int) -> tuple[int, int]:
    tokens, units = gate.shape
    return -(-tokens // block), -(-units // units_at_once)


TRITON_STEP = TritonStep()
