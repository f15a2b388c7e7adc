"""Facts about torch, transformers, peft and accelerate that they do not promise to keep, one small
function each.

A checkpoint carries this code for years. Where a later version no longer has such a fact, the
function answers what is safe, and the checkpoint still loads and computes the same.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from typing import Any

import torch
from torch import Tensor, nn

HOOK_REGISTRIES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Attributes of a module under which torch keeps the hooks that a call of it runs."""


def are_function_transforms_active() -> bool:
    """Whether a transform of torch.func (grad, vmap, …) is running; False where torch cannot say.

    The operators of one_pass.py have no rule for such transforms, which then raise an error.
    """
    check = getattr(torch._C, "_are_functorch_transforms_active", None)
    return False if check is None else check()


def get_tensor_version(tensor: Tensor) -> int | None:
    """How often ``tensor`` was changed in place; None where torch does not count it."""
    return getattr(tensor, "_version", None)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs a hook of its own; a registry that is gone holds none."""
    attributes = vars(module)
    return any(map(attributes.get, HOOK_REGISTRIES))


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance has its own ``forward``, as accelerate gives to what it offloads."""
    return "forward" in vars(module)


def is_lora_layer(module: nn.Module) -> bool:
    """Whether ``module`` is peft's LoRA around a linear module."""
    return hasattr(module, "lora_A")


def adds_its_delta_alone(lora_layer: nn.Module, adapter: str) -> bool:
    """Whether ``adapter`` of peft's ``lora_layer`` adds its delta to the weight and does no more.

    False for a variant such as DoRA, for an adapter with a bias, and where peft does not say.
    """
    variants = getattr(lora_layer, "lora_variant", None)
    biases = getattr(lora_layer, "lora_bias", None)
    if variants is None or biases is None:
        return False
    return adapter not in variants and not biases.get(adapter)


def get_parallel_plan(module: nn.Module, kind: str) -> dict[str, Any] | None:
    """The plan of a ``kind``, "tp" or "ep", that transformers keeps on a model; None without one.

    The public property, ``tp_plan``, warns of entries when it is set before all are right.
    """
    plan = vars(module).get(f"_{kind}_plan")
    return plan if isinstance(plan, dict) else None


def set_parallel_plan(module: nn.Module, kind: str, plan: dict[str, Any]) -> None:
    """Set what :func:`get_parallel_plan` gives."""
    setattr(module, f"_{kind}_plan", plan)
