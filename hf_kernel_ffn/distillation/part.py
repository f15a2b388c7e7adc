"""A stage of a recipe, or one of its groups of layers, while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..checkpoint_code.tied import AnyKernelFFN
from ..text.inputs import Inputs
from .optimizers import schedule
from .recipe import Data, Stage
from .stages import steps_between
from .teacher_signal import TeacherSignal


@dataclass
class Part:
    """What the steps of a part share."""

    stage: Stage
    data: Data
    ffns: dict[str, AnyKernelFFN]
    """That it trains, by path."""
    parameters: list[nn.Parameter]
    """That it trains."""
    optimizers: list[torch.optim.Optimizer]
    signal: TeacherSignal
    model: nn.Module
    """The student as it is called."""
    steps: int
    sequences_per_step: int
    """Over all processes."""
    batches: list[Inputs] = field(default_factory=list)
    """What this process has read for the last step, one batch for each call."""

    @property
    def layer_wise(self) -> bool:
        """Whether gradients come from the FFNs themselves, and not from the whole model."""
        return self.stage.name == "layer-wise"

    @property
    def tokens_per_step(self) -> int:
        """Over all processes."""
        return self.sequences_per_step * self.data.sequence_length

    def is_last(self, step: int) -> bool:
        """Whether no step follows on ``step``."""
        return step + 1 == self.steps

    def saves_after(self, step: int, save_every_tokens: int) -> bool:
        """Whether a state is due after ``step``."""
        every = steps_between(save_every_tokens, self.tokens_per_step)
        return self.is_last(step) or (step + 1) % every == 0

    def validates_after(self, step: int) -> bool:
        """Whether the loss on held-out text, if there is any, is due after ``step``."""
        every = steps_between(self.data.validate_every_tokens, self.tokens_per_step)
        return self.is_last(step) or (step + 1) % every == 0

    def set_learning_rates(self, step: int) -> float:
        """Set what ``step`` asks for; returns it as a share of each tensor's size."""
        factor = schedule(step, self.steps, self.stage.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        return self.stage.learning_rate * factor

    def apply_gradients(self) -> None:
        """Make the optimisers' step."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_gradients(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
