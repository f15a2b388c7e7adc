"""One step of the optimisers: gradients of all its batches, and what all processes make of them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from .accelerator import autocast
from .collectives import average_gradients, average_in_place
from .failures import are_finite
from .objectives import OBJECTIVES
from .part import Part
from .recipe import Recipe
from .step import Step, accumulate_gradients
from .stopping import Stop
from .thresholds import Watch


class GradientStep:
    """What a step consists of, the same one in every process."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, stop: Stop, *, sharded: bool):
        """``sharded``: whether the processes share the FFNs out among them."""
        self.recipe = recipe
        self.accelerator = accelerator
        self.stop = stop
        self.sharded = sharded

    def accumulate(self, part: Part, watch: Watch) -> Tensor:
        """Add up the gradients of all batches; the mean loss of this process."""
        count = len(part.batches)
        step = Step(
            stage=part.stage,
            signal=part.signal,
            student=part.model,
            ffns=part.ffns,
            batch=part.batches[0],
            backward=lambda loss: self.accelerator.backward(loss / count),
            price=watch.price,
            batches=part.batches,
        )
        losses = []
        for number, batch in enumerate(part.batches):
            watch.begin_batch(number)
            with self._gradient_sync(part, last=number + 1 == count), self.autocast():
                objective = OBJECTIVES[part.stage.name]
                losses.append(accumulate_gradients(objective, replace(step, batch=batch)))
        return torch.stack(losses).mean()

    def _gradient_sync(self, part: Part, *, last: bool) -> AbstractContextManager[object]:
        """DistributedDataParallel averages gradients in the ``last`` backward pass of a step."""
        return nullcontext() if last else self.accelerator.no_sync(part.model)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which models run."""
        return autocast(self.recipe.dtype, self.accelerator.device)

    def agree(self, loss: Tensor) -> tuple[float, bool]:
        """The mean loss of all processes, and whether one of them was asked to stop."""
        asked = loss.new_full((), self.stop.asked, dtype=torch.float64)
        pair = torch.stack([loss.double(), asked])
        average_in_place(pair)
        mean_loss, share_asked = pair.tolist()
        return mean_loss, share_asked > 0

    def is_usable(self, loss: float, part: Part) -> bool:
        """Whether a step may be made.

        Gradients are looked at only where a bad one could be left out: otherwise the weights are,
        before they are saved.
        """
        if not math.isfinite(loss) or not self.recipe.skip_steps:
            return math.isfinite(loss)
        gradients = [parameter.grad for parameter in part.parameters]
        return are_finite([gradient for gradient in gradients if gradient is not None])

    def update(self, part: Part, watch: Watch, step: int) -> None:
        """Make the optimisers' step, and let thresholds follow."""
        if part.layer_wise and not self.sharded:
            average_gradients(part.parameters)
        if not part.layer_wise:
            self.accelerator.clip_grad_norm_(part.parameters, part.stage.clip)
        part.apply_gradients()
        watch.after(step, average_in_place)
        reshard(part)  # fitting a threshold has gathered the weights


def reshard(part: Part) -> None:
    """Leave this process its share of weights that something else than training has gathered."""
    for ffn in part.ffns.values():
        if isinstance(ffn, FSDPModule):
            ffn.reshard()
