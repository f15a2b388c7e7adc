"""What an objective is given: one batch of a step, and everything that its loss is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..text.inputs import Inputs
from .recipe import Stage
from .teacher_signal import TeacherSignal

Backward = Callable[[Tensor], None]
"""Adds the gradient of a scalar to the parameters."""
Price = Callable[[str], Tensor | float]
"""What to add to the loss for the FFN at a path that has just run (or, of a mixture, has not)."""


def no_price(path: str) -> float:
    """Nothing."""
    return 0.0


@dataclass(frozen=True)
class TargetStatistics:
    """What all calls of an optimiser step say of one FFN's targets, over all processes."""

    tokens: Tensor
    """How many tokens it is given in one call on one process, on average; a scalar."""
    variance: Tensor
    """Mean square of the targets' numbers around the mean target, spikes shortened; a scalar."""
    longest: Tensor
    """A longer target is a spike, and counts as one of this length; a scalar."""


@dataclass(frozen=True)
class Step:
    """One batch of an optimiser step."""

    stage: Stage
    signal: TeacherSignal
    """What the teacher says of a batch."""
    student: nn.Module
    """The student as it is called: perhaps inside peft or DistributedDataParallel."""
    ffns: Mapping[str, nn.Module]
    """The student's FFNs that the stage trains, by path."""
    batch: Inputs
    """What is read now."""
    backward: Backward | None = None
    """The one way to gradients; None where the loss is only looked at. Only an objective that has
    to free a part of its graph before it builds the next one (layer-wise: one FFN's at a time)
    calls it, and then returns a loss without a graph. The caller does it for all others."""
    price: Price = no_price
    batches: Sequence[Inputs] = ()
    """All that this process reads in the optimiser's step, one call of the objective for each
    (gradient accumulation). Where there is one or none, ``batch`` is all."""
    statistics: dict[tuple[str, int], TargetStatistics] = field(default_factory=dict)
    """What the calls of one optimiser step share, by path and how often the FFN has run before in
    the same pass (FFNs that layers share)."""


Objective = Callable[[Step], Tensor]
"""The loss of a step, a scalar without the price: with its graph, or without one if the objective
has called ``step.backward`` itself."""


def accumulate_gradients(objective: Objective, step: Step) -> Tensor:
    """Add the gradients of the loss, price included, to the parameters.

    Returns:
        the loss without the price, detached.
    """
    loss = objective(step)
    if loss.requires_grad and step.backward is not None:
        prices = [step.price(path) for path in step.ffns]
        step.backward(loss + sum(prices) / len(prices))
    return loss.detach()
