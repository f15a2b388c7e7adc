"""What a kernel readout has to beat, behind the same interface as :class:`~hf_kernel_ffn.checkpoint_code.ffn.KernelFFN`: the teacher's own
FFN, whole or truncated to its largest contributions, and transcoders. They go through the same stages and the same evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.kernels import get_kernel
from ..checkpoint_code.record import Readout
from ..checkpoint_code.settings import KernelFFNConfig, LayerConfig
from ..checkpoint_code.simplex import top_k_mask
from ..conversion.layer import make_layer_config
from ..conversion.sampling import read_fit_sample
from ..families.lookup import find_stock_ffn, find_stock_ffns
from ..families.registry import get_architecture_of_model
from ..families.student import make_config_entry, make_student_from_entry
from ..families.weights import FFNWeights, read_stock_weights


class TeacherFFN(nn.Module):
    """The teacher's FFN as a readout: signed coefficients over the columns of W_out, with those of the ``top_k`` largest
    |c_i|‖v_i‖ kept, for every token or (``simplex`` threshold) on average; all of them if ``top_k`` is None."""

    threshold_log_ratio: Tensor

    def __init__(self, weights: FFNWeights, simplex: str = "softmax", top_k: int | None = None):
        super().__init__()
        units, size = weights.up.shape
        self.config = LayerConfig(KernelFFNConfig(simplex=simplex, top_k=top_k), size, units)
        self.top_k = top_k
        self.activation = weights.activation
        self.up = _linear(weights.up, weights.up_bias)
        self.gate = None if weights.gate is None else _linear(weights.gate, weights.gate_bias)
        bias = weights.down_bias if weights.down_bias is not None else weights.down.new_zeros(size)
        self.output_prototypes = _linear(weights.down.T, bias)
        self.register_buffer("threshold_log_ratio", torch.zeros(1))

    def loudness(self, coefficients: Tensor) -> Tensor:
        """|c_i|‖v_i‖, (..., units): what decides which contributions are kept."""
        return coefficients.detach().abs() * self.output_prototypes.weight.detach().norm(dim=0)

    def all_coefficients(self, hidden_states: Tensor) -> Tensor:
        """(..., units), nothing truncated."""
        up = self.up(hidden_states)
        return (
            self.activation(up)
            if self.gate is None
            else self.activation(self.gate(hidden_states)) * up
        )

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
        """As that of a kernel readout, for |c_i|‖v_i‖."""
        loudness = self.loudness(self.all_coefficients(hidden_states)).flatten(0, -2)
        passing = min((self.top_k or 0) * len(loudness), loudness.numel())
        value = loudness.flatten().kthvalue(loudness.numel() - passing + 1).values.clamp_min(1e-30)
        self.threshold_log_ratio.lerp_(value.log(), rate)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.output_prototypes(self.coefficients(hidden_states))

    def readout(self, hidden_states: Tensor) -> Readout:
        """The record, signed."""
        linear = self.output_prototypes
        names = tuple(map(str, range(linear.in_features)))
        return Readout(
            self.coefficients(hidden_states), linear.weight.T, linear.bias, None, None, names
        )


class Transcoder(nn.Module):
    """A TopK transcoder (Dunefsky et al. 2024, arXiv:2406.11944; with ``skip``, Paulo et al. 2025, arXiv:2501.18823), the module
    of the sparsify package (``pip install eai-sparsify``)."""

    def __init__(self, outputs: Tensor, width: int, top_k: int, skip: bool):
        """``outputs`` (tokens, hidden_size) of the teacher's FFN, at whose mean the output bias starts."""
        super().__init__()
        try:
            from sparsify import SparseCoder, SparseCoderConfig
        except ImportError as error:
            raise InputError(
                "a transcoder needs the sparsify package: pip install 'hf-kernel-ffn[frontier]'"
            ) from error
        size = outputs.shape[1]
        self.config = LayerConfig(KernelFFNConfig(simplex="top-k", top_k=top_k), size, width)
        self.coder: Any = SparseCoder(
            size,
            SparseCoderConfig(num_latents=width, k=top_k, transcode=True, skip_connection=skip),
        )
        self.coder.b_dec.data.copy_(outputs.mean(0))

    @property
    def top_k(self) -> int:
        """Latents kept per token."""
        return self.coder.cfg.k

    @top_k.setter
    def top_k(self, value: int) -> None:
        self.coder.cfg.k = min(value, self.config.prototypes)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, -2)
        latents, indices, _ = self.coder.encode(x)
        y = self.coder.decode(latents, indices)
        if self.coder.W_skip is not None:
            y = y + x @ self.coder.W_skip.T
        return y.view(hidden_states.shape)

    def readout(self, hidden_states: Tensor) -> Readout:
        """The record; a skip connection stands in its bias, (..., hidden_size), as what is written beside the dictionary."""
        latents, indices, pre_activations = self.coder.encode(hidden_states.flatten(0, -2))
        coefficients = torch.zeros_like(pre_activations).scatter(-1, indices, latents)
        bias = self.coder.b_dec
        if self.coder.W_skip is not None:
            bias = bias + hidden_states @ self.coder.W_skip.T
        names = tuple(map(str, range(self.config.prototypes)))
        return Readout(
            coefficients.view(*hidden_states.shape[:-1], -1),
            self.coder.W_dec,
            bias,
            None,
            None,
            names,
        )


def teacher_as_student(
    teacher: Any, ids: Tensor, simplex: str = "softmax", top_k: int | None = None
) -> Any:
    """A model whose every FFN is a :class:`TeacherFFN` of its own, the rest shared with ``teacher``.

    Args:
        ids: (rows, length) token ids on which thresholds are fitted.
    """
    student = _with_controls(teacher, lambda path, weights: TeacherFFN(weights, simplex, top_k))
    if simplex == "threshold":
        for path, ffn in student.kernel_ffns().items():
            ffn.fit_threshold(read_fit_sample(teacher, path, ids))
    return student


def transcoder_student(
    teacher: Any, ids: Tensor, width: int, top_k: int, skip: bool, seed: int = 0
) -> Any:
    """A model whose every FFN is an untrained :class:`Transcoder`, the rest shared with ``teacher``.

    Args:
        ids: (rows, length) token ids on which the mean outputs are taken.
    """
    torch.manual_seed(seed)

    def make(path: str, weights: FFNWeights) -> Transcoder:
        outputs = find_stock_ffn(teacher, path)(read_fit_sample(teacher, path, ids))
        return Transcoder(outputs, width, top_k, skip)

    return _with_controls(teacher, make)


@torch.no_grad()
def _with_controls(teacher: Any, make: Callable[[str, FFNWeights], nn.Module]) -> Any:
    weights = {
        path: read_stock_weights(teacher, ffn)
        for path, ffn in find_stock_ffns(teacher, get_architecture_of_model(teacher)).items()
    }
    # A model that has the rest of the teacher and knows which of its modules are FFNs; what they are now is of no matter.
    reference = dict.fromkeys((*get_kernel("half-yat").parameters, "scale"), 1.0)
    layers = {
        path: make_layer_config(
            teacher,
            find_stock_ffn(teacher, path),
            KernelFFNConfig("half-yat"),
            w.up.shape[1],
            1,
            reference,
        )
        for path, w in weights.items()
    }
    student = make_student_from_entry(teacher, make_config_entry(teacher, layers))
    for path, w in weights.items():
        student.base_model.set_submodule(path, make(path, w).to(w.up.device))
    return student


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A projection with its own float32 copy of ``weight`` (out, in) and ``bias``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear
