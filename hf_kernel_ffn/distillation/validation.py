"""The loss of a stage on text that is held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..text.packing import read_token_ids
from ..text.prediction import make_inputs_for_prediction
from .models import Models
from .objectives import OBJECTIVES
from .recipe import Recipe, Stage
from .step import Step


class HeldOutText:
    """The text of ``data.validation``, read once."""

    def __init__(self, recipe: Recipe, models: Models):
        """
        Raises:
            InputError: the text cannot be read, or is shorter than one sequence.
        """
        data = recipe.data
        self.seed = recipe.seed
        self.ids = read_token_ids(
            models.tokenizer,
            data.validation_sources,
            data.sequence_length,
            data.validation_tokens,
            data.text_format,
        )
        """(sequences, sequence_length)."""

    @torch.no_grad()
    def loss(
        self, stage: Stage, ffns: Mapping[str, nn.Module], models: Models, device: torch.device
    ) -> float:
        """The loss of ``stage`` over the whole text, by the running teacher, without dropout.

        It is the mean over batches of the stage's size, weighted by their rows, and the same one on
        every process, since each reads all of the text.
        """
        total = 0.0
        with evaluating(models.trainee):
            for number, ids in enumerate(self.ids.split(stage.batch_size)):
                batch = make_inputs_for_prediction(
                    models.teacher,
                    models.tokenizer,
                    ids.to(device),
                    f"{self.seed} validation {number}",
                )
                step = Step(stage, models.signals[None], models.trainee, ffns, batch)
                total += len(ids) * OBJECTIVES[stage.name](step).item()
        return total / len(self.ids)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules of ``model`` in evaluation mode while the context is open: no dropout, and no
    random number drawn."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
