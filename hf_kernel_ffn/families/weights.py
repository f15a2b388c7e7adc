"""The weights of a stock FFN in one orientation, and its record."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.record import Readout
from .lookup import StockFFN, get_attribute_at
from .table import Architecture

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


def read_stock_weights(model: Any, ffn: StockFFN) -> FFNWeights:
    """The weights of ``ffn``, an FFN of ``model``; InputError as :func:`read_ffn_weights`."""
    return read_ffn_weights(ffn.host, ffn.shape, model.config, ffn.host_path, ffn.expert)


def read_ffn_weights(
    ffn: Any, architecture: Architecture, config, path: str, expert: int | None = None
) -> FFNWeights:
    """The weights of the stock FFN whose parts are in the module ``ffn`` at ``path``.

    Raises:
        InputError: a part is missing, quantised, or holds NaN or infinite values; the tensor is named.
    """
    found: dict[str, Any] = {}
    for role in ("up", "gate", "down"):
        name = getattr(architecture, role)
        found[role] = (None, None) if name is None else _projection(ffn, name, path, expert)
    (up, up_bias), (gate, gate_bias), (down, down_bias) = found.values()
    if architecture.gate_half is not None:
        halves, biases = up.chunk(2), (None, None) if up_bias is None else up_bias.chunk(2)
        gate, gate_bias = halves[architecture.gate_half], biases[architecture.gate_half]
        up, up_bias = halves[1 - architecture.gate_half], biases[1 - architecture.gate_half]
    act = (
        get_attribute_at(ffn, architecture.act)
        if architecture.act
        else ACT2FN[get_attribute_at(config, str(architecture.activation))]
    )
    return FFNWeights(up, up_bias, gate, gate_bias, down.T, down_bias, act)


def is_finite(tensor: Tensor) -> bool:
    """Whether all its numbers are finite; without a mask of its size, which takes many times as long."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def _projection(ffn: Any, name: str, path: str, expert: int | None) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias."""
    try:
        module = get_attribute_at(ffn, name)
    except AttributeError:
        module = None
    if expert is None:
        good, tensors = (
            isinstance(module, (nn.Linear, Conv1D)),
            dict(getattr(module, "_parameters", {})),
        )
    else:
        good, tensors = isinstance(module, Tensor) and module.ndim == 3, {"weight": module}
    weight: Any = tensors.get("weight")
    if not good or weight.dtype not in WEIGHT_DTYPES:
        kind = (
            "nothing"
            if module is None
            else f"{type(module).__name__} of {getattr(weight, 'dtype', '?')}"
        )
        raise InputError(
            f"found {kind} at {path}.{name}, expected a floating-point Linear or Conv1D: load the model unquantised"
        )
    for part, tensor in tensors.items():
        if tensor is not None and not tensor.is_meta and not is_finite(tensor):
            raise InputError(
                f"found NaN or infinite values in {path}.{name}.{part}, expected finite weights: repair the teacher"
            )
    weight, bias = weight.detach(), tensors.get("bias")
    if expert is not None:
        weight = weight[expert]
    return weight.T if isinstance(
        module, Conv1D
    ) else weight, None if bias is None else bias.detach()


def read_teacher_readout(weights: FFNWeights, hidden_states: Tensor) -> Readout:
    """The record of an untouched FFN: signed coefficients over the columns of W_out, no shares, no intensity."""
    return Readout(
        coefficients=weights.coefficients(hidden_states),
        dictionary=weights.down,
        bias=weights.down_bias,
        shares=None,
        intensity=None,
        names=tuple(str(i) for i in range(len(weights.down))),
    )
