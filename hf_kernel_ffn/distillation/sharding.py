"""The student's FFNs cut over the processes (FSDP2).

Each process holds its share of the weights, the gradients and the optimiser's state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..families.student import make_student_from_entry

if TYPE_CHECKING:
    from ..families.student import ConvertedModel


def shard(ffns: Iterable[nn.Module], device: torch.device, reshard: bool) -> None:
    """Leave each process its share of every FFN's parameters.

    They are gathered when the FFN runs, and given up after its forward pass if ``reshard``,
    otherwise after its backward pass. The rest of the student is frozen, and stays whole.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for ffn in ffns:
        fully_shard(ffn, mesh=mesh, reshard_after_forward=reshard)
        register_fsdp_forward_method(ffn, "fit_threshold")


def gather_full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; then every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of ``tensors`` is cut over processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """``tensor``, sharded as ``parameter`` is if it is of its shape."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def unsharded(student: ConvertedModel, teacher: PreTrainedModel) -> ConvertedModel:
    """The student in one piece, around the other weights of the sharded one.

    Every process has to ask for it.
    """
    whole = make_student_from_entry(teacher, student.config.kernel_ffn)
    others = dict(student.named_parameters())
    for name, parameter in whole.named_parameters():
        if not isinstance(others[name], DTensor):
            parameter.data = others[name].data
    for path, ffn in student.kernel_ffns().items():
        tensors = {name: gather_full(tensor) for name, tensor in ffn.state_dict().items()}
        whole.base_model.get_submodule(path).load_state_dict(tensors, assign=True)
    return whole
