"""Optimisers of a stage: one step size per tensor, in proportion to the tensor, along a cosine."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .recipe import Stage
from .sharding import gather_full, is_sharded

MUON_STEP = 0.2
"""Root mean square of Muon's update at learning rate 1 when it is matched to AdamW's
(torch.optim.Muon)."""
BETAS = (0.9, 0.95)
"""Of AdamW: the second moment of some twenty steps, since runs are short."""

FUSED = ("cpu", "cuda")
"""Devices on which AdamW's step of a tensor is one kernel: an eighth of the time on a CPU."""


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at ``step``.

    A linear rise over ``warmup`` (a share) of the ``steps``, then a cosine down to zero.
    """
    rise = max(1.0, warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def make_optimizers(
    model: nn.Module, parameters: list[nn.Parameter], stage: Stage
) -> list[torch.optim.Optimizer]:
    """What trains ``parameters`` of ``model``: AdamW, or Muon on matrices with AdamW on the rest.

    Each group of an optimiser is one tensor, and holds its highest learning rate as ``peak``.
    """
    groups = _make_groups(model, parameters, stage)
    # Every group is one tensor, for which torch chooses a loop over a dozen operations.
    has_kernel = all(parameter.device.type in FUSED for parameter in parameters)
    fused = True if has_kernel and not is_sharded(parameters) else None
    if stage.optimizer == "adamw":
        return [torch.optim.AdamW(groups, betas=BETAS, fused=fused)]

    matrices = [group for group in groups if group["is_matrix"]]
    others = [group for group in groups if not group["is_matrix"]]
    for group in matrices:
        group["peak"] /= MUON_STEP
    return [
        torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=BETAS, fused=fused),
    ]


def _make_groups(
    model: nn.Module, parameters: list[nn.Parameter], stage: Stage
) -> list[dict[str, Any]]:
    """One group per tensor, its peak learning rate in proportion to the tensor's scale."""
    trained = {id(parameter) for parameter in parameters}
    groups = []
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in trained:
                continue
            # The numbers of tied pieces stand in tables too, but are no map from x to y.
            is_table = isinstance(module, nn.ParameterDict)
            decay = stage.weight_decay if parameter.ndim == 2 and not is_table else 0.0
            peak = stage.learning_rate * _scale(name, module, leaf, parameter)
            is_matrix = parameter.ndim == 2 and min(parameter.shape) > 1 and not is_table
            groups.append(
                {
                    "params": [parameter],
                    "peak": peak,
                    "weight_decay": decay,
                    "is_matrix": is_matrix,
                }
            )
    return groups


def _scale(name: str, module: nn.Module, leaf: str, parameter: nn.Parameter) -> float:
    """What counts as the size of the numbers in ``parameter``, called ``leaf`` in ``module``.

    It is their root mean square; of tied pieces the median size, since a few knots stand a hundred
    times as far out as the others, which a step of their size would scatter.
    """
    scale = _root_mean_square(parameter)
    if isinstance(module, nn.ParameterDict) and parameter.numel() > 1:
        scale = gather_full(parameter.detach()).abs().median().item()
    weight = getattr(module, "weight", None)
    if leaf == "bias" and weight is not None:
        # It is added to weight @ x, with x of order one per feature.
        scale = max(scale, _root_mean_square(weight) * weight.shape[1] ** 0.5)
    if ".log_ratio" in name or scale == 0:
        return 1.0 if parameter.numel() == 1 else parameter.shape[-1] ** -0.5
    return scale


def _root_mean_square(parameter: torch.Tensor) -> float:
    return gather_full(parameter.detach()).square().mean().sqrt().item()
