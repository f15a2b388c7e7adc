"""The accelerator that a recipe runs on, and what of its surroundings a recipe does not allow."""

from __future__ import annotations

import difflib
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    LoggerType,
)

from ..checkpoint_code.errors import InputError, MissingPackage
from ..storage.loading import get_torch_dtype
from .recipe import Recipe

ALL_TRACKERS = "all"
"""accelerate's word for every tracker that is installed."""


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The accelerator that the stages of ``recipe`` run on.

    The recipe holds: mixed precision, gradient accumulation and compilation that the launcher asks
    for (``ACCELERATE_MIXED_PRECISION`` and its like) are switched off, since the stages see to the
    first two by themselves.

    Raises:
        InputError: it was launched with DeepSpeed, Megatron or accelerate's own FSDP, under which
            gradients would go unshared; or this process has an accelerator of another precision.
    """
    try:
        accelerator = Accelerator(
            log_with=recipe.trackers or None,
            project_dir=recipe.output_dir,
            mixed_precision="no",
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:  # accelerate keeps one state for a process
        reason = " ".join(str(error).split())
        raise InputError(
            f"found an accelerator in this process already ({reason}), expected none in mixed "
            "precision: distil in a fresh process"
        ) from error
    if accelerator.distributed_type in (
        DistributedType.DEEPSPEED,
        DistributedType.FSDP,
        DistributedType.MEGATRON_LM,
    ):
        raise InputError(
            f"found a launch with {accelerator.distributed_type.value}, expected plain processes: "
            "leave it out and say shard: true in the recipe"
        )
    return accelerator


def allow_idle_experts(accelerator: Accelerator) -> None:
    """Let DistributedDataParallel look for parameters that a batch does not use: those of experts
    without tokens. It would wait for their gradients."""
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)


def check_trackers(recipe: Recipe) -> None:
    """Check ``trackers`` before anything is loaded.

    Raises:
        InputError: accelerate does not know one.
        MissingPackage: its package is not installed.
    """
    installed = [ALL_TRACKERS, *map(str, get_available_trackers())]
    of_accelerate = [str(name) for name in LoggerType]
    known = [ALL_TRACKERS, *LOGGER_TYPE_TO_CLASS]  # with those that somebody has registered
    for name in recipe.trackers:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise InputError(f"found an unknown tracker {name!r} in trackers: {hint}")
        if name in of_accelerate and name not in installed:
            raise MissingPackage(
                f"found the tracker {name!r}, whose package is not installed: "
                "install it, or leave it out of trackers"
            )


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which models of a recipe's ``dtype`` run."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, get_torch_dtype(dtype))
