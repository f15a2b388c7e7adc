"""The kernel-readout FFN, and the one record that everything reads: coefficients over a dictionary.

    κ_i(x) = κ(x, w_i) ≥ 0,   π = map(log κ / τ),   y = g(x) · Σ_i π_i v_i + b_out

(Bouhsine 2026, "The Readout is a Convex Combination of Prototypes"). With gated values, v_i is multiplied by
u_i·x. This file travels inside converted checkpoints: it imports nothing but torch.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import HalfYat, Yat, get_kernel
from .linears import get_effective_weight, is_plain, lay_out_by_prototypes
from .one_pass import one_token, yat_mixture
from .record import Readout
from .settings import LayerConfig
from .simplex import compute_shares, top_k_mask

LOG_RATIO_BOUND = 20.0
"""Learned log-ratios act as if no further from zero than this: no step, however wild, makes a constrained value 0 or ∞."""
ACTIVATION_BYTES = 2**28
"""What a layer's temporaries, and what it keeps for its backward pass, may take each: more tokens are read in chunks, and their
scores computed again."""
EXACT = (torch.float32, torch.float64)
"""dtypes in which scores are computed as they stand."""


class KernelFFN(nn.Module):
    """The FFN that replaces a teacher's. All matrices are ``nn.Linear`` modules, called as modules, so that
    adapters and quantisers see them.

    Weights: ``input_prototypes`` (prototypes, hidden_size) with b as its bias, ``output_prototypes`` (hidden_size,
    prototypes) with b_out as its bias, ``value_proj`` (gated values), ``gate`` (intensity gate), and one-element
    log-ratios to the layer's reference values (a buffer, for the threshold). ``units`` holds, for each prototype, ±(1 + the teacher's unit).
    """

    units: Tensor
    threshold_log_ratio: Tensor

    def __init__(self, config: LayerConfig):
        super().__init__()
        settings = config.settings
        self.config = config
        self.kernel = get_kernel(settings.kernel)
        self.reference = dict(config.reference)
        self.top_k = settings.top_k
        self.activation_bytes = ACTIVATION_BYTES
        self.fused: Any = None
        """What is asked first whether it runs this layer: hf_kernel_ffn.gpu.fused.fuse() puts its Triton kernels here."""
        self.keep_norms = False
        """Whether decoding reuses ‖w‖² while the weight is the same, so that it reads W_in once per token."""
        self._norms: tuple | None = None
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
        if settings.simplex == "threshold":  # moved by fit_threshold(), not by gradients
            self.register_buffer("threshold_log_ratio", torch.zeros(1))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to (..., hidden_size), in the dtype of the input."""
        if self.fused is not None:
            written = self.fused.readout(self, hidden_states)
            if written is not None:
                return self.dropout(written)
        elif self._decodes_sparsely(hidden_states):
            return self._decode(hidden_states)
        if self._has_one_pass(hidden_states):
            return self.dropout(self._one_pass(hidden_states))
        coefficients = self.coefficients(hidden_states).to(hidden_states.dtype)
        coefficients = nn.functional.dropout(
            coefficients, self.config.hidden_dropout, self.training
        )
        return self.dropout(self._mix(coefficients))

    def coefficients(self, hidden_states: Tensor) -> Tensor:
        """(..., prototypes) in float32 (float64 for a float64 input): what multiplies the output prototypes."""
        ups = self._ups(hidden_states)
        if self.config.settings.coefficients_are_kernel:
            choice = self._scaled_kernel(hidden_states, ups)
        else:
            choice, intensity = self._choice(hidden_states, ups)
            choice = choice if intensity is None else choice * intensity
        return choice if ups is None else choice * ups

    def readout(self, hidden_states: Tensor) -> Readout:
        """The record of this layer at ``hidden_states`` (..., hidden_size), coefficients in the dtype that mixes."""
        ups = self._ups(hidden_states)
        if self.config.settings.coefficients_are_kernel:
            choice = self._scaled_kernel(hidden_states, ups)
            intensity = choice.sum(-1, keepdim=True)
            pi = choice / intensity.where(intensity > 0, torch.ones_like(intensity))
        else:
            pi, intensity = self._choice(hidden_states, ups)
            if intensity is None:
                intensity = (pi.sum(-1, keepdim=True) > 0).to(pi.dtype)
            choice = pi * intensity
        dictionary, bias = get_effective_weight(self.output_prototypes, hidden_states)
        return Readout(
            coefficients=(choice if ups is None else choice * ups).to(hidden_states.dtype),
            dictionary=dictionary.T,
            bias=bias,
            shares=pi,
            intensity=intensity.squeeze(-1),
            names=_names(self.units.tolist()),
        )

    def positive(self, name: str) -> Tensor:
        """A constrained value, ``reference · exp(learned log-ratio)`` > 0, shape (1,), at least float32."""
        return (
            self.reference[name]
            * _at_least_float32(self.log_ratio[name]).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        )

    def log_positive(self, name: str) -> Tensor:
        """Its logarithm, also where the value itself is too small or too large for float32."""
        return math.log(self.reference[name]) + _at_least_float32(self.log_ratio[name]).clamp(
            -LOG_RATIO_BOUND, LOG_RATIO_BOUND
        )

    def scores(self, hidden_states):
        """s = x·w + b and, if the kernel asks for it, ‖x − w‖², in float32 at least."""
        # From the weight in use at every call: a norm kept from earlier would be wrong after a step or an adapter.
        weight, bias = get_effective_weight(self.input_prototypes, hidden_states)
        device = hidden_states.device.type
        rounded = (
            hidden_states.dtype.itemsize < 4
            or weight.dtype.itemsize < 4
            or torch.is_autocast_enabled(device)
        )
        if (
            not rounded
            and self.kernel.uses_distance
            and _one_token(hidden_states)
            and is_plain(self.input_prototypes)
        ):
            dot, x = nn.functional.linear(hidden_states, weight), hidden_states.flatten()
            distance = torch.add(self._squares(weight), x @ x).sub(dot, alpha=2).clamp_min(0)
            return (dot if bias is None else dot + bias), distance
        with torch.autocast(device, enabled=False):
            x, weight = _at_least_float32(hidden_states), _at_least_float32(weight)
            if (
                rounded
            ):  # a product rounded to half precision overflows, or leaves noise of a small distance
                dot = nn.functional.linear(x, weight)
                score = dot if bias is None else dot + bias
            else:
                score = self.input_prototypes(x)
                dot = score if bias is None else score - bias
            if not self.kernel.uses_distance:
                return score, None
            return score, (
                x.square().sum(-1, keepdim=True) + weight.square().sum(-1) - 2 * dot
            ).clamp_min(0)

    def _squares(self, weight):
        """‖w‖² (prototypes,); with ``keep_norms``, that of an earlier call if the weight is still the same: its memory, its version
        counter and a number of every row, since what merges an adapter into ``weight.data`` leaves the counter as it was."""
        if not self.keep_norms or torch.compiler.is_compiling() or weight.is_inference():
            return torch.linalg.vector_norm(weight, dim=-1).square()
        version, sample = (
            (weight._version, weight.shape, weight.dtype),
            weight[:, weight.shape[1] // 2],
        )
        if self._norms is not None:
            held, same, few, squares = self._norms
            if (
                held.data_ptr() == weight.data_ptr()
                and same == version
                and torch.equal(few, sample)
            ):
                return squares
        squares = torch.linalg.vector_norm(weight, dim=-1).square()
        self._norms = (
            weight.detach(),
            version,
            sample.clone(),
            squares,
        )  # held, so that no other weight can come to lie there
        return squares

    def __getstate__(self):
        return {**vars(self), "_norms": None}  # the version counter of a copy starts anew

    def kernel_parameters(self):
        return {name: self.positive(name) for name in self.kernel.parameters}

    @torch.no_grad()
    def fit_threshold(self, hidden_states: Tensor, rate: float = 1.0) -> None:
        """Move the threshold of κ by the share ``rate`` of the way (of its logarithm) to where ``top_k`` prototypes pass on
        average over the tokens of ``hidden_states`` (..., hidden_size)."""
        log_kernel = self.kernel.log(*self.scores(hidden_states), **self.kernel_parameters())
        loudness = self._log_loudness(log_kernel, hidden_states).flatten(0, -2)
        firing = int((loudness > -torch.inf).sum())
        passing = min(
            (self.top_k or 0) * len(loudness), firing
        )  # those that do not fire set no limit
        if passing:
            last = loudness.flatten().kthvalue(loudness.numel() - passing + 1).values - math.log(
                self.reference["threshold"]
            )
            self.threshold_log_ratio.add_(
                rate * (last.to(self.threshold_log_ratio.dtype) - self.threshold_log_ratio)
            )

    def log_threshold(self) -> Tensor:
        """The log κ from which on a prototype takes part, shape (1,), at least float32."""
        return math.log(self.reference["threshold"]) + _at_least_float32(self.threshold_log_ratio)

    def threshold(self) -> Tensor:
        """The κ from which on a prototype takes part, shape (1,), at least float32."""
        return self.log_threshold().exp()

    def _has_one_pass(self, hidden_states) -> bool:
        """Whether the layer at ``hidden_states`` is a dense Yat readout of plain weights. Adapters, quantised weights and hooks are
        seen by the plain form alone; a compiler makes one pass of that by itself on a device; one token has nothing to gain."""
        settings, dtype = self.config.settings, hidden_states.dtype
        linears = [
            self.input_prototypes,
            self.output_prototypes,
            *([self.value_proj] if settings.values == "gated" else []),
        ]
        return (
            settings.simplex == "softmax"
            and (settings.coefficients_are_kernel or settings.intensity != "mass")
            and type(self.kernel) in (Yat, HalfYat)
            and not (self.training and self.config.hidden_dropout)
            and not (torch.compiler.is_compiling() and hidden_states.device.type != "cpu")
            and not torch._C._are_functorch_transforms_active()
            and not _one_token(hidden_states)
            and all(is_plain(linear) and linear.bias is not None for linear in linears)
            and (
                torch.is_autocast_enabled(hidden_states.device.type)
                or all(linear.weight.dtype == dtype for linear in linears)
            )
        )

    def _one_pass(self, hidden_states):
        device = hidden_states.device.type
        mix = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else hidden_states.dtype
        )
        up = self.value_proj if self.config.settings.values == "gated" else None
        first, second = self.input_prototypes, self.output_prototypes
        convex = not self.config.settings.coefficients_are_kernel
        written = yat_mixture(
            hidden_states.reshape(-1, hidden_states.shape[-1]), first.weight, first.bias, second.weight, self.positive("epsilon"),
            self.positive("temperature" if convex else "scale"), None if up is None else up.weight, None if up is None else up.bias,
            type(self.kernel) is HalfYat, mix, self.activation_bytes, convex,
        ).view(hidden_states.shape)  # fmt: skip
        if self.config.settings.intensity == "gate":
            written = (written * self._gate(hidden_states)).to(mix)
        return written + second.bias.to(mix)

    def _decodes_sparsely(self, hidden_states) -> bool:
        """Whether it is one token of which a few kernel values are the coefficients, on a CPU, where shapes may depend on the data."""
        settings = self.config.settings
        return (
            _one_token(hidden_states)
            and settings.sparse
            and settings.coefficients_are_kernel
            and not self.training
            and not _fixed(hidden_states)
            and self._reads_columns(hidden_states)
        )

    def _reads_columns(self, x) -> bool:
        """Whether the output prototypes are a plain matrix in the dtype of ``x``, of which some columns may be read alone."""
        linear = self.output_prototypes
        plain = is_plain(linear) and linear.bias is not None
        return (
            plain
            and linear.weight.dtype == x.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _decode(self, hidden_states):
        ups, first = self._ups(hidden_states), self.input_prototypes
        if (
            type(self.kernel) in (Yat, HalfYat)
            and is_plain(first)
            and first.weight.dtype == hidden_states.dtype in EXACT
        ):
            log_scale = self.log_positive("scale")
            kernel = one_token(
                hidden_states.flatten(), first.weight, first.bias, self._squares(first.weight), self.positive("epsilon").item(),
                log_scale.exp().item(), type(self.kernel) is HalfYat,
            )  # fmt: skip
            least = self._least(log_scale)
            loudness = kernel if ups is None else kernel * ups.flatten().abs()
        else:
            kernel, loudness, least = self._kernel_and_loudness(hidden_states, ups)
            loudness = loudness.flatten()
        if least is None:
            active = loudness.topk(min(self.top_k, len(loudness)), sorted=False).indices
        else:
            active = (loudness >= least).nonzero()[:, 0]
        choice = kernel.flatten().index_select(0, active)
        choice = choice if ups is None else choice * ups.flatten().index_select(0, active)
        return self._written(choice.to(hidden_states.dtype), active).view(hidden_states.shape)

    def _mix(self, coefficients):
        """Σ_i c_i v_i + b_out. For one token without gradients, only the output prototypes with c_i ≠ 0 are read."""
        if self.fused is not None:
            written = self.fused.mixture(self, coefficients)
            if written is not None:
                return written
        simplex, fixed = self.config.settings.simplex, _fixed(coefficients)
        if simplex == "softmax" or (fixed and simplex != "top-k"):
            return self.output_prototypes(coefficients)
        if not (_one_token(coefficients) and self._reads_columns(coefficients)):
            return self.output_prototypes(coefficients)
        flat = coefficients.flatten()
        active = (
            flat.abs().topk(min(self.top_k, len(flat)), sorted=False).indices
            if fixed
            else flat.nonzero()[:, 0]
        )
        return self._written(flat[active], active).view(*coefficients.shape[:-1], -1)

    def _written(self, coefficients, active):
        """(hidden_size,) by the output prototypes ``active``, with ``coefficients`` (n,) each."""
        linear = self.output_prototypes
        if 4 * len(active) > linear.in_features:  # then all of them are sooner read
            return linear(
                coefficients.new_zeros(linear.in_features).index_copy(0, active, coefficients)
            )
        if not (_fixed(coefficients) or self.training or linear.weight.T.is_contiguous()):
            lay_out_by_prototypes(linear)
        return torch.addmv(linear.bias, linear.weight.T.index_select(0, active).T, coefficients)

    def _gate(self, hidden_states):
        """The learned intensity (..., 1)."""
        return (
            nn.functional.softplus(_at_least_float32(self.gate(hidden_states)))
            * self.reference["scale"]
        )

    def _ups(self, hidden_states):
        """u·x (..., prototypes), or None where the output prototypes are fixed."""
        return (
            _at_least_float32(self.value_proj(hidden_states))
            if self.config.settings.values == "gated"
            else None
        )

    def _scaled_kernel(self, hidden_states, ups):
        """scale · κ over the support."""
        kernel, loudness, least = self._kernel_and_loudness(hidden_states, ups)
        if not self.config.settings.sparse:
            return kernel
        return kernel * (top_k_mask(loudness, self.top_k) if least is None else loudness >= least)

    def _kernel_and_loudness(self, hidden_states, ups):
        """scale · κ; what decides which prototypes a sparse map keeps: that, or |scale · κ u·x| with gated values; and the least of it
        that is kept, or None where a number of them is."""
        log_scale = self.log_positive("scale")
        kernel = self.kernel.scaled(
            *self.scores(hidden_states), log_scale, **self.kernel_parameters()
        )
        return (
            kernel,
            (kernel if ups is None else kernel * ups.abs()).detach(),
            self._least(log_scale),
        )

    def _least(self, log_scale):
        return (
            (self.log_threshold() + log_scale).exp()
            if self.config.settings.simplex == "threshold"
            else None
        )

    def _log_loudness(self, log_kernel, hidden_states, ups=None):
        """log κ, or log |κ u·x| with gated values: a light-tailed kernel is 0 in float32 far from every prototype, and still has a
        nearest one."""
        ups = self._ups(hidden_states) if ups is None else ups
        return (
            log_kernel.detach() if ups is None else log_kernel.detach() + ups.detach().abs().log()
        )

    def _choice(self, hidden_states, ups):
        """Shares π and the intensity g (..., 1), or None where g is one by definition."""
        settings = self.config.settings
        log_kernel = self.kernel.log(*self.scores(hidden_states), **self.kernel_parameters())
        if settings.sparse:
            loudness = self._log_loudness(log_kernel, hidden_states, ups)
            if settings.simplex == "threshold":
                kept = loudness >= self.log_threshold()
            else:
                kept = top_k_mask(loudness, self.top_k)
            log_kernel = log_kernel.masked_fill(~kept, -torch.inf)
        pi = compute_shares(settings.simplex, log_kernel, self.positive("temperature"), self.top_k)
        if settings.intensity == "none":
            return pi, None
        if settings.intensity == "gate":
            return pi, self._gate(hidden_states)
        support = pi.detach() > 0
        finite = log_kernel.where(support, torch.zeros_like(log_kernel)) + self.log_positive(
            "scale"
        )
        return pi, (finite.exp() * support).sum(-1, keepdim=True)


def _one_token(hidden_states) -> bool:
    """Whether this is decoding: one token, no gradients."""
    return hidden_states.numel() == hidden_states.shape[-1] and not torch.is_grad_enabled()


def _fixed(tensor) -> bool:
    """Whether a shape that depends on the data costs: it waits for a device, and a compiler starts anew."""
    return torch.compiler.is_compiling() or tensor.device.type != "cpu"


def _names(units: list) -> tuple:
    """``17+`` and ``17-`` by the teacher's unit and the sign of its column; a second piece of the same is ``17+.2``."""
    seen: dict = {}
    names = []
    for unit in units:
        name = f"{abs(unit) - 1}{'+' if unit > 0 else '-'}"
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return tuple(names)


def _at_least_float32(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()
