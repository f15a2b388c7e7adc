"""What the stages of a recipe amount to: parts, steps and sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .recipe import Data, Recipe, Stage


def stage_parts(recipe: Recipe, paths: list[str]) -> Iterator[tuple[Stage, list[str]]]:
    """The stages, each with the FFNs of ``paths``, all that are converted, that it trains.

    A layer-wise stage with ``layers_at_once`` gives one part for each group of layers.
    """
    for stage in recipe.stages:
        size = len(paths)
        if stage.name == "layer-wise" and stage.layers_at_once:
            size = stage.layers_at_once
        for first in range(0, len(paths), size):
            yield stage, paths[first : first + size]


def rows_per_step(stage: Stage) -> int:
    """Sequences that one process reads in a step of ``stage``."""
    return stage.batch_size * stage.gradient_accumulation_steps


def steps_and_sequences(stage: Stage, data: Data, processes: int) -> tuple[int, int]:
    """How many steps a part of ``stage`` has, and how many sequences that many ``processes`` read
    together in each."""
    per_step = rows_per_step(stage) * processes
    return math.ceil(stage.tokens / (per_step * data.sequence_length)), per_step


def steps_between(tokens: int, tokens_per_step: int) -> int:
    """How many steps apart something is that is done about every so many ``tokens``."""
    return max(1, tokens // tokens_per_step)
