"""Which form of a readout serves a call, and why the others do not.

All forms compute one function. The plain form serves every call and sees adapters, quantised
weights and hooks; each of the others is quicker on the calls that it can serve.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .compat import are_function_transforms_active
from .decode import has_fixed_shapes, is_one_token
from .kernels import Brownian, HalfYat, Yat
from .linears import is_plain

if TYPE_CHECKING:
    from .ffn import KernelFFN
    from .knots import KnotStep
    from .tied import TiedKernelFFN


class Form(Enum):
    """A way to compute a readout."""

    FUSED = "fused"
    """A dense Yat, or tied rows with knots, by Triton kernels: hf_kernel_ffn.gpu.fused."""
    FUSED_SUM = "fused sum"
    """Coefficients by the plain form, the sum over their output prototypes by a Triton kernel."""
    ONE_TOKEN = "one token"
    """A sparse readout at one token, by its active output prototypes alone: decode.py."""
    ONE_PASS = "one pass"
    """A dense Yat in chunks of tokens: one_pass.py; tied rows with knots: knots.py."""
    PLAIN = "plain"
    """Coefficients, and their product with the dictionary: ffn.py."""


class Plan(NamedTuple):
    """Which form serves a call."""

    form: Form
    reasons: dict[Form, str]
    """Why the forms before it do not, what was found and what is expected of each."""


class FusedKernels(Protocol):
    """What ``ffn.fused`` holds where a layer may run by Triton kernels."""

    def reason_against_readout(self, ffn: KernelFFN, hidden_states: Tensor) -> str | None:
        """Why they cannot compute the output of ``ffn``; None if they can.

        Raises:
            InputError: they are required, and can serve neither the readout nor the sum.
        """
        ...

    def reason_against_sum(self, ffn: KernelFFN, hidden_states: Tensor) -> str | None:
        """Why they cannot sum the output prototypes of ``ffn``; None if they can."""
        ...

    def readout(self, ffn: KernelFFN, hidden_states: Tensor) -> Tensor:
        """The output (..., hidden_size) before dropout."""
        ...

    def mixture(self, ffn: KernelFFN, coefficients: Tensor) -> Tensor:
        """Σ c_i v_i + b_out (..., hidden_size) from ``coefficients`` (..., prototypes)."""
        ...

    def reason_against_tied(self, ffn: TiedKernelFFN, hidden_states: Tensor) -> str | None:
        """Why they cannot serve ``ffn``, whose rows are tied; None if they can.

        Raises:
            InputError: they are required, and cannot.
        """
        ...

    def knot_step(self) -> KnotStep:
        """What they compute of tied rows with knots."""
        ...


def choose_form(ffn: KernelFFN, hidden_states: Tensor) -> Plan:
    """Which form serves ``ffn`` at ``hidden_states`` (..., hidden_size): the first that can."""
    reasons: dict[Form, str] = {}

    reason = reason_against_fused(ffn, hidden_states)
    if reason is None:
        return Plan(Form.FUSED, reasons)
    reasons[Form.FUSED] = reason

    reason = reason_against_fused_sum(ffn, hidden_states)
    if reason is None:
        return Plan(Form.FUSED_SUM, reasons)
    reasons[Form.FUSED_SUM] = reason

    reason = reason_against_one_token(ffn, hidden_states)
    if reason is None:
        return Plan(Form.ONE_TOKEN, reasons)
    reasons[Form.ONE_TOKEN] = reason

    reason = reason_against_one_pass(ffn, hidden_states)
    if reason is None:
        return Plan(Form.ONE_PASS, reasons)
    reasons[Form.ONE_PASS] = reason
    return Plan(Form.PLAIN, reasons)


def choose_tied_form(ffn: TiedKernelFFN, hidden_states: Tensor) -> Plan:
    """The same for a layer whose rows are tied."""
    reasons = {Form.FUSED: "no Triton kernels asked for"}
    if ffn.fused is not None:
        reason = ffn.fused.reason_against_tied(ffn, hidden_states)
        if reason is None:
            return Plan(Form.FUSED, {})
        reasons[Form.FUSED] = reason

    reason = reason_against_knots(ffn)
    if reason is None:
        return Plan(Form.ONE_PASS, reasons)
    reasons[Form.ONE_PASS] = reason
    return Plan(Form.PLAIN, reasons)


def reason_against_knots(ffn: TiedKernelFFN) -> str | None:
    """Why one elementwise step between the stock products does not serve ``ffn``; None if it does.

    Modules are called as modules there: adapters, quantised weights and hooks are seen.
    """
    settings = ffn.config.settings
    if type(ffn.kernel) is not Brownian:
        return f"kernel {settings.kernel!r}, expected 'brownian'"
    if ffn.training and ffn.config.hidden_dropout:
        return "dropout of hidden units, expected none or evaluation"
    if are_function_transforms_active():
        return "a transform of torch.func, expected none"
    return None


def reason_against_fused(ffn: KernelFFN, hidden_states: Tensor) -> str | None:
    """Why the Triton kernels do not compute the output; None if they do."""
    if ffn.fused is None:
        return "no Triton kernels asked for"
    return ffn.fused.reason_against_readout(ffn, hidden_states)


def reason_against_fused_sum(ffn: KernelFFN, hidden_states: Tensor) -> str | None:
    """Why the Triton kernels do not sum the output prototypes; None if they do."""
    if ffn.fused is None:
        return "no Triton kernels asked for"
    return ffn.fused.reason_against_sum(ffn, hidden_states)


def reason_against_one_token(ffn: KernelFFN | TiedKernelFFN, hidden_states: Tensor) -> str | None:
    """Why the output is not that of few output prototypes at one token; None if it is.

    Of tied rows it is the sum over the units that are kept, on a CPU.
    """
    simplex = ffn.config.settings.simplex
    if simplex == "softmax":
        return "simplex 'softmax', expected a sparse one"
    if not is_one_token(hidden_states):
        return "several tokens or gradients, expected one token without gradients"
    if ffn.training:
        return "training, expected evaluation"
    is_tied = ffn.config.settings.rows == "tied"
    if has_fixed_shapes(hidden_states) and (is_tied or simplex != "top-k"):
        return "a device or a compiler, expected a CPU where the number of prototypes varies"
    reason = reason_against_plain_weights([ffn.output_prototypes])
    if reason is not None:
        return reason
    if torch.is_autocast_enabled(hidden_states.device.type):
        return "autocast, expected none"
    if ffn.output_prototypes.weight.dtype != hidden_states.dtype:
        return "output prototypes of another dtype, expected that of the input"
    return None


def reason_against_one_pass(ffn: KernelFFN, hidden_states: Tensor) -> str | None:
    """Why one pass over chunks of tokens does not serve the call; None if it does."""
    device = hidden_states.device.type
    if is_one_token(hidden_states):
        return "one token, expected several: one has nothing to gain"
    if torch.compiler.is_compiling() and device != "cpu":
        return "a compiler on a device, which makes one pass of the plain form by itself"
    reason = reason_against_dense_yat(ffn)
    if reason is not None:
        return reason
    if not torch.is_autocast_enabled(device):
        for linear in linears_of(ffn):
            if linear.weight.dtype != hidden_states.dtype:
                return "weights of another dtype, expected that of the input"
    return None


def reason_against_dense_yat(ffn: KernelFFN) -> str | None:
    """Why ``ffn`` is not a dense Yat readout of plain weights; None if it is.

    One pass and the Triton kernels serve such readouts alone.
    """
    settings = ffn.config.settings
    if settings.simplex != "softmax":
        return f"simplex {settings.simplex!r}, expected 'softmax'"
    if type(ffn.kernel) not in (Yat, HalfYat):
        return f"kernel {settings.kernel!r}, expected 'yat' or 'half-yat'"
    if settings.intensity == "mass" and not settings.coefficients_are_kernel:
        return f"intensity 'mass' at temperature {settings.temperature}, expected temperature 1"
    if ffn.training and ffn.config.hidden_dropout:
        return "dropout of hidden units, expected none or evaluation"
    if are_function_transforms_active():
        return "a transform of torch.func, expected none"
    return reason_against_plain_weights(linears_of(ffn))


def reason_against_plain_weights(linears: Sequence[nn.Module]) -> str | None:
    """Why the weights and biases of ``linears`` may not be read past them; None if they may."""
    for linear in linears:
        if not is_plain(linear) or linear.bias is None:
            return (
                "an adapter, quantised weight, offloading, hook or missing bias, "
                "expected plain linear modules"
            )
    return None


def linears_of(ffn: KernelFFN) -> list[nn.Linear]:
    """The linear modules of a dense readout; the gate, which is called as a module, aside."""
    linears = [ffn.input_prototypes, ffn.output_prototypes]
    if ffn.config.settings.values == "gated":
        linears.append(ffn.value_proj)
    return linears
