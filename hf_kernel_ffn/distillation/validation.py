"""The loss of a stage on text that is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..text.inputs import Inputs
from ..text.packing import read_token_ids
from ..text.prediction import make_inputs_for_prediction
from .recipe import Recipe


class HeldOutText:
    """The text of ``data.validation``, read once."""

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel
    ):
        """
        Raises:
            InputError: the text cannot be read, or is shorter than one sequence.
        """
        self.tokenizer = tokenizer
        self.teacher = teacher
        self.seed = recipe.seed
        data = recipe.data
        self.ids = read_token_ids(
            tokenizer,
            data.validation_sources,
            data.sequence_length,
            data.validation_tokens,
            data.text_field,
        )

    def batches(self, rows: int, device: torch.device) -> Iterator[Inputs]:
        """What the models read, so many sequences at a time; the same at every call."""
        for number, ids in enumerate(self.ids.split(rows)):
            seed = f"{self.seed} validation {number}"
            yield make_inputs_for_prediction(self.teacher, self.tokenizer, ids.to(device), seed)

    @torch.no_grad()
    def mean_loss(
        self, loss_of: Callable[[Inputs], Tensor], rows: int, device: torch.device
    ) -> float:
        """Mean of ``loss_of`` a batch of at most so many ``rows``, weighted by rows."""
        total = 0.0
        sizes = [len(ids) for ids in self.ids.split(rows)]
        for size, batch in zip(sizes, self.batches(rows, device), strict=True):
            total += size * loss_of(batch).item()
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
