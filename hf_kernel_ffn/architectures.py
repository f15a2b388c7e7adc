"""Where the FFNs of each HuggingFace architecture are, and how to read one: the table and its lookups."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .errors import InputError
from .readout import Readout


@dataclass(frozen=True)
class Architecture:
    """One family. Paths are attribute names; weights may stand in ``nn.Linear`` or in ``Conv1D`` orientation."""

    model_type: str
    """``config.model_type`` of the stock model."""
    layers: str
    """Under the base model, the list of blocks."""
    ffn: str
    """In a block, the FFN module: it maps (..., hidden_size) to (..., hidden_size)."""
    up: str
    """In the FFN, the projection whose rows are W_in (the linear half, in a gated FFN)."""
    down: str
    """In the FFN, the projection whose columns are W_out."""
    activation: str
    """Config attribute that names the activation."""
    gate: str | None = None
    """In a gated FFN, the projection inside the activation."""
    dropout: str | None = None
    """Config attribute with the dropout on the FFN's output, if the FFN module applies one."""
    ffn_norm: str = "post_attention_layernorm"
    """In a block, the norm whose output is the FFN's input."""
    attention: str = "self_attn"
    """In a block, the attention module: it returns its output and the weights."""
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """In the attention module, the projections to queries, keys and values; one name if they are stacked in one, in this order."""
    attention_out: str = "o_proj"
    """In the attention module, the projection that mixes the heads."""
    final_norm: str = "norm"
    """Under the base model, the norm before the unembedding."""
    modeling: str = ""
    """Module with the converted model's classes, ``Kernel`` + the stock class's name."""


ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> Architecture:
    """Add a family to the table; InputError if its model_type is taken."""
    if architecture.model_type in ARCHITECTURES:
        raise InputError(f"an architecture for {architecture.model_type!r} is already registered")
    ARCHITECTURES[architecture.model_type] = architecture
    return architecture


_GATED: Any = dict(layers="layers", ffn="mlp", gate="gate_proj", up="up_proj", down="down_proj", activation="hidden_act")
register_architecture(Architecture("llama", **_GATED, modeling="hf_kernel_ffn.modeling_kernel_llama"))
register_architecture(Architecture("mistral", **_GATED, modeling="hf_kernel_ffn.modeling_kernel_mistral"))
register_architecture(
    Architecture(
        "gpt2", layers="h", ffn="mlp", up="c_fc", down="c_proj", activation="activation_function",
        dropout="resid_pdrop", ffn_norm="ln_2", attention="attn", qkv=("c_attn",), attention_out="c_proj", final_norm="ln_f",
        modeling="hf_kernel_ffn.modeling_kernel_gpt2",
    )
)  # fmt: skip


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The table's entry for ``model``; InputError if it is converted already or of no known family."""
    model_type = model.config.model_type
    if getattr(model.config, "kernel_ffn", None) is not None:
        raise InputError(
            f"found a model that is converted already ({model_type}), expected a stock one: convert its teacher instead"
        )
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"found model type {model_type!r}, expected one of {', '.join(ARCHITECTURES)}: "
            "describe yours by hf_kernel_ffn.register_architecture(Architecture(...))"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None) is not None:
        raise InputError(f"found a quantised model ({model_type}), expected floating-point weights: load the model unquantised")
    return ARCHITECTURES[model_type]


def ffn_paths(model: Any, architecture: Architecture) -> list[str]:
    """Path of every FFN under the base model, in layer order."""
    count = len(model.base_model.get_submodule(architecture.layers))
    return [f"{architecture.layers}.{index}.{architecture.ffn}" for index in range(count)]


def parse_layers(layers: str, count: int) -> list[int]:
    """``"0-5,7"`` as a list of layer numbers; InputError if it is malformed or outside 0 … count − 1."""
    chosen: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise InputError(f"found layers {layers!r}, expected numbers and ranges such as 0-5,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise InputError(
                f"found layers {part.strip()!r}, expected numbers from 0 to {count - 1}: the model has {count} layers"
            )
        chosen.update(range(first, last + 1))
    return sorted(chosen)


WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class FFNWeights(NamedTuple):
    """A stock FFN in one orientation: ``y = Σ_i act(gate_i·x + …) (up_i·x + …) down_i + down_bias`` (gate None: act on up)."""

    up: Tensor
    """(intermediate_size, hidden_size)"""
    up_bias: Tensor | None
    gate: Tensor | None
    """(intermediate_size, hidden_size)"""
    gate_bias: Tensor | None
    down: Tensor
    """(intermediate_size, hidden_size): the columns of W_out as rows."""
    down_bias: Tensor | None
    activation: nn.Module

    def pre_activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """up·x and gate·x (None without a gate), (..., intermediate_size) each."""
        up = nn.functional.linear(x, self.up, self.up_bias)
        return up, None if self.gate is None else nn.functional.linear(x, self.gate, self.gate_bias)

    def coefficients(self, x: Tensor) -> Tensor:
        """(..., intermediate_size): signed, what multiplies the columns of W_out."""
        up, gate = self.pre_activations(x)
        return self.activation(up) if gate is None else self.activation(gate) * up


def ffn_weights(ffn: nn.Module, architecture: Architecture, config, path: str) -> FFNWeights:
    """The weights of the stock FFN at ``path``.

    Raises:
        InputError: a part is missing, quantised, or holds NaN or infinite values; the tensor is named.
    """
    found: dict[str, Any] = {}
    for role in ("up", "gate", "down"):
        name = getattr(architecture, role)
        if name is None:
            found[role] = (None, None)
            continue
        module = getattr(ffn, name, None)
        if not isinstance(module, (nn.Linear, Conv1D)) or module.weight.dtype not in WEIGHT_DTYPES:
            kind = (
                "nothing"
                if module is None
                else f"{type(module).__name__} of {getattr(getattr(module, 'weight', None), 'dtype', '?')}"
            )
            raise InputError(
                f"found {kind} at {path}.{name}, expected a floating-point Linear or Conv1D: load the model unquantised"
            )
        weight = module.weight.detach()
        found[role] = (
            weight.T if isinstance(module, Conv1D) else weight,
            None if module.bias is None else module.bias.detach(),
        )
        for part, tensor in module.named_parameters(recurse=False):
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"found NaN or infinite values in {path}.{name}.{part}, expected finite weights: repair the teacher"
                )
    return FFNWeights(
        up=found["up"][0], up_bias=found["up"][1], gate=found["gate"][0], gate_bias=found["gate"][1],
        down=found["down"][0].T, down_bias=found["down"][1], activation=ACT2FN[getattr(config, architecture.activation)],
    )  # fmt: skip


def teacher_readout(weights: FFNWeights, hidden_states: Tensor) -> Readout:
    """The record of an untouched FFN: signed coefficients over the columns of W_out, no shares, no intensity."""
    return Readout(
        coefficients=weights.coefficients(hidden_states),
        dictionary=weights.down,
        bias=weights.down_bias,
        shares=None,
        intensity=None,
        names=tuple(str(i) for i in range(len(weights.down))),
    )
