"""Optimisers of a stage: one step size per tensor, in proportion to the tensor, along a cosine."""

from __future__ import annotations

import math

import torch
from torch import nn

from .recipe import Stage
from .sharding import gather_full

MUON_STEP = 0.2
"""Root mean square of Muon's update at learning rate 1 when it is matched to AdamW's (torch.optim.Muon)."""


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at ``step``: a linear rise over ``warmup`` of the steps, then a cosine down to zero."""
    rise = max(1.0, warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def optimizers(
    model: nn.Module, parameters: list[nn.Parameter], stage: Stage
) -> list[torch.optim.Optimizer]:
    """What trains ``parameters`` of ``model``: AdamW, or Muon on matrices with AdamW on the rest. Groups hold their ``peak``."""
    groups = _groups(model, parameters, stage)
    if stage.optimizer == "adamw":
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95))]
    matrices = [
        group
        for group in groups
        if min(group["params"][0].shape) > 1 and group["params"][0].ndim == 2
    ]
    vectors = [group for group in groups if not any(group is matrix for matrix in matrices)]
    for group in matrices:
        group["peak"] /= MUON_STEP
    return [
        torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(vectors, betas=(0.9, 0.95)),
    ]


def _groups(model: nn.Module, parameters: list[nn.Parameter], stage: Stage) -> list[dict]:
    """One optimiser group per tensor, its peak learning rate in proportion to the tensor's scale."""
    wanted = {id(p) for p in parameters}
    groups = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in wanted:
                continue
            scale = _size(parameter)
            if (
                leaf == "bias" and weight is not None
            ):  # added to weight @ x, with x of order one per feature
                scale = max(scale, _size(weight) * weight.shape[1] ** 0.5)
            if ".log_ratio" in name or scale == 0:
                scale = 1.0 if parameter.numel() == 1 else parameter.shape[-1] ** -0.5
            decay = stage.weight_decay if parameter.ndim == 2 else 0.0
            groups.append(
                {"params": [parameter], "peak": stage.learning_rate * scale, "weight_decay": decay}
            )
    return groups


def _size(parameter: torch.Tensor) -> float:
    return gather_full(parameter.detach()).square().mean().sqrt().item()
