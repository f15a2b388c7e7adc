"""The weights of a stock FFN in one orientation, and its record."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.record import Readout
from .lookup import StockFFN, get_attribute_at
from .table import Architecture

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What the weights of an FFN may be stored in; other types are quantised."""


class FFNWeights(NamedTuple):
    """A stock FFN in one orientation.

    With a gate ``y = Σ_i act(gate_i·x + gate_bias_i) (up_i·x + up_bias_i) down_i + down_bias``,
    without one ``y = Σ_i act(up_i·x + up_bias_i) down_i + down_bias``.
    """

    up: Tensor
    """(intermediate_size, hidden_size)"""
    up_bias: Tensor | None
    """(intermediate_size,)"""
    gate: Tensor | None
    """(intermediate_size, hidden_size)"""
    gate_bias: Tensor | None
    """(intermediate_size,)"""
    down: Tensor
    """(intermediate_size, hidden_size): the columns of W_out as rows."""
    down_bias: Tensor | None
    """(hidden_size,)"""
    activation: nn.Module
    """Applied elementwise."""

    def pre_activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return up·x and gate·x (None without a gate), (..., intermediate_size) each."""
        up = nn.functional.linear(x, self.up, self.up_bias)
        if self.gate is None:
            return up, None
        return up, nn.functional.linear(x, self.gate, self.gate_bias)

    def coefficients(self, x: Tensor) -> Tensor:
        """Return what multiplies the columns of W_out, signed, (..., intermediate_size)."""
        up, gate = self.pre_activations(x)
        if gate is None:
            return self.activation(up)
        return self.activation(gate) * up


class _Projection(NamedTuple):
    """One projection of an FFN."""

    weight: Tensor
    """(out, in)"""
    bias: Tensor | None
    """(out,)"""


def read_stock_weights(model: PreTrainedModel, ffn: StockFFN) -> FFNWeights:
    """Return the weights of ``ffn``, an FFN of ``model``; see :func:`read_ffn_weights`."""
    return read_ffn_weights(ffn.host, ffn.shape, model.config, ffn.host_path, expert=ffn.expert)


def read_ffn_weights(
    host: nn.Module,
    shape: Architecture,
    config: PreTrainedConfig,
    path: str,
    *,
    expert: int | None = None,
) -> FFNWeights:
    """Return the weights of a stock FFN, without copying them.

    Args:
        host: the module that holds the FFN's parts.
        shape: the table's entry that describes them.
        config: of the model.
        path: of ``host``, to be named in errors.
        expert: which FFN of ``host`` it is, if that holds the experts of a mixture.

    Raises:
        InputError: a part is missing, quantised, or holds NaN or infinite values; it is named.
    """

    def read(name: str) -> _Projection:
        return _read_projection(host, name, path, expert)

    up, up_bias = read(shape.up)
    down, down_bias = read(shape.down)

    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    if shape.gate is not None:
        gate, gate_bias = read(shape.gate)
    elif shape.gate_half is not None:
        gate, up = _split_gate_and_up(up, shape.gate_half)
        if up_bias is not None:
            gate_bias, up_bias = _split_gate_and_up(up_bias, shape.gate_half)

    activation = _get_activation(host, shape, config)
    return FFNWeights(up, up_bias, gate, gate_bias, down.T, down_bias, activation)


def refuse_quantised_weights(ffn: StockFFN) -> None:
    """Check the types of the weights of ``ffn`` without reading a number.

    Raises:
        InputError: a part is missing or quantised; it is named.
    """
    for name in (ffn.shape.up, ffn.shape.gate, ffn.shape.down):
        if name is not None:
            _get_projection_tensors(ffn.host, name, ffn.host_path, ffn.expert)


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of ``tensor`` are finite."""
    if not tensor.numel():
        return True
    # The extremes say it: a mask of the tensor's size would take many times as long.
    extremes = torch.stack(torch.aminmax(tensor.detach()))
    return bool(extremes.isfinite().all())


def read_teacher_readout(weights: FFNWeights, hidden_states: Tensor) -> Readout:
    """Return the record of an untouched FFN at its inputs ``hidden_states`` (..., hidden_size).

    The coefficients over the columns of W_out are signed. There are no shares and no intensity.
    """
    return Readout(
        coefficients=weights.coefficients(hidden_states),
        dictionary=weights.down,
        bias=weights.down_bias,
        shares=None,
        intensity=None,
        names=tuple(str(unit) for unit in range(len(weights.down))),
    )


def _read_projection(host: nn.Module, name: str, path: str, expert: int | None) -> _Projection:
    """Return the projection ``name`` of the FFN in ``host`` at ``path``.

    Raises:
        InputError: it is missing or quantised, or not finite.
    """
    tensors = _get_projection_tensors(host, name, path, expert)
    for part, tensor in tensors.items():
        if not tensor.is_meta and not is_finite(tensor):
            raise InputError(
                f"found NaN or infinite values in {path}.{name}.{part}, "
                "expected finite weights: repair the teacher"
            )

    weight = tensors["weight"].detach()
    if expert is not None:
        weight = weight[expert]
    elif isinstance(get_attribute_at(host, name), Conv1D):
        weight = weight.T
    bias = tensors.get("bias")
    return _Projection(weight, None if bias is None else bias.detach())


def _get_projection_tensors(
    host: nn.Module, name: str, path: str, expert: int | None
) -> dict[str, Tensor]:
    """Return ``weight`` and, if there is one, ``bias`` as they are stored: of all experts at once.

    Raises:
        InputError: there is no such projection, or it is quantised.
    """
    try:
        projection = get_attribute_at(host, name)
    except AttributeError:
        projection = None

    if expert is None:
        is_projection = isinstance(projection, (nn.Linear, Conv1D))
        tensors = dict(getattr(projection, "_parameters", {}))
    else:
        is_projection = isinstance(projection, Tensor) and projection.ndim == 3
        tensors = {"weight": projection}

    dtype = getattr(tensors.get("weight"), "dtype", "?")
    if not is_projection or dtype not in WEIGHT_DTYPES:
        kind = "nothing" if projection is None else f"{type(projection).__name__} of {dtype}"
        raise InputError(
            f"found {kind} at {path}.{name}, "
            "expected a floating-point Linear or Conv1D: load the model unquantised"
        )
    return {part: tensor for part, tensor in tensors.items() if tensor is not None}


def _split_gate_and_up(stacked: Tensor, gate_half: int) -> tuple[Tensor, Tensor]:
    """Split stacked rows into those of the gate and those of the linear half."""
    halves = stacked.chunk(2)
    return halves[gate_half], halves[1 - gate_half]


def _get_activation(
    host: nn.Module, architecture: Architecture, config: PreTrainedConfig
) -> nn.Module:
    """Return the activation: the FFN's own module, or the one that the config names."""
    if architecture.act is not None:
        return get_attribute_at(host, architecture.act)
    return ACT2FN[get_attribute_at(config, str(architecture.activation))]
