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
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from .kernels import get_kernel
from .linears import is_plain
from .parameters import to_at_least_float32

if TYPE_CHECKING:
    from .tied import TiedKernelFFN


BROWNIAN = get_kernel("brownian")


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

    compiled_backward: Callable[..., tuple[Tensor, ...]]
    """``backward`` as :func:`differentiate_knots`, for a compiler."""

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
    knot = ffn.get_piece_tensor("knot")
    amount = ffn.get_piece_tensor("amount") * ffn.positive("scale")

    output = ffn.output_prototypes
    if torch.compiler.is_compiling():
        return output(_CompiledKnots.apply(gate, up, knot, amount, far, step))
    if not torch.is_grad_enabled():
        return output(_apply(step, gate, up, Knots(knot, amount, far)))
    if not is_plain(output):
        return output(_KnotReadout.apply(gate, up, knot, amount, None, None, far, step))
    # Of tokens in one row, so that what is returned is no view made inside of the function: some
    # blocks (Falcon's) add to what their FFN returned, in place.
    rows = _flat(gate)
    up_rows = None if up is None else _flat(up)
    written = _KnotReadout.apply(rows, up_rows, knot, amount, output.weight, output.bias, far, step)
    return cast(Tensor, written).view(*gate.shape[:-1], written.shape[-1])


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
            of_gate=torch.empty_like(_flat(gate)) if weight is None else through,
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


class _CompiledKnots(torch.autograd.Function):
    """c by the formula, which a compiler fuses. Derived by itself it would become a loop for each
    sum over tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        knot: Tensor,
        amount: Tensor,
        far: float | None,
        step: KnotStep,
    ) -> Tensor:
        ctx.save_for_backward(gate, up, knot, amount)
        ctx.far = far
        ctx.step = step
        return _compute_formula(gate, up, Knots(knot, amount, far)).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, knot, amount = ctx.saved_tensors
        of_pieces = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        of_gate, of_up, of_knot, of_amount = ctx.step.compiled_backward(
            _flat(gradients[0]),
            _flat(gate),
            None if up is None else _flat(up),
            knot,
            amount,
            ctx.far,
            of_pieces,
        )
        return (
            of_gate.view(gate.shape),
            None if up is None else of_up.view(up.shape),
            of_knot if of_pieces else None,
            of_amount if of_pieces else None,
            None,
            None,
        )


def _compute_formula(gate: Tensor, up: Tensor | None, knots: Knots) -> Tensor:
    """c, in float32 at least."""
    coefficients = sum_knots(to_at_least_float32(gate), knots.knot, knots.amount)
    if up is None or knots.far is None:
        return coefficients
    return coefficients * to_at_least_float32(up).clamp(-knots.far, knots.far)


def _differentiate_formula(
    gradient: Tensor,
    tensors: tuple[Tensor | None, ...],
    far: float | None,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The same, with a graph of their own."""
    gate, up, knot, amount, weight, bias = tensors
    assert gate is not None and knot is not None and amount is not None
    coefficients = _compute_formula(gate, up, Knots(knot, amount, far))
    output = coefficients.to(gradient.dtype)
    if weight is not None:
        of_output = None if bias is None else bias.to(gradient.dtype)
        output = nn.functional.linear(output, weight.to(gradient.dtype), of_output)
    inputs = [
        tensor for tensor, want in zip(tensors, wanted, strict=True) if want and tensor is not None
    ]
    found = iter(torch.autograd.grad(output, inputs, gradient, create_graph=True))
    return [next(found) if want else None for want in wanted]
