"""What a kernel readout has to beat: the teacher's own FFN, whole or truncated to its largest
contributions, and transcoders.

They have the interface of :class:`~hf_kernel_ffn.checkpoint_code.ffn.KernelFFN`, and go through the
same stages and the same evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint_code.errors import MissingPackage
from ..checkpoint_code.kernels import get_kernel
from ..checkpoint_code.layer_config import LayerConfig
from ..checkpoint_code.modeling import KernelModelMixin
from ..checkpoint_code.record import Readout
from ..checkpoint_code.settings import KernelFFNConfig
from ..checkpoint_code.simplex import top_k_mask
from ..conversion.layer import make_layer_config
from ..conversion.sampling import read_fit_sample
from ..families.lookup import find_stock_ffn, find_stock_ffns
from ..families.registry import get_architecture_of_model
from ..families.student import make_config_entry, make_student_from_entry
from ..families.weights import FFNWeights, read_stock_weights

LEAST_THRESHOLD = 1e-30
"""Thresholds are kept as logarithms; this one, which every contribution passes, stands for zero."""


class TeacherFFN(nn.Module):
    """The teacher's FFN as a readout: signed coefficients over the columns of W_out.

    Of the contributions c_i v_i, those with the ``top_k`` largest |c_i|‖v_i‖ are kept: for
    every token or (``simplex`` threshold) on average; all of them if ``top_k`` is None.
    """

    threshold_log_ratio: Tensor

    def __init__(self, weights: FFNWeights, simplex: str = "softmax", top_k: int | None = None):
        super().__init__()
        units, size = weights.up.shape
        self.config = LayerConfig(KernelFFNConfig(simplex=simplex, top_k=top_k), size, units)
        self.top_k = top_k
        self.activation = weights.activation
        self.up = _make_linear(weights.up, weights.up_bias)
        self.gate = None if weights.gate is None else _make_linear(weights.gate, weights.gate_bias)
        bias = weights.down_bias if weights.down_bias is not None else weights.down.new_zeros(size)
        self.output_prototypes = _make_linear(weights.down.T, bias)
        self.register_buffer("threshold_log_ratio", torch.zeros(1))

    def loudness(self, coefficients: Tensor) -> Tensor:
        """|c_i|‖v_i‖, (..., units): what decides which contributions are kept."""
        lengths = self.output_prototypes.weight.detach().norm(dim=0)
        return coefficients.detach().abs() * lengths

    def all_coefficients(self, hidden_states: Tensor) -> Tensor:
        """(..., units), nothing truncated."""
        up = self.up(hidden_states)
        if self.gate is None:
            return self.activation(up)
        return self.activation(self.gate(hidden_states)) * up

    def coefficients(self, hidden_states: Tensor) -> Tensor:
        """(..., units), with those that are not kept zero."""
        coefficients = self.all_coefficients(hidden_states)
        if self.top_k is None:
            return coefficients
        loudness = self.loudness(coefficients)
        if self.config.settings.simplex == "threshold":
            return coefficients * (loudness >= self.threshold_log_ratio.exp())
        return coefficients * top_k_mask(loudness, self.top_k)

    @torch.no_grad()
    def fit_threshold(self, hidden_states: Tensor, rate: float = 1.0) -> None:
        """Move the threshold to where ``top_k`` contributions per token pass at ``hidden_states``
        (..., hidden_size), or only the share ``rate`` of the way."""
        loudness = self.loudness(self.all_coefficients(hidden_states)).flatten(0, -2)
        passing = min((self.top_k or 0) * len(loudness), loudness.numel())
        place = loudness.numel() - passing + 1
        value = loudness.flatten().kthvalue(place).values.clamp_min(LEAST_THRESHOLD)
        self.threshold_log_ratio.lerp_(value.log(), rate)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size)."""
        return self.output_prototypes(self.coefficients(hidden_states))

    def readout(self, hidden_states: Tensor) -> Readout:
        """The record, signed."""
        linear = self.output_prototypes
        return Readout(
            coefficients=self.coefficients(hidden_states),
            dictionary=linear.weight.T,
            bias=linear.bias,
            shares=None,
            intensity=None,
            names=_number_names(linear.in_features),
        )


class Transcoder(nn.Module):
    """A TopK transcoder (Dunefsky et al. 2024, arXiv:2406.11944; with ``skip``, Paulo et al. 2025,
    arXiv:2501.18823), the module of the sparsify package (``pip install eai-sparsify``)."""

    def __init__(self, outputs: Tensor, width: int, top_k: int, skip: bool):
        """``outputs`` (tokens, hidden_size) of the teacher's FFN, at whose mean the output bias
        starts.

        Raises:
            MissingPackage: the sparsify package is not installed.
        """
        super().__init__()
        try:
            from sparsify import SparseCoder, SparseCoderConfig
        except ImportError as error:
            raise MissingPackage(
                "a transcoder needs the sparsify package: pip install 'hf-kernel-ffn[experiments]'"
            ) from error
        size = outputs.shape[1]
        self.config = LayerConfig(KernelFFNConfig(simplex="top-k", top_k=top_k), size, width)
        settings = SparseCoderConfig(
            num_latents=width, k=top_k, transcode=True, skip_connection=skip
        )
        self.coder = SparseCoder(size, settings)
        self.coder.b_dec.data.copy_(outputs.mean(0))

    @property
    def top_k(self) -> int:
        """Latents kept per token."""
        return self.coder.cfg.k

    @top_k.setter
    def top_k(self, value: int) -> None:
        self.coder.cfg.k = min(value, self.config.prototypes)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size)."""
        x = hidden_states.flatten(0, -2)
        latents, indices, _ = self.coder.encode(x)
        y = self.coder.decode(latents, indices)
        if self.coder.W_skip is not None:
            y = y + x @ self.coder.W_skip.T
        return y.view(hidden_states.shape)

    def readout(self, hidden_states: Tensor) -> Readout:
        """The record; a skip connection is what is written beside the dictionary."""
        latents, indices, pre_activations = self.coder.encode(hidden_states.flatten(0, -2))
        coefficients = torch.zeros_like(pre_activations).scatter(-1, indices, latents)
        skip = None
        if self.coder.W_skip is not None:
            skip = hidden_states @ self.coder.W_skip.T
        return Readout(
            coefficients=coefficients.view(*hidden_states.shape[:-1], -1),
            dictionary=self.coder.W_dec,
            bias=self.coder.b_dec,
            shares=None,
            intensity=None,
            names=_number_names(self.config.prototypes),
            skip=skip,
        )


def teacher_as_student(
    teacher: PreTrainedModel, ids: Tensor, simplex: str = "softmax", top_k: int | None = None
) -> PreTrainedModel:
    """Make a model whose every FFN is a :class:`TeacherFFN` of its own, the rest shared with
    ``teacher``.

    Args:
        ids: (rows, length) token ids on which thresholds are fitted.
    """
    student = _replace_ffns(teacher, lambda path, weights: TeacherFFN(weights, simplex, top_k))
    if simplex == "threshold":
        for path, ffn in cast(KernelModelMixin, student).kernel_ffns().items():
            cast(TeacherFFN, ffn).fit_threshold(read_fit_sample(teacher, path, ids))
    return student


def transcoder_student(
    teacher: PreTrainedModel, ids: Tensor, width: int, top_k: int, skip: bool, seed: int = 0
) -> PreTrainedModel:
    """Make a model whose every FFN is an untrained :class:`Transcoder`, the rest shared with
    ``teacher``.

    Args:
        ids: (rows, length) token ids on which the mean outputs are taken.
    """
    torch.manual_seed(seed)

    def make_ffn(path: str, weights: FFNWeights) -> Transcoder:
        outputs = find_stock_ffn(teacher, path)(read_fit_sample(teacher, path, ids))
        return Transcoder(outputs, width, top_k, skip)

    return _replace_ffns(teacher, make_ffn)


@torch.no_grad()
def _replace_ffns(
    teacher: PreTrainedModel, make_ffn: Callable[[str, FFNWeights], nn.Module]
) -> PreTrainedModel:
    """A model that has the rest of ``teacher`` and, at the path of every FFN, what ``make_ffn``
    makes of its path and weights."""
    ffns = find_stock_ffns(teacher, get_architecture_of_model(teacher))
    weights = {path: read_stock_weights(teacher, ffn) for path, ffn in ffns.items()}

    # Converted first, by settings that do not matter, so that it knows which modules are FFNs.
    settings = KernelFFNConfig("half-yat")
    reference = dict.fromkeys((*get_kernel("half-yat").parameters, "scale"), 1.0)
    layers = {}
    for path, stock in ffns.items():
        size = weights[path].up.shape[1]
        layers[path] = make_layer_config(
            teacher, stock, settings, size=size, prototypes=1, reference=reference
        )
    student = make_student_from_entry(teacher, make_config_entry(teacher, layers))

    for path, ffn_weights in weights.items():
        ffn = make_ffn(path, ffn_weights).to(ffn_weights.up.device)
        student.base_model.set_submodule(path, ffn)
    return student


def _make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A projection with its own float32 copy of ``weight`` (out, in) and ``bias``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def _number_names(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
