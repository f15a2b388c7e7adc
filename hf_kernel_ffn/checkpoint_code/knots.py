"""Tied rows with knots in one elementwise step between the stock products.

With g = gate (..., units), u = up of the same shape or None, and P pieces of each unit:

    f(g) = Σ_p a_p |clamp(g, min(0, k_p), max(0, k_p))|,    c = f(g) · clamp(u, −far, far) or f(g)
    y = c · Vᵀ + b_out

f is linear between its bends, the knots k_p and zero. Only g and u are kept for the backward pass,
in their own dtype: c and all of f are computed again. Pieces are summed in float32 at least.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .linears import is_plain
from .parameters import to_at_least_float32

if TYPE_CHECKING:
    from .tied import TiedKernelFFN

FORWARD_NUMBERS = 2**17
"""Coefficients that are worked on at once on a CPU, so that they stay in its cache."""
BACKWARD_NUMBERS = 2**17
"""The same in the backward pass."""
DEVICE_NUMBERS = 2**24
"""Coefficients that are worked on at once elsewhere: what temporaries in float32 may take."""


class Knots(NamedTuple):
    """The numbers of a layer's pieces, in float32 at least."""

    knot: Tensor
    """(pieces, units) k of either sign."""
    amount: Tensor
    """(pieces, units) a, the layer's scale included."""
    far: float | None
    """Where u is clamped; None where coefficients are not multiplied by it."""


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
    """A way to compute the step; g, u and gradients are contiguous and (tokens, units)."""

    def forward(self, gate: Tensor, up: Tensor | None, knots: Knots) -> Tensor:
        """c (tokens, units), in the dtype of ``gate``."""
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
        """Gradients by that of c, ``gradient``.

        Args:
            of_gate: where the gradient of g is written, for which ``gradient`` itself may be given.
            of_pieces: whether those of the pieces are wanted.
        """
        ...


def sum_knots(gate: Tensor, knot: Tensor, amount: Tensor) -> Tensor:
    """f(g), shape and dtype of ``gate``, by its formula: the form that a compiler fuses.

    Args:
        gate: (..., units) float32 at least.
        knot, amount: (pieces, units).
    """
    signed = amount * knot.sign()
    low = knot.clamp_max(0)
    high = knot.clamp_min(0)
    total = torch.zeros_like(gate)
    for piece in range(len(knot)):
        total = torch.addcmul(total, gate.clamp(low[piece], high[piece]), signed[piece])
    return total


def mix_knots(ffn: TiedKernelFFN, hidden_states: Tensor, step: KnotStep) -> Tensor:
    """The output (..., hidden_size) of ``ffn`` before dropout; plan.py says when it may be asked.

    Where the output prototypes are a plain linear module, c is not kept for their gradient.
    """
    gate = ffn.input_prototypes(hidden_states)
    up = None
    far = None
    if ffn.multiplies_by_up:
        up = ffn.value_proj(hidden_states)
        far = ffn.config.reference["far"]
    knot = to_at_least_float32(ffn.pieces["knot"])
    amount = to_at_least_float32(ffn.pieces["amount"]) * ffn.positive("scale")

    output = ffn.output_prototypes
    if not torch.is_grad_enabled():
        return output(_apply(step, gate, up, Knots(knot, amount, far)))
    if is_plain(output):
        return _KnotReadout.apply(gate, up, knot, amount, output.weight, output.bias, far, step)  # type: ignore[no-any-return]
    return output(_KnotReadout.apply(gate, up, knot, amount, None, None, far, step))


def _apply(step: KnotStep, gate: Tensor, up: Tensor | None, knots: Knots) -> Tensor:
    """c, shape and dtype of ``gate``."""
    return step.forward(_flat(gate), None if up is None else _flat(up), knots).view(gate.shape)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


class _KnotReadout(torch.autograd.Function):
    """c · Vᵀ + b_out, or c without V, by way of a :class:`KnotStep`."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        knot: Tensor,
        amount: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        far: float | None,
        step: KnotStep,
    ) -> Tensor:
        ctx.save_for_backward(gate, up, knot, amount, weight, bias)
        ctx.far = far
        ctx.step = step
        coefficients = _apply(step, gate, up, Knots(knot, amount, far))
        if weight is None:
            return coefficients
        return nn.functional.linear(coefficients, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, knot, amount, weight, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:6]
        tensors = (gate, up, knot, amount, weight, bias)
        with torch.autocast(gate.device.type, enabled=False):
            if torch.is_grad_enabled():
                found = _differentiate_formula(gradients[0], tensors, ctx.far, wanted)
            else:
                found = _differentiate(gradients[0], tensors, ctx.far, wanted, ctx.step)
        return (*found, None, None)


def _differentiate(
    gradient: Tensor,
    tensors: tuple[Tensor | None, ...],
    far: float | None,
    wanted: tuple[bool, ...],
    step: KnotStep,
) -> list[Tensor | None]:
    """Gradients of g, u, knot, amount, V and b_out by that of the output; None if not wanted."""
    gate, up, knot, amount, weight, bias = tensors
    assert gate is not None and knot is not None and amount is not None
    flat = _flat(gradient)
    through = flat if weight is None else flat @ weight.to(flat.dtype)
    of_weight = None
    found = None
    if any(wanted[:5]):
        found = step.backward(
            through,
            _flat(gate),
            None if up is None else _flat(up),
            Knots(knot, amount, far),
            of_gate=torch.empty_like(gate) if weight is None else through,
            of_pieces=wanted[2] or wanted[3],
        )
        if weight is not None and wanted[4]:
            of_weight = (flat.T @ found.coefficients.to(flat.dtype)).to(weight.dtype)
    of_bias = flat.sum(0).to(bias.dtype) if bias is not None and wanted[5] else None
    if found is None:
        return [None, None, None, None, None, of_bias]
    of_up = None if up is None or found.up is None else found.up.view(up.shape)
    every = [found.gate.view(gate.shape), of_up, found.knot, found.amount, of_weight, of_bias]
    return [tensor if want else None for tensor, want in zip(every, wanted, strict=True)]


def _differentiate_formula(
    gradient: Tensor,
    tensors: tuple[Tensor | None, ...],
    far: float | None,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The same, with a graph of their own."""
    gate, up, knot, amount, weight, bias = tensors
    assert gate is not None and knot is not None and amount is not None
    coefficients = sum_knots(to_at_least_float32(gate), knot, amount)
    if up is not None and far is not None:
        coefficients = coefficients * to_at_least_float32(up).clamp(-far, far)
    output = coefficients.to(gradient.dtype)
    if weight is not None:
        of_output = None if bias is None else bias.to(gradient.dtype)
        output = nn.functional.linear(output, weight.to(gradient.dtype), of_output)
    inputs = [
        tensor for tensor, want in zip(tensors, wanted, strict=True) if want and tensor is not None
    ]
    found = iter(torch.autograd.grad(output, inputs, gradient, create_graph=True))
    return [next(found) if want else None for want in wanted]


class BlockStep:
    """The step by operations of torch, in blocks of tokens that stay in a CPU's cache."""

    def forward(self, gate: Tensor, up: Tensor | None, knots: Knots) -> Tensor:
        """c, by two operations per piece."""
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
        return written

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
        knot = knots.knot
        self.signed = knots.amount * knot.sign()
        numbers = (knot.clamp_max(0), knot.clamp_min(0), self.signed)
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
