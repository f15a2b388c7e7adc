"""Sums and means over all processes. Each has to ask for the same ones in the same order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def several_processes() -> bool:
    """Whether this is one of several processes that were launched together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def count_processes() -> int:
    """How many processes were launched together."""
    return dist.get_world_size() if several_processes() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """``tensor`` added up over all processes; no gradient runs through it."""
    if not several_processes():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_processes(tensor: Tensor) -> Tensor:
    """``tensor`` averaged over all processes; no gradient runs through it."""
    return sum_over_processes(tensor) / count_processes()


def average_in_place(tensor: Tensor) -> None:
    """Make ``tensor`` its mean over all processes."""
    if several_processes():
        tensor.copy_(mean_over_processes(tensor))


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Make every gradient its mean over all processes.

    A process in which a parameter got no gradient, such as that of an expert without tokens, counts
    with zeros. A parameter that got none in any process keeps none.
    """
    if not several_processes():
        return
    has_gradient = torch.tensor(
        [parameter.grad is not None for parameter in parameters],
        dtype=torch.float32,
        device=parameters[0].device,
    )
    dist.all_reduce(has_gradient)
    for parameter, count in zip(parameters, has_gradient.tolist(), strict=True):
        if not count:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        average_in_place(parameter.grad)
