"""The kernel-readout FFN.

    κ_i(x) = κ(x, w_i) ≥ 0,   π = map(log κ / τ),   y = g(x) · Σ_i π_i v_i + b_out

(Bouhsine 2026, "The Readout is a Convex Combination of Prototypes"). With gated values, v_i is
multiplied by u_i·x. The plain form of all this is here; plan.py says which quicker form of the
same function serves a call.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from .decode import RowNorms, decode_token, is_one_token, score_token
from .layer_config import LayerConfig
from .linears import get_effective_weight, is_plain
from .one_pass import mix_dense_yat
from .parameters import ReadoutParameters, to_at_least_float32
from .plan import Form, FusedKernels, choose_form
from .record import Readout
from .simplex import compute_shares, top_k_mask

ACTIVATION_BYTES = 2**28
"""What a layer's temporaries, and what it keeps for its backward pass, may take each.

More tokens are read in chunks, and their scores computed again.
"""


class KernelFFN(ReadoutParameters):
    """The FFN that replaces a teacher's: its parameters are those of :class:`ReadoutParameters`.

    Quicker forms, adapters and quantisers leave the function as it stands here.
    """

    def __init__(self, config: LayerConfig):
        super().__init__(config)
        self.activation_bytes = ACTIVATION_BYTES
        self.fused: FusedKernels | None = None
        """Triton kernels that may serve this layer, put here by hf_kernel_ffn.gpu.fused.fuse()."""
        self.keep_norms = False
        """Whether decoding reuses ‖w‖² while the weight is the same, and reads W_in once."""
        self._row_norms = RowNorms()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to (..., hidden_size), in the dtype of the input."""
        form = choose_form(self, hidden_states).form
        if form is Form.FUSED and self.fused is not None:
            return self.dropout(self.fused.readout(self, hidden_states))
        if form is Form.ONE_TOKEN:
            return self.dropout(decode_token(self, hidden_states))
        if form is Form.ONE_PASS:
            return self.dropout(mix_dense_yat(self, hidden_states))

        coefficients = self.coefficients(hidden_states).to(hidden_states.dtype)
        coefficients = nn.functional.dropout(
            coefficients, self.config.hidden_dropout, self.training
        )
        if form is Form.FUSED_SUM and self.fused is not None:
            return self.dropout(self.fused.mixture(self, coefficients))
        return self.dropout(self.output_prototypes(coefficients))

    def coefficients(self, hidden_states: Tensor) -> Tensor:
        """What multiplies the output prototypes: g · π_i, times u_i·x for gated values.

        (..., prototypes) in float32; in float64 for a float64 input.
        """
        ups = self.compute_ups(hidden_states)
        if self.config.settings.coefficients_are_kernel:
            mixture = self._scaled_kernel(hidden_states, ups)
        else:
            shares, intensity = self._shares_and_intensity(hidden_states, ups)
            mixture = shares if intensity is None else shares * intensity
        return mixture if ups is None else mixture * ups

    def readout(self, hidden_states: Tensor) -> Readout:
        """The record of this layer at ``hidden_states`` (..., hidden_size).

        Its coefficients have the dtype in which they are mixed, that of the input.
        """
        ups = self.compute_ups(hidden_states)
        if self.config.settings.coefficients_are_kernel:
            mixture = self._scaled_kernel(hidden_states, ups)
            intensity = mixture.sum(-1, keepdim=True)
            shares = mixture / intensity.where(intensity > 0, torch.ones_like(intensity))
        else:
            shares, gate_or_mass = self._shares_and_intensity(hidden_states, ups)
            if gate_or_mass is None:
                intensity = (shares.sum(-1, keepdim=True) > 0).to(shares.dtype)
            else:
                intensity = gate_or_mass
            mixture = shares * intensity

        coefficients = mixture if ups is None else mixture * ups
        dictionary, bias = get_effective_weight(self.output_prototypes, hidden_states)
        return Readout(
            coefficients=coefficients.to(hidden_states.dtype),
            dictionary=dictionary.T,
            bias=bias,
            shares=shares,
            intensity=intensity.squeeze(-1),
            names=_name_units(self.units.tolist()),
        )

    def scores(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """s = x·w + b and, if the kernel asks for it, ‖x − w‖²: (..., prototypes) each.

        In float32; in float64 if the input or the weight is.
        """
        # From the weight in use at every call: a norm kept from earlier would be wrong after a
        # step or an adapter.
        weight, bias = get_effective_weight(self.input_prototypes, hidden_states)
        device = hidden_states.device.type
        rounded = (
            hidden_states.dtype.itemsize < 4
            or weight.dtype.itemsize < 4
            or torch.is_autocast_enabled(device)
        )
        exact_token = not rounded and is_one_token(hidden_states)
        if self.kernel.uses_distance and exact_token and is_plain(self.input_prototypes):
            return score_token(hidden_states, weight, bias, self.square_norms(weight))

        with torch.autocast(device, enabled=False):
            x = to_at_least_float32(hidden_states)
            weight = to_at_least_float32(weight)
            if rounded:
                # A product rounded to half precision overflows, or leaves noise of a small
                # distance.
                dot = nn.functional.linear(x, weight)
                score = dot if bias is None else dot + bias
            else:
                score = self.input_prototypes(x)
                dot = score if bias is None else score - bias
            if not self.kernel.uses_distance:
                return score, None
            squared_norms = x.square().sum(-1, keepdim=True) + weight.square().sum(-1)
            return score, (squared_norms - 2 * dot).clamp_min(0)

    def square_norms(self, weight: Tensor) -> Tensor:
        """‖w‖² (prototypes,) of ``weight``, reused from the last token with ``keep_norms``."""
        return self._row_norms.compute(weight, self.keep_norms)

    def compute_ups(self, hidden_states: Tensor) -> Tensor | None:
        """u·x (..., prototypes), or None where the output prototypes are fixed."""
        if self.config.settings.values != "gated":
            return None
        return to_at_least_float32(self.value_proj(hidden_states))

    def gate_intensity(self, hidden_states: Tensor) -> Tensor:
        """The learned intensity g (..., 1) of a layer with an intensity gate."""
        loudness = nn.functional.softplus(to_at_least_float32(self.gate(hidden_states)))
        return loudness * self.config.reference["scale"]

    @torch.no_grad()
    def fit_threshold(self, hidden_states: Tensor, rate: float = 1.0) -> None:
        """Move the threshold of κ toward where ``top_k`` prototypes pass on average.

        Args:
            hidden_states: (..., hidden_size) tokens over which the average is taken.
            rate: the share of the way, in its logarithm.
        """
        log_kernel = self.kernel.log(*self.scores(hidden_states), **self.kernel_parameters())
        loudness = _log_loudness(log_kernel, self.compute_ups(hidden_states))
        self.move_threshold(loudness.flatten(0, -2), rate)

    def kernel_and_loudness(
        self, hidden_states: Tensor, ups: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What a readout whose coefficients are the kernel is made of.

        Args:
            ups: u·x (..., prototypes), or None.

        Returns:
            scale · κ (..., prototypes);
            its loudness, which decides what a sparse map keeps: scale · κ itself, or
            |scale · κ u·x| with gated values;
            the least loudness that is kept, shape (1,); None where a number of prototypes is.
        """
        log_scale = self.log_positive("scale")
        score, distance2 = self.scores(hidden_states)
        kernel = self.kernel.scaled(score, distance2, log_scale, **self.kernel_parameters())
        loudness = (kernel if ups is None else kernel * ups.abs()).detach()
        return kernel, loudness, self.least_loudness(log_scale)

    def least_loudness(self, log_scale: Tensor) -> Tensor | None:
        """scale times the threshold of κ, shape (1,); None for another simplex map."""
        if self.config.settings.simplex != "threshold":
            return None
        return (self.log_threshold() + log_scale).exp()

    def _scaled_kernel(self, hidden_states: Tensor, ups: Tensor | None) -> Tensor:
        """scale · κ over the support."""
        kernel, loudness, least = self.kernel_and_loudness(hidden_states, ups)
        settings = self.config.settings
        if not settings.sparse:
            return kernel
        if least is not None:
            return kernel * (loudness >= least)
        return kernel * top_k_mask(loudness, settings.top_k or 0)

    def _shares_and_intensity(
        self, hidden_states: Tensor, ups: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Shares π and the intensity g (..., 1), or None where g is one by definition."""
        settings = self.config.settings
        log_kernel = self.kernel.log(*self.scores(hidden_states), **self.kernel_parameters())
        if settings.sparse:
            loudness = _log_loudness(log_kernel, ups)
            if settings.simplex == "threshold":
                is_kept = loudness >= self.log_threshold()
            else:
                is_kept = top_k_mask(loudness, settings.top_k or 0)
            log_kernel = log_kernel.masked_fill(~is_kept, -torch.inf)

        temperature = self.positive("temperature")
        shares = compute_shares(settings.simplex, log_kernel, temperature, settings.top_k)
        if settings.intensity == "none":
            return shares, None
        if settings.intensity == "gate":
            return shares, self.gate_intensity(hidden_states)

        support = shares.detach() > 0
        finite = log_kernel.where(support, torch.zeros_like(log_kernel))
        scaled = (finite + self.log_positive("scale")).exp()
        return shares, (scaled * support).sum(-1, keepdim=True)


def _log_loudness(log_kernel: Tensor, ups: Tensor | None) -> Tensor:
    """log κ, or log |κ u·x| with gated values, without gradients.

    A light-tailed kernel is 0 in float32 far from every prototype; its logarithm still has a
    largest value.
    """
    log_kernel = log_kernel.detach()
    return log_kernel if ups is None else log_kernel + ups.detach().abs().log()


def _name_units(units: list[int]) -> tuple[str, ...]:
    """``17+`` and ``17-`` by the teacher's unit and the sign of its column.

    A second piece of the same is ``17+.2``.
    """
    count: Counter[str] = Counter()
    names = []
    for unit in units:
        name = f"{abs(unit) - 1}{'+' if unit > 0 else '-'}"
        count[name] += 1
        names.append(name if count[name] == 1 else f"{name}.{count[name]}")
    return tuple(names)
