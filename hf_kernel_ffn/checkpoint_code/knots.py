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

FORWARD_NUMBERS = 2**15
"""Coefficients that are worked on at once on a CPU, so that they stay in its cache."""
BACKWARD_NUMBERS = 2**15
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
        self, gradient: Tensor, gate: Tensor, up: Tensor | None, knots: Knots, of_pieces: bool
    ) -> KnotGradients:
        """Gradients by that of c, ``gradient``, which may be overwritten."""
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
    through = flat.clone() if weight is None else flat @ weight.to(flat.dtype)
    of_weight = None
    found = None
    if any(wanted[:5]):
        found = step.backward(
            through,
            _flat(gate),
            None if up is None else _flat(up),
            Knots(knot, amount, far),
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
        knot, amount, far = knots
        signed = amount * knot.sign()
        low = knot.clamp_max(0)
        high = knot.clamp_min(0)
        written = torch.empty_like(gate)
        total: Tensor = knot
        clamped: Tensor = knot
        for part in _blocks(gate, FORWARD_NUMBERS):
            score = gate[part].to(knot.dtype)
            if len(total) != len(score) or total is knot:
                total = torch.empty_like(score)
                clamped = torch.empty_like(score)
            total.zero_()
            for piece in range(len(knot)):
                torch.clamp(score, low[piece], high[piece], out=clamped)
                total.addcmul_(clamped, signed[piece])
            if up is None or far is None:
                written[part] = total
                continue
            torch.clamp(up[part].to(knot.dtype), -far, far, out=clamped)
            if written.dtype == knot.dtype:
                torch.mul(total, clamped, out=written[part])
            else:
                written[part] = total.mul_(clamped)
        return written

    def backward(
        self, gradient: Tensor, gate: Tensor, up: Tensor | None, knots: Knots, of_pieces: bool
    ) -> KnotGradients:
        """All gradients; that of g takes the place of ``gradient``."""
        blocks = _BackwardBlocks(gate, knots, of_pieces)
        of_up = None if up is None else torch.empty_like(up)
        written = torch.empty_like(gate)
        for part in _blocks(gate, BACKWARD_NUMBERS):
            blocks.read(gate[part])
            far = knots.far
            change = gradient[part].to(knots.knot.dtype)
            if up is not None and of_up is not None and far is not None:
                raw = up[part].to(knots.knot.dtype)
                factor = raw.clamp(-far, far)
                by_gate = change * factor
                blocks.add(by_gate)
                written[part] = blocks.total * factor
                of_up[part] = (change * blocks.total).mul_(factor == raw)
            else:
                by_gate = change
                blocks.add(by_gate)
                written[part] = blocks.total
            gradient[part] = blocks.slope.mul_(by_gate)
        return KnotGradients(gradient, of_up, written, *blocks.finish())


class _BackwardBlocks:
    """f, its derivative, and sums over tokens, of one block after the other.

    With t = clamp(g, ·, ·), t ≠ g wherever g is outside of what a piece is linear on: there t is
    k beyond the knot and 0 on the other side of zero.
    """

    def __init__(self, gate: Tensor, knots: Knots, of_pieces: bool):
        self.knot = knots.knot
        self.signed = knots.amount * knots.knot.sign()
        self.low = knots.knot.clamp_max(0)
        self.high = knots.knot.clamp_min(0)
        self.of_pieces = of_pieces
        self.sums = torch.zeros(2, *self.knot.shape, dtype=self.knot.dtype, device=gate.device)
        self.all_signed = self.signed.sum(0)
        self.total = self.score = self.knot[:0]
        self.slope = self.clamped = self.outside = self.knot[:0]

    def read(self, gate: Tensor) -> None:
        """Take the scores of a block."""
        self.score = gate.to(self.knot.dtype)
        if len(self.total) != len(gate):
            self.total, self.slope, self.clamped, self.outside = (
                torch.empty_like(self.score) for _ in range(4)
            )

    def add(self, by_gate: Tensor) -> None:
        """Compute f and f' at a block, and add what ``by_gate``, ∂/∂f, gives to the sums."""
        clamped = self.clamped
        outside = self.outside
        self.total.zero_()
        self.slope.copy_(self.all_signed.expand_as(self.slope))
        for piece in range(len(self.knot)):
            torch.clamp(self.score, self.low[piece], self.high[piece], out=clamped)
            self.total.addcmul_(clamped, self.signed[piece])
            torch.ne(clamped, self.score, out=outside)
            self.slope.addcmul_(outside, self.signed[piece], value=-1)
            if self.of_pieces:
                clamped.mul_(by_gate)
                self.sums[0, piece] += clamped.sum(0)
                self.sums[1, piece] += clamped.mul_(outside).sum(0)
        self.slope.mul_(torch.ne(self.score, 0, out=outside))

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of knot and amount: the sums of ∂/∂f · t, beyond the knot and everywhere."""
        if not self.of_pieces:
            return None, None
        knot = self.knot
        there = knot != 0
        beyond = self.sums[1] / knot.where(there, torch.ones_like(knot))
        return beyond * there * self.signed, self.sums[0] * knot.sign()


def _blocks(gate: Tensor, numbers: int) -> Iterator[slice]:
    """Slices of the tokens of ``gate``, of about ``numbers`` scores each on a CPU."""
    tokens, units = gate.shape
    at_once = numbers if gate.device.type == "cpu" else DEVICE_NUMBERS
    size = max(1, at_once // max(1, units))
    for low in range(0, tokens, size):
        yield slice(low, min(low + size, tokens))


BLOCKS = BlockStep()
