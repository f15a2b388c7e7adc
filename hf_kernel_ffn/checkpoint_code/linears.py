"""Linear modules as they stand in a model: their effective weights under adapters and quantisation, and how they lie in memory.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from typing import Any

import torch
from torch import Tensor, nn


def is_plain(linear) -> bool:
    """Whether ``linear`` is its weight and bias and nothing else: no adapter, quantisation, offloading or hook."""
    return (
        type(linear) is nn.Linear
        and type(linear.weight) in (nn.Parameter, Tensor)
        and not linear.weight.is_meta
        and not (
            linear._forward_hooks
            or linear._forward_pre_hooks
            or linear._backward_hooks
            or linear._backward_pre_hooks
        )
        and "forward" not in vars(linear)
    )


def get_effective_weight(linear: Any, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """(out_features, in_features) and (out_features,): what ``linear`` multiplies by and adds, adapters and
    quantisation included; ``like`` is an input of it."""
    weight = linear.weight
    if type(linear) is nn.Linear and type(weight) in (nn.Parameter, Tensor) and not weight.is_meta:
        return weight, linear.bias
    if hasattr(linear, "lora_A"):  # a peft adapter around the weight
        if linear.disable_adapters or linear.merged:
            return get_effective_weight(linear.get_base_layer(), like)
        active = [name for name in linear.active_adapters if name in linear.lora_A]
        if not any(name in linear.lora_variant or linear.lora_bias.get(name) for name in active):
            weight, bias = get_effective_weight(linear.get_base_layer(), like)
            return weight + sum(linear.get_delta_weight(name) for name in active), bias
    # Whatever else stands there (DoRA, a quantised layer, an offloaded weight): ask it what it does to zero and the unit vectors.
    features = linear.in_features
    unit = torch.eye(features, device=like.device, dtype=like.dtype)
    rows = linear(torch.cat([torch.zeros_like(unit[:1]), unit]))
    return (rows[1:] - rows[0]).T, rows[0]


def lay_out_by_prototypes(linear) -> None:
    """The same weight, with the numbers of one output prototype side by side in memory, so that a few of them are quickly read."""
    with torch.inference_mode(False):
        linear.weight.data = linear.weight.data.T.contiguous().T
