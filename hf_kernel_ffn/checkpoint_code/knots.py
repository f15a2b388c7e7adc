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
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .kernels import get_kernel
from .linears import is_plain
from .parameters import LOG_RATIO_BOUND, scale_reference, to_at_least_float32

if TYPE_CHECKING:
    from .tied import TiedKernelFFN


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


def mix_knots(ffn: TiedKernelFFN, hidden_states: Tensor, step: KnotStep) -> Tensor:
    """The output (..., hidden_size) of ``ffn`` before dropout; plan.py says when it may be asked.

    Where the output prototypes are a plain linear module, c is not kept for their gradient.
    """
    output = ffn.output_prototypes
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not is_plain(output):
        return output(mix_knot_coefficients(ffn, hidden_states, step))
    return _read_out(ffn, hidden_states, step, output.weight, output.bias)


def mix_knot_coefficients(ffn: TiedKernelFFN, hidden_states: Tensor, step: KnotStep) -> Tensor:
    """c (..., units) of all units, in the dtype of the scores; see :func:`mix_knots`."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _read_out(ffn, hidden_states, step, None, None)
    gate = ffn.input_prototypes(hidden_states)
    up = ffn.value_proj(hidden_states) if ffn.multiplies_by_up else None
    if not torch.compiler.is_compiling():
        return step.forward(gate, up, ffn.kept_knots.get(ffn))
    far = None if up is None else ffn.config.reference["far"]
    knot = ffn.get_piece_tensor("knot")
    amount = ffn.get_piece_tensor("amount") * ffn.positive("scale")
    return _CompiledKnots.apply(gate, up, knot, amount, far, step)  # type: ignore[no-any-return]


def _read_out(
    ffn: TiedKernelFFN,
    hidden_states: Tensor,
    step: KnotStep,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The mixture over the columns of ``weight``, or c without one, with gradients."""
    ffn.kept_knots.forget()
    gate = ffn.input_prototypes(hidden_states)
    up = ffn.value_proj(hidden_states) if ffn.multiplies_by_up else None
    far = None if up is None else ffn.config.reference["far"]
    inputs = [
        gate,
        up,
        ffn.get_stored_piece_tensor("knot"),
        ffn.get_stored_piece_tensor("amount"),
        ffn.get_log_ratio("scale"),
    ]
    constants = _Constants(ffn.config.reference["scale"], far, step)
    return _KnotReadout.apply(*inputs, weight, bias, constants)  # type: ignore[no-any-return]


def flatten_tokens(tensor: Tensor) -> Tensor:
    """``tensor`` (..., units) as (tokens, units), contiguous."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


class _Constants(NamedTuple):
    """What a readout is computed with beside its tensors."""

    scale: float
    """The reference of the scale."""
    far: float | None
    step: KnotStep


class _Inputs(NamedTuple):
    """The tensors of a readout that may have gradients, as a layer has them."""

    gate: Tensor
    up: Tensor | None
    knot: Tensor
    """(pieces, units) of any dtype."""
    amount: Tensor
    """The same, without the scale."""
    log_scale: Tensor
    """(1,) log-ratio of the scale to its reference."""
    weight: Tensor | None
    bias: Tensor | None


class _KnotReadout(torch.autograd.Function):
    """c · Vᵀ + b_out, or c without V, by way of a :class:`KnotStep`.

    The amounts are scaled and cast in here, where no operation leaves a node of its own.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, constants = arguments
        inputs = _Inputs(*tensors)
        knot = to_at_least_float32(inputs.knot)
        scale = scale_reference(constants.scale, inputs.log_scale)
        amount = inputs.amount * scale  # in the dtype of the wider one: float32 at least
        ctx.save_for_backward(*tensors, scale, amount)
        ctx.constants = constants

        knots = Knots(knot, amount, constants.far)
        coefficients: Tensor = constants.step.forward(inputs.gate, inputs.up, knots)
        if inputs.weight is None:
            return coefficients
        return nn.functional.linear(coefficients, inputs.weight, inputs.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, scale, amount = ctx.saved_tensors
        inputs = _Inputs(*tensors)
        wanted = ctx.needs_input_grad[: len(inputs)]
        device = inputs.gate.device.type
        is_cast = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if is_cast else nullcontext():
            if torch.is_grad_enabled():
                found = _differentiate_formula(gradients[0], inputs, ctx.constants, wanted)
            else:
                found = _differentiate(
                    gradients[0], inputs, ctx.constants, wanted, scale=scale, amount=amount
                )
        return (*found, None)


def _differentiate(
    gradient: Tensor,
    inputs: _Inputs,
    constants: _Constants,
    wanted: tuple[bool, ...],
    *,
    scale: Tensor,
    amount: Tensor,
) -> list[Tensor | None]:
    """Gradients of ``inputs`` by that of the output; None if not wanted.

    ``scale`` (1,) and the scaled ``amount`` (pieces, units) are those of the forward pass.
    """
    gate, up, knot, _, log_scale, weight, bias = inputs
    flat = flatten_tokens(gradient)
    through = flat if weight is None else flat @ weight.to(flat.dtype)
    of_pieces = wanted[2] or wanted[3] or wanted[4]

    of_bias = flat.sum(0).to(bias.dtype) if bias is not None and wanted[6] else None
    if not any(wanted[:6]):
        return [None, None, None, None, None, None, of_bias]

    flat_gate = flatten_tokens(gate)
    found = constants.step.backward(
        through,
        flat_gate,
        None if up is None else flatten_tokens(up),
        Knots(to_at_least_float32(knot), amount, constants.far),
        of_gate=torch.empty_like(flat_gate) if weight is None else through,
        of_pieces=of_pieces,
    )

    of_weight = None
    if weight is not None and wanted[5]:
        of_weight = (flat.T @ found.coefficients.to(flat.dtype)).to(weight.dtype)

    of_amount = None
    of_log_scale = None
    if found.amount is not None and wanted[3]:
        of_amount = found.amount * scale
    if found.amount is not None and wanted[4]:
        is_beyond = log_scale.abs() > LOG_RATIO_BOUND
        of_log_scale = (found.amount * amount).sum().masked_fill(is_beyond, 0.0)

    of_up = None if up is None or found.up is None else found.up.view(up.shape)
    every = [
        found.gate.view(gate.shape),
        of_up,
        found.knot,
        of_amount,
        of_log_scale,
        of_weight,
        of_bias,
    ]
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
            flatten_tokens(gradients[0]),
            flatten_tokens(gate),
            None if up is None else flatten_tokens(up),
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
    inputs: _Inputs,
    constants: _Constants,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The same, with a graph of their own."""
    knot = to_at_least_float32(inputs.knot)
    amount = inputs.amount * scale_reference(constants.scale, inputs.log_scale)
    coefficients = _compute_formula(inputs.gate, inputs.up, Knots(knot, amount, constants.far))
    output = coefficients.to(gradient.dtype)
    if inputs.weight is not None:
        of_output = None if inputs.bias is None else inputs.bias.to(gradient.dtype)
        output = nn.functional.linear(output, inputs.weight.to(gradient.dtype), of_output)
    leaves = [
        tensor for tensor, want in zip(inputs, wanted, strict=True) if want and tensor is not None
    ]
    found = iter(torch.autograd.grad(output, leaves, gradient, create_graph=True))
    return [next(found) if want else None for want in wanted]
