"""Reading each block once a pass: the blocks before it put out what they once did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ..families.lookup import find_stacks
from ..families.registry import get_architecture_of_model
from .block_source import BlockSource, Pass
from .calibration_set import PURPOSES, CalibrationSet, Purpose
from .sampling import Reached


class Replay(BlockSource):
    """Reads a block without those before it, whose outputs on the calibration rows are kept.

    They take hidden_size numbers per token that the calibration set reads. Blocks stay replaced
    until :func:`hf_kernel_ffn.conversion.teacher_state.keep_as_it_was` puts them back.
    """

    def __init__(self, model: PreTrainedModel, calibration: CalibrationSet):
        """Read FFNs of ``model``, in one stack of blocks, on the rows of ``calibration``."""
        super().__init__(model, calibration)
        self.blocks = list(model.base_model.get_submodule(find_only_stack(model)).children())
        self._outputs: dict[tuple[Purpose, int], object] = {}
        self._current: tuple[Purpose, int] = (PURPOSES[0], 0)

    def model_passes(self, purpose: Purpose) -> Iterator[Pass]:
        """Yield a pass of the model for every batch of a purpose."""
        for number, run in enumerate(super().model_passes(purpose)):
            yield partial(self._run_batch, (purpose, number), run)

    @torch.no_grad()
    def close_blocks(self, last: int) -> None:
        """Keep what block ``last`` puts out, and let the blocks up to it run no more."""

        def keep(block: nn.Module, args: object, output: object) -> None:
            self._outputs[self._current] = output
            raise Reached

        hook = self.blocks[last].register_forward_hook(keep)
        try:
            for purpose in PURPOSES:
                for run in self.model_passes(purpose):
                    with suppress(Reached):
                        run()
        finally:
            hook.remove()
        self._stand_in_for_blocks(last)

    def replay_output(self, last: int, output: object) -> None:
        """Let the blocks up to number ``last`` put out ``output`` for the first batch to fit on."""
        self._outputs[PURPOSES[0], 0] = output
        self._stand_in_for_blocks(last)

    def _run_batch(self, batch: tuple[Purpose, int], run: Pass) -> object:
        self._current = batch
        return run()

    def _stand_in_for_blocks(self, last: int) -> None:
        """Put the outputs kept in place of what the blocks up to number ``last`` compute."""
        for block in self.blocks[:last]:
            block.forward = self._get_output
        self.blocks[last].forward = self._copy_output

    def _get_output(self, *args: object, **kwargs: object) -> object:
        """Of any block but the last closed one: nothing that counts is computed from it."""
        return self._outputs[self._current]

    def _copy_output(self, *args: object, **kwargs: object) -> object:
        """Of the last closed block, a copy: what follows may write into what it is given."""
        return deepcopy(self._outputs[self._current])


def find_only_stack(model: PreTrainedModel) -> str:
    """Return the path under the base model of its blocks, where they are one stack."""
    [path] = find_stacks(model.base_model, get_architecture_of_model(model))
    return path


def find_reason_against_stack(model: PreTrainedModel) -> str | None:
    """Say why ``model`` is not one stack of blocks with FFNs of their own; None if it is.

    The model may be on the meta device.
    """
    architecture = get_architecture_of_model(model)
    stacks = find_stacks(model.base_model, architecture)
    if len(stacks) != 1:
        return f"it has {len(stacks)} stacks of blocks"
    if model.config.is_encoder_decoder:
        return "it is an encoder with a decoder"
    if architecture.shared:
        return "its layers share their FFNs"
    return None
