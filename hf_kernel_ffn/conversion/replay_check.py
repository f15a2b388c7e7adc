"""Whether a model's blocks can be read without those before them, tried on one row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..text.inputs import select_rows
from .block_source import BlockSource
from .calibration_set import CalibrationSet
from .replay import Replay, find_reason_against_stack
from .sampling import Reached
from .teacher_state import keep_as_it_was


def open_block_source(model: PreTrainedModel, calibration: CalibrationSet) -> BlockSource:
    """Make the fastest source that can read the FFNs of ``model``, which is whole in memory."""
    if find_reason_against_replay(model, calibration) is None:
        return Replay(model, calibration)
    return BlockSource(model, calibration)


@torch.no_grad()
def find_reason_against_replay(model: PreTrainedModel, calibration: CalibrationSet) -> str | None:
    """Say why blocks of ``model`` cannot be read without those before them; None if they can.

    The blocks have to be one stack. What each is called with has to follow from what the one before
    it puts out and from what comes before all blocks, as it does not where a connection spans
    several blocks. That is tried on the first row, of which every block computes once.
    """
    reason = find_reason_against_stack(model)
    if reason is not None:
        return reason

    row = select_rows(calibration.fit, slice(1))
    row_alone = CalibrationSet(tokens=0, fit=row, ridge=row, held_out=row, fit_every=1)
    with keep_as_it_was(model):
        replay = Replay(model, row_alone)
        calls = _record_block_calls(replay, len(replay.blocks))
        if [call.number for call in calls] != list(range(len(replay.blocks))):
            return "its blocks do not run once each, in order"

        for number in range(1, len(calls)):
            replay.replay_output(number - 1, calls[number - 1].output)
            calls_again = _record_block_calls(replay, number)
            if not _are_equal(calls_again[-1].inputs, calls[number].inputs):
                return f"what its block {number} reads is not only what block {number - 1} puts out"
    return None


@dataclass
class BlockCall:
    """One call of a block."""

    number: int
    inputs: list[Tensor]
    """Copies of all tensors among its arguments, positional and named."""
    output: object = None
    """A copy."""


def _record_block_calls(replay: Replay, stop: int) -> list[BlockCall]:
    """Calls of blocks in the first pass of ``replay``, which ends as it comes to block ``stop``."""
    calls: list[BlockCall] = []
    numbers = {id(block): number for number, block in enumerate(replay.blocks)}

    def begin(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        number = numbers[id(block)]
        inputs = [tensor.clone() for tensor in _find_tensors((args, kwargs))]
        calls.append(BlockCall(number, inputs))
        if number == stop:
            raise Reached

    def end(block: nn.Module, args: tuple[object, ...], output: object) -> None:
        calls[-1].output = deepcopy(output)

    hooks = []
    try:
        for block in replay.blocks:
            hooks.append(block.register_forward_pre_hook(begin, with_kwargs=True))
            hooks.append(block.register_forward_hook(end))
        with suppress(Reached):
            next(replay.model_passes("fit"))()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _are_equal(tensors: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two lists hold the same numbers."""
    if len(tensors) != len(others):
        return False
    return all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


def _find_tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in a nest of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _find_tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _find_tensors(item)
