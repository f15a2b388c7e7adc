"""The parameters of a kernel-readout FFN, and where they start.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from .errors import InputError
from .kernels import Kernel, get_kernel
from .layer_config import LayerConfig

LOG_RATIO_BOUND = 20.0
"""Learned log-ratios act as if no further from zero than this.

No step, however wild, then makes a constrained value 0 or ∞.
"""


class ConstrainedParameters(nn.Module):
    """Positive values of a layer, learned as log-ratios to the reference values in its config."""

    config: LayerConfig
    kernel: Kernel
    log_ratio: nn.ParameterDict
    """Log-ratios by name, one element each."""
    threshold_log_ratio: Tensor
    """Log-ratio of the threshold to its reference, (1,), where there is one."""

    def kernel_parameters(self) -> dict[str, Tensor]:
        """The kernel's parameters by name, positive, shape (1,) each."""
        return {name: self.positive(name) for name in self.kernel.parameters}

    def positive(self, name: str) -> Tensor:
        """A constrained value > 0, ``reference · exp(log-ratio)``, (1,) in float32 at least."""
        return scale_reference(self.config.reference[name], self.get_log_ratio(name))

    def log_positive(self, name: str) -> Tensor:
        """Its logarithm, also where the value itself leaves the range of float32."""
        log_ratio = self.get_log_ratio(name).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        return math.log(self.config.reference[name]) + log_ratio

    def get_log_ratio(self, name: str) -> Tensor:
        """A learned log-ratio as it stands, (1,) in float32 at least."""
        return to_at_least_float32(self.log_ratio[name])

    def set_reference(self, name: str, value: float) -> None:
        """Give ``config`` another reference value; the learned log-ratio to it stays."""
        reference = {**self.config.reference, name: value}
        self.config = replace(self.config, reference=reference)

    def set_top_k(self, top_k: int) -> None:
        """Give ``config`` another number of prototypes that a sparse map keeps."""
        settings = replace(self.config.settings, top_k=top_k)
        self.config = replace(self.config, settings=settings)

    def log_threshold(self) -> Tensor:
        """The logarithm of :meth:`threshold`, shape (1,), at least float32."""
        log_ratio = to_at_least_float32(self.threshold_log_ratio)
        return math.log(self.config.reference["threshold"]) + log_ratio

    def move_threshold(self, log_loudness: Tensor, rate: float) -> None:
        """Move the threshold toward where ``top_k`` prototypes pass on average.

        Args:
            log_loudness: (tokens, prototypes), −inf where a prototype does not fire.
            rate: the share of the way, in its logarithm.
        """
        firing = int((log_loudness > -torch.inf).sum())
        asked_for = (self.config.settings.top_k or 0) * len(log_loudness)
        passing = min(asked_for, firing)  # prototypes that do not fire set no limit
        if not passing:
            return

        place = log_loudness.numel() - passing + 1
        smallest_passing = log_loudness.flatten().kthvalue(place).values
        target = smallest_passing - math.log(self.config.reference["threshold"])
        step = target.to(self.threshold_log_ratio.dtype) - self.threshold_log_ratio
        self.threshold_log_ratio.add_(rate * step)

    def threshold(self) -> Tensor:
        """The loudness from which on a prototype takes part, shape (1,), at least float32.

        Of free rows it is κ, of tied ones |c_i|‖v_i‖.
        """
        return self.log_threshold().exp()


class ReadoutParameters(ConstrainedParameters):
    """What a kernel-readout FFN learns, and how its constrained values are read.

    All matrices are ``nn.Linear`` modules, called as modules, so that adapters and quantisers
    see them:

    * ``input_prototypes``: rows w_i (prototypes, hidden_size), with b as its bias;
    * ``output_prototypes``: columns v_i (hidden_size, prototypes), with b_out as its bias;
    * ``value_proj``: rows u_i of gated values; ``gate``: of the intensity gate.

    ``log_ratio`` holds learned log-ratios, of one element each, to the reference values in
    ``config``; ``threshold_log_ratio`` is a buffer, moved by ``fit_threshold``. ``units``
    (prototypes,) holds ±(1 + the teacher's unit).
    """

    units: Tensor

    def __init__(self, config: LayerConfig):
        super().__init__()
        settings = config.settings
        self.config = config
        self.kernel = get_kernel(settings.kernel)

        size = config.hidden_size
        prototypes = config.prototypes
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
        if settings.simplex == "threshold":
            self.register_buffer("threshold_log_ratio", torch.zeros(1))
        self.dropout = nn.Dropout(config.dropout)

    @classmethod
    @torch.no_grad()
    def from_prototypes(
        cls,
        config: LayerConfig,
        *,
        rows: Tensor,
        dictionary: Tensor,
        units: Tensor,
        bias: Tensor | None = None,
        output_bias: Tensor | None = None,
        up_rows: Tensor | None = None,
        up_bias: Tensor | None = None,
        gate_bias: float = 0.0,
    ) -> Self:
        """A layer with these starting weights, in float32 and in eval mode, on their device.

        Learned values start at their reference; a gate starts with zero weights. The layer shares
        the memory of ``rows`` and ``up_rows`` where they are contiguous float32.

        Args:
            rows: (prototypes, hidden_size) input prototypes w_i.
            dictionary: (prototypes, hidden_size) output prototypes v_i.
            units: (prototypes,) ±(1 + the teacher's unit).
            bias: (prototypes,) b_i, for a kernel that has them; None for zero.
            output_bias: (hidden_size,) b_out; None for zero.
            up_rows: (prototypes, hidden_size) u_i, for gated values.
            up_bias: (prototypes,) their bias; None for zero.
            gate_bias: where the bias of an intensity gate starts.

        Raises:
            InputError: a matrix has another shape than ``config`` says, or is missing.
        """
        shape = (config.prototypes, config.hidden_size)
        matrices = {"rows": rows, "dictionary": dictionary}
        if config.settings.values == "gated":
            matrices["up_rows"] = rows[:0] if up_rows is None else up_rows
        for name, matrix in matrices.items():
            if matrix.shape != shape:
                raise InputError(
                    f"found {name} of shape {tuple(matrix.shape)}, expected {shape} "
                    "by the layer's config: give every prototype a row"
                )

        with torch.device("meta"):  # drawing random weights would take longer than all the rest
            ffn = cls(config).eval()
        ffn.to_empty(device=rows.device)
        ffn.units.copy_(units)
        for log_ratio in ffn.log_ratio.values():
            log_ratio.zero_()
        if config.settings.simplex == "threshold":
            ffn.threshold_log_ratio.zero_()

        fill_linear(ffn.input_prototypes, rows, bias)
        fill_linear(ffn.output_prototypes, dictionary.T, output_bias)
        if config.settings.values == "gated":
            fill_linear(ffn.value_proj, matrices["up_rows"], up_bias)
        if config.settings.intensity == "gate":
            ffn.gate.weight.zero_()
            ffn.gate.bias.fill_(gate_bias)
        return ffn


def scale_reference(reference: float, log_ratio: Tensor) -> Tensor:
    """``reference · exp(log_ratio)``, the log-ratio within its bound."""
    return reference * log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def fill_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give ``linear`` this weight, in float32, and this bias if it has one; None for zero."""
    linear.weight.data = weight.float().contiguous()
    if linear.bias is None:
        return
    if bias is None:
        linear.bias.zero_()
    else:
        linear.bias.copy_(bias)


def to_at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor``, in float32 unless it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
