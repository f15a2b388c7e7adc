"""The step of knots.py by operations of torch, in blocks of tokens.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .knots import (
    Bounds,
    KnotGradients,
    Knots,
    differentiate_knots,
    flatten_tokens,
    make_bounds,
)

FORWARD_NUMBERS = 2**17
"""Coefficients that are worked on at once on a CPU, so that they stay in its cache."""
BACKWARD_NUMBERS = 2**17
"""The same in the backward pass."""
FEW_NUMBERS = 2**16
"""Coefficients times pieces up to which all pieces are one operation: that of one token, whose
price is the number of operations."""
DEVICE_NUMBERS = 2**23
"""Coefficients that are worked on at once elsewhere: what temporaries in float32 may take."""


class BlockStep:
    """The step by operations of torch, in blocks of tokens that stay in a CPU's cache."""

    compiled_backward = staticmethod(differentiate_knots)

    def forward(self, gate: Tensor, up: Tensor | None, knots: Knots) -> Tensor:
        """c, by two operations per piece; of few tokens, by three for all of them."""
        if gate.numel() * len(knots.knot) <= FEW_NUMBERS:
            return _mix_few(gate, up, knots)
        shape = gate.shape
        gate = flatten_tokens(gate)
        up = None if up is None else flatten_tokens(up)
        pieces = _Pieces(knots)
        dtype = knots.knot.dtype
        written = torch.empty_like(gate)
        buffers = _Buffers(gate, dtype, 2)
        for part in _blocks(gate, FORWARD_NUMBERS):
            score = gate[part].to(dtype)
            total, clamped = buffers.take(len(score))
            if written.dtype == dtype:
                total = written[part]
            for place, (low, high, signed) in enumerate(pieces):
                torch.clamp(score, low, high, out=clamped)
                _add_product(total, clamped, signed, first=place == 0)
            if up is not None and knots.far is not None:
                torch.clamp(up[part].to(dtype), -knots.far, knots.far, out=clamped)
                total.mul_(clamped)
            if written.dtype != dtype:
                written[part] = total
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
        """All gradients, by eight operations per piece."""
        dtype = knots.knot.dtype
        blocks = _BackwardBlocks(gate, knots, of_pieces)
        buffers = _Buffers(gate, dtype, 3)
        of_up = None if up is None else torch.empty_like(up)
        written = torch.empty_like(gate)
        far = knots.far
        for part in _blocks(gate, BACKWARD_NUMBERS):
            change = gradient[part].to(dtype)
            if up is None or of_up is None or far is None:
                total, slope = blocks.add(gate[part], change)
                written[part] = total
                _multiply(slope, change, of_gate[part])
                continue
            raw = up[part].to(dtype)
            factor, by_gate, by_up = buffers.take(len(raw))
            torch.clamp(raw, -far, far, out=factor)
            torch.eq(factor, raw, out=by_up).mul_(change)
            torch.mul(change, factor, out=by_gate)
            total, slope = blocks.add(gate[part], by_gate)
            _multiply(slope, by_gate, of_gate[part])
            _multiply(by_up, total, of_up[part])
            _multiply(total, factor, written[part])
        return KnotGradients(of_gate, of_up, written, *blocks.finish())


def _mix_few(gate: Tensor, up: Tensor | None, knots: Knots) -> Tensor:
    """c of few tokens, shape and dtype of ``gate``.

    Operations take g and u in their own dtype and compute in that of the pieces.
    """
    bounds = _get_bounds(knots)
    clamped = torch.clamp(gate.unsqueeze(-2), bounds.low, bounds.high)
    total = clamped.mul_(bounds.signed).sum(-2)
    if up is None or bounds.least is None:
        return total.to(gate.dtype)
    factor = torch.clamp(up, bounds.least, bounds.most)
    return torch.mul(total, factor, out=torch.empty_like(gate))


def _get_bounds(knots: Knots) -> Bounds:
    """The bounds of ``knots``, made if they are not there."""
    return knots.bounds or make_bounds(knots.knot, knots.amount, knots.far)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Add left · right to ``total``; the first is written there."""
    if first:
        torch.mul(left, right, out=total)
    else:
        total.addcmul_(left, right)


def _multiply(left: Tensor, right: Tensor, product: Tensor) -> None:
    """Write left · right to ``product``, of any dtype; ``left`` may be overwritten."""
    if product.dtype == left.dtype:
        torch.mul(left, right, out=product)
    else:
        product.copy_(left.mul_(right))


class _Pieces:
    """Of every piece (units,): where its clamp begins and ends, and its amount on g's side."""

    def __init__(self, knots: Knots):
        bounds = _get_bounds(knots)
        self.signed = bounds.signed
        numbers = (bounds.low, bounds.high, bounds.signed)
        self.rows = list(zip(*(number.unbind() for number in numbers), strict=True))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return iter(self.rows)


class _Buffers:
    """Tensors of the size of a block, made once: all blocks but the last have one size."""

    def __init__(self, gate: Tensor, dtype: torch.dtype, count: int):
        self.new = [gate.new_empty(0, gate.shape[-1], dtype=dtype) for _ in range(count)]

    def take(self, tokens: int) -> list[Tensor]:
        """(tokens, units) each, of any content."""
        if len(self.new[0]) < tokens:
            self.new = [old.new_empty(tokens, old.shape[-1]) for old in self.new]
        return [buffer[:tokens] for buffer in self.new]


class _BackwardBlocks:
    """f, its derivative, and sums over tokens, of one block after the other.

    With t = clamp(g, ·, ·), t ≠ g wherever g is outside of what a piece is linear on: there t is
    k beyond the knot and 0 on the other side of zero.
    """

    def __init__(self, gate: Tensor, knots: Knots, of_pieces: bool):
        self.knot = knots.knot
        self.pieces = _Pieces(knots)
        self.of_pieces = of_pieces
        shape = (len(self.knot), 1, gate.shape[-1])
        self.all_of_them = self.knot.new_zeros(shape).unbind()
        self.within = self.knot.new_zeros(shape).unbind()
        self.buffers = _Buffers(gate, self.knot.dtype, 4)
        self.ones = self.knot.new_empty(0)

    def add(self, gate: Tensor, by_gate: Tensor) -> tuple[Tensor, Tensor]:
        """f and f' at a block; what ``by_gate``, ∂/∂f, gives to the pieces is added up."""
        score = gate.to(self.knot.dtype)
        total, slope, clamped, inside = self.buffers.take(len(gate))
        if self.ones.numel() != len(gate):
            self.ones = score.new_ones(1, len(gate))
        for place, (low, high, signed) in enumerate(self.pieces):
            torch.clamp(score, low, high, out=clamped)
            _add_product(total, clamped, signed, first=place == 0)
            torch.eq(clamped, score, out=inside)
            _add_product(slope, inside, signed, first=place == 0)
            if self.of_pieces:
                self.all_of_them[place].addmm_(self.ones, clamped.mul_(by_gate))
                self.within[place].addmm_(self.ones, clamped.mul_(inside))
        slope.mul_(torch.ne(score, 0, out=inside))
        return total, slope

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of knot and amount: the sums of ∂/∂f · t, beyond the knot and everywhere."""
        if not self.of_pieces:
            return None, None
        knot = self.knot
        of_all = torch.cat(self.all_of_them)
        beyond = (of_all - torch.cat(self.within)) / knot.where(knot != 0, torch.ones_like(knot))
        return beyond * self.pieces.signed, of_all * knot.sign()


def _blocks(gate: Tensor, numbers: int) -> Iterator[slice]:
    """Slices of the tokens of ``gate``, of about ``numbers`` scores each on a CPU."""
    tokens, units = gate.shape
    at_once = numbers if gate.device.type == "cpu" else DEVICE_NUMBERS
    size = max(1, at_once // max(1, units))
    for low in range(0, tokens, size):
        yield slice(low, min(low + size, tokens))


BLOCKS = BlockStep()
