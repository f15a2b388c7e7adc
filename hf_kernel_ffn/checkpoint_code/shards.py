"""Linear modules and tensors of which each process has a part, by tensor parallelism.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .compat import has_own_forward

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate


def is_split(linear: nn.Module) -> bool:
    """Whether a call of ``linear`` uses this process's part of its weight.

    transformers' tensor parallelism gives such modules a forward of their own. A weight that FSDP
    has spread is whole again whenever its module is called.
    """
    weight = getattr(linear, "weight", None)
    is_spread = torch.distributed.is_available() and isinstance(weight, DTensor)
    return is_spread and has_own_forward(linear)


def get_local(tensor: Any) -> Any:
    """This process's part of ``tensor``; ``tensor`` itself if it is None or not spread."""
    if torch.distributed.is_available() and isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor


def sum_gradient(tensor: Tensor, over: Tensor) -> Tensor:
    """``tensor``, which every process has, where each uses it for its own part of ``over``.

    Its gradient is the sum of those that the processes find.
    """
    if not torch.is_grad_enabled():
        return tensor
    mesh = over.device_mesh  # type: ignore[attr-defined]
    whole = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])
