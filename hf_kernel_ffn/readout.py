"""The kernel-readout FFN, and the one record that everything reads: coefficients over a dictionary.

    κ_i(x) = κ(x, w_i) ≥ 0,   π = map(log κ / τ),   y = g(x) · Σ_i π_i v_i + b_out

(Bouhsine 2026, "The Readout is a Convex Combination of Prototypes"). With gated values, v_i is multiplied by
u_i·x. This file travels inside converted checkpoints: it imports nothing but torch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration import LayerConfig
from .kernels import get_kernel
from .simplex import shares, top_k_mask


class Readout(NamedTuple):
    """What one FFN (or attention head) wrote: ``output() = coefficients @ dictionary + bias``."""

    coefficients: Tensor
    """(..., prototypes). Nonnegative from a kernel readout with fixed values, signed otherwise."""
    dictionary: Tensor
    """(prototypes, hidden_size): output prototypes as rows."""
    bias: Tensor | None
    """(hidden_size,) written whatever fires."""
    shares: Tensor | None
    """(..., prototypes) π ≥ 0, summing to one, or to zero where nothing fires; None if the FFN defines none."""
    intensity: Tensor | None
    """(...) g ≥ 0 with coefficients = g·π (·u_i x); None if the FFN defines none."""
    names: tuple
    """The dictionary rows by name."""

    def output(self) -> Tensor:
        """(..., hidden_size): the FFN's output, as the record's own sum."""
        written = self.coefficients @ self.dictionary
        return written if self.bias is None else written + self.bias


class KernelFFN(nn.Module):
    """The FFN that replaces a teacher's. All matrices are ``nn.Linear`` modules, called as modules, so that
    adapters and quantisers see them.

    Weights: ``input_prototypes`` (prototypes, hidden_size) with b as its bias, ``output_prototypes`` (hidden_size,
    prototypes) with b_out as its bias, ``value_proj`` (gated values), ``gate`` (intensity gate), and one-element
    log-ratios to the layer's reference values. ``units`` holds, for each prototype, ±(1 + the teacher's unit).
    """

    def __init__(self, config: LayerConfig):
        super().__init__()
        settings = config.settings
        self.config = config
        self.kernel = get_kernel(settings.kernel)
        self.reference = dict(config.reference)
        size, prototypes = config.hidden_size, config.prototypes
        self.input_prototypes = nn.Linear(size, prototypes, bias=self.kernel.uses_bias)
        self.output_prototypes = nn.Linear(prototypes, size)
        if settings.values == "gated":
            self.value_proj = nn.Linear(size, prototypes)
        if settings.intensity == "gate":
            self.gate = nn.Linear(size, 1)
        learned = list(self.kernel.parameters)
        if settings.intensity == "mass":
            learned.append("scale")
        if not settings.coefficients_are_kernel:
            learned.append("temperature")
        self.log_ratio = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in learned})
        self.register_buffer("units", torch.zeros(prototypes, dtype=torch.int32))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to (..., hidden_size), in the dtype of the input."""
        coefficients = self.coefficients(hidden_states).to(hidden_states.dtype)
        return self.dropout(self.output_prototypes(coefficients))

    def coefficients(self, hidden_states: Tensor) -> Tensor:
        """(..., prototypes) in float32 (float64 for a float64 input): what multiplies the output prototypes."""
        if self.config.settings.coefficients_are_kernel:
            choice = self._kernel(hidden_states) * self.positive("scale")
        else:
            choice, intensity = self._choice(hidden_states)
            choice = choice if intensity is None else choice * intensity
        return self._values(hidden_states, choice)

    def readout(self, hidden_states: Tensor) -> Readout:
        """The record of this layer at ``hidden_states`` (..., hidden_size), coefficients in the dtype that mixes."""
        if self.config.settings.coefficients_are_kernel:
            choice = self._kernel(hidden_states) * self.positive("scale")
            intensity = choice.sum(-1, keepdim=True)
            pi = choice / intensity.where(intensity > 0, torch.ones_like(intensity))
        else:
            pi, intensity = self._choice(hidden_states)
            if intensity is None:
                intensity = (pi.sum(-1, keepdim=True) > 0).to(pi.dtype)
            choice = pi * intensity
        return Readout(
            coefficients=self._values(hidden_states, choice).to(hidden_states.dtype),
            dictionary=effective_weight(self.output_prototypes).T,
            bias=self.output_prototypes.bias,
            shares=pi,
            intensity=intensity.squeeze(-1),
            names=tuple(f"{abs(u) - 1}{'+' if u > 0 else '-'}" for u in self.units.tolist()),
        )

    def positive(self, name: str) -> Tensor:
        """A constrained value, ``reference · exp(learned log-ratio)`` > 0, shape (1,), at least float32."""
        ratio = self.log_ratio[name]
        return self.reference[name] * (ratio if ratio.dtype == torch.float64 else ratio.float()).exp()

    def scores(self, hidden_states):
        """s = x·w + b and, if the kernel asks for it, ‖x − w‖²."""
        score = _at_least_float32(self.input_prototypes(hidden_states))
        if not self.kernel.uses_distance:
            return score, None
        weight, bias = effective_weight(self.input_prototypes), self.input_prototypes.bias
        # From the weight in use at every call: a norm kept from earlier would be wrong after a step or an adapter.
        row2 = torch.linalg.vector_norm(weight, dim=-1, dtype=score.dtype).square()
        input2 = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=score.dtype).square()
        dot = score if bias is None else score - bias
        return score, (input2 + row2 - 2 * dot).clamp_min(0)

    def kernel_parameters(self):
        return {name: self.positive(name) for name in self.kernel.parameters}

    def _kernel(self, hidden_states):
        """κ over the support."""
        kernel = self.kernel.value(*self.scores(hidden_states), **self.kernel_parameters())
        if self.config.settings.simplex == "top-k":
            kernel = kernel * top_k_mask(kernel.detach(), self.config.settings.top_k)
        return kernel

    def _choice(self, hidden_states):
        """Shares π and the intensity g (..., 1), or None where g is one by definition."""
        settings = self.config.settings
        log_kernel = self.kernel.log(*self.scores(hidden_states), **self.kernel_parameters())
        pi = shares(settings.simplex, log_kernel, self.positive("temperature"), settings.top_k)
        if settings.intensity == "none":
            return pi, None
        if settings.intensity == "gate":
            gate = _at_least_float32(self.gate(hidden_states))
            return pi, nn.functional.softplus(gate) * self.reference["scale"]
        support = pi.detach() > 0
        finite = log_kernel.where(support, torch.zeros_like(log_kernel))
        return pi, ((finite.exp() * support).sum(-1, keepdim=True)) * self.positive("scale")

    def _values(self, hidden_states, choice):
        if self.config.settings.values == "fixed":
            return choice
        return choice * _at_least_float32(self.value_proj(hidden_states))


def effective_weight(linear: nn.Module) -> Tensor:
    """(out_features, in_features): the weight that ``linear`` multiplies by, adapters and quantisation included."""
    weight = linear.weight
    if type(linear) is nn.Linear and type(weight) in (nn.Parameter, Tensor):
        return weight
    if hasattr(linear, "get_delta_weight"):  # a peft adapter around the weight
        if linear.disable_adapters or linear.merged:
            return effective_weight(linear.get_base_layer())
        active = [name for name in linear.active_adapters if name in linear.lora_A]
        return effective_weight(linear.get_base_layer()) + sum(linear.get_delta_weight(name) for name in active)
    # Whatever else stands there (a quantised layer, a sharded weight): ask it what it does to the unit vectors.
    features = linear.in_features
    unit = torch.eye(features, device=weight.device, dtype=_compute_dtype(linear))
    rows = linear(unit)
    return (rows if linear.bias is None else rows - linear.bias).T


def _compute_dtype(linear):
    return linear.bias.dtype if linear.bias is not None and linear.bias.is_floating_point() else torch.get_default_dtype()


def _at_least_float32(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()
