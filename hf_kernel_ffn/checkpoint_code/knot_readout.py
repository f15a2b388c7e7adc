"""A readout of tied rows with knots, forward and backward, by one elementwise step.

Only g and u are kept for the backward pass, in their own dtype: c and all of f are computed again;
knots.py has the formulas.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .knots import Knots, KnotStep, compute_coefficients, flatten_tokens
from .linears import is_plain
from .parameters import LOG_RATIO_BOUND, scale_reference, to_at_least_float32

if TYPE_CHECKING:
    from .tied import TiedKernelFFN


def mix_knots(ffn: TiedKernelFFN, hidden_states: Tensor, step: KnotStep) -> Tensor:
    """The output (..., hidden_size) of ``ffn`` before dropout; plan.py says when it may be asked.

    Where the output prototypes are a plain linear module, c is not kept for their gradient.
    """
    output = ffn.output_prototypes
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not is_plain(output):
        return output(mix_knot_coefficients(ffn, hidden_states, step))
    # Of tokens in one row, so that what is returned is no view made inside of the function: some
    # blocks (Falcon's) add to what their FFN returned, in place.
    rows = hidden_states.flatten(0, -2)
    written = _read_out(ffn, rows, step, output.weight, output.bias)
    return written.view(*hidden_states.shape[:-1], written.shape[-1])


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
        return compute_coefficients(gate, up, Knots(knot, amount, far)).to(gate.dtype)

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


def _differentiate_formula(
    gradient: Tensor,
    inputs: _Inputs,
    constants: _Constants,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The same, with a graph of their own."""
    knot = to_at_least_float32(inputs.knot)
    amount = inputs.amount * scale_reference(constants.scale, inputs.log_scale)
    coefficients = compute_coefficients(inputs.gate, inputs.up, Knots(knot, amount, constants.far))
    output = coefficients.to(gradient.dtype)
    if inputs.weight is not None:
        of_output = None if inputs.bias is None else inputs.bias.to(gradient.dtype)
        output = nn.functional.linear(output, inputs.weight.to(gradient.dtype), of_output)
    leaves = [
        tensor for tensor, want in zip(inputs, wanted, strict=True) if want and tensor is not None
    ]
    found = iter(torch.autograd.grad(output, leaves, gradient, create_graph=True))
    return [next(found) if want else None for want in wanted]
