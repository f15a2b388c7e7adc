"""Linear modules in a model: their weights under adapters and quantisation, and in memory.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from .compat import adds_its_delta_alone, has_hooks, has_own_forward, is_lora_layer
from .shards import get_local, is_split


def is_plain(linear: nn.Module) -> bool:
    """Whether ``linear`` is its weight and bias alone: no adapter, quantised weight, or hook."""
    return _has_plain_weight(linear) and not has_hooks(linear) and not has_own_forward(linear)


def get_effective_weight(linear: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """What ``linear`` multiplies by and adds, adapters and quantisation included.

    Args:
        like: any input of ``linear``, for its device and dtype.

    Returns:
        the weight (out_features, in_features), and the bias (out_features,) or None; this
        process's part of them where tensor parallelism has split them.
    """
    if _has_plain_weight(linear):
        plain = cast(nn.Linear, linear)
        return plain.weight, plain.bias
    if is_split(linear):
        return get_local(linear.weight), get_local(linear.bias)
    if is_lora_layer(linear):
        lora: Any = linear
        if lora.disable_adapters or lora.merged:
            return get_effective_weight(lora.get_base_layer(), like)
        adapters = [name for name in lora.active_adapters if name in lora.lora_A]
        if all(adds_its_delta_alone(lora, name) for name in adapters):
            weight, bias = get_effective_weight(lora.get_base_layer(), like)
            return weight + sum(lora.get_delta_weight(name) for name in adapters), bias
    return _probe_weight(linear, like)


def lay_out_by_prototypes(linear: nn.Linear) -> None:
    """Store the weight column by column, so that a few output prototypes are read quickly.

    The weight's values, shape and gradient stay as they are.
    """
    with torch.inference_mode(False):
        linear.weight.data = linear.weight.data.T.contiguous().T


def _has_plain_weight(linear: nn.Module) -> bool:
    if type(linear) is not nn.Linear:
        return False
    return type(linear.weight) in (nn.Parameter, Tensor) and not linear.weight.is_meta


def _probe_weight(linear: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of any linear map, DoRA or quantised, by its outputs at unit vectors."""
    unit = torch.eye(linear.in_features, device=like.device, dtype=like.dtype)
    zero = torch.zeros_like(unit[:1])
    outputs = linear(torch.cat([zero, unit]))
    return (outputs[1:] - outputs[0]).T, outputs[0]
