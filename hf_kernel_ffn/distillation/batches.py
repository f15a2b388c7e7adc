"""The batches of a step: which sequences of the text a process reads, and what of them is
masked."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..text.inputs import Inputs, select_rows
from ..text.packing import PackedText
from ..text.prediction import make_inputs_for_prediction
from .models import Models
from .recipe import Data, Recipe, Stage
from .stages import rows_per_step


def open_text(tokenizer: PreTrainedTokenizerBase, data: Data, seed: int) -> PackedText:
    """The training text of a recipe, from its beginning."""
    return PackedText(
        tokenizer,
        data.sources,
        data.sequence_length,
        text_format=data.text_format,
        shuffle_buffer=data.shuffle_buffer,
        seed=seed,
    )


class BatchReader:
    """Reads the training text. Every process reads all of it, and keeps its share of each step."""

    def __init__(self, recipe: Recipe, models: Models, accelerator: Accelerator):
        self.text = open_text(models.tokenizer, recipe.data, recipe.seed)
        self.seed = recipe.seed
        self.models = models
        self.accelerator = accelerator

    def read(self, stage: Stage, sequences_read: int) -> list[Inputs]:
        """The next step's batches for this process, one for each call of the objective.

        Masks, if the models predict masked tokens, are drawn by the place in the text, which is
        ``sequences_read``, and by process.
        """
        rows = rows_per_step(stage)
        process = self.accelerator.process_index
        sequences = [next(self.text) for _ in range(rows * self.accelerator.num_processes)]
        own = sequences[process * rows : (process + 1) * rows]
        ids = torch.stack(own).to(self.accelerator.device)

        inputs = make_inputs_for_prediction(
            self.models.teacher,
            self.models.tokenizer,
            ids,
            f"{self.seed} {sequences_read} {process}",
        )
        size = stage.batch_size
        return [select_rows(inputs, slice(row, row + size)) for row in range(0, rows, size)]
