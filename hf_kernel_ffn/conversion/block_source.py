"""What the FFNs of a model read on the rows of a calibration set, one block after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.lookup import StockFFN, get_family_name
from ..families.registry import get_architecture
from .calibration_set import CalibrationSet, Purpose
from .sampling import (
    Reached,
    collect_ffn_inputs,
    make_unread_error,
    run_base_model,
    thin_batches,
)

Pass = Callable[[], object]
"""Runs the model, or a part of it, over one batch."""


class BlockSource:
    """Reads the inputs of FFNs, block after block, while earlier blocks are being converted.

    This one runs the model from its embedding on at every pass. It serves every model, in time
    quadratic in the number of blocks; :class:`hf_kernel_ffn.conversion.replay.Replay` is linear.
    """

    def __init__(self, model: PreTrainedModel, calibration: CalibrationSet):
        """Read FFNs of ``model`` on the rows of ``calibration``."""
        self.model = model
        self.calibration = calibration
        self._shared = get_architecture(get_family_name(model)).shared
        self._mixtures: set[str] = set()
        self._host_passes: dict[tuple[str, Purpose], list[Pass]] = {}

    def open_block(self, ffns: Sequence[StockFFN]) -> None:
        """Begin with a block, of which ``ffns`` are going to be read."""
        hosts = Counter(ffn.host_path for ffn in ffns)
        several = {path for path, count in hosts.items() if count > 1}
        self._mixtures = set() if self._shared else several
        self._host_passes.clear()

    def read(self, ffn: StockFFN, purpose: Purpose) -> Iterator[Tensor]:
        """Yield the inputs (tokens, hidden_size) of ``ffn`` on the rows of a purpose, by batches.

        Where the block has several FFNs in one module, the experts of a mixture, the model runs
        once for all of them, and what came to that module is kept until the next block.

        Raises:
            InputError: nothing that the model reads comes to that FFN.
        """
        passes: Iterable[Pass]
        if ffn.host_path in self._mixtures:
            passes = self._passes_of_host(ffn, purpose)
        else:
            passes = self.model_passes(purpose)
        return collect_ffn_inputs(self.model, ffn.path, passes)

    def read_fit_sample(self, ffn: StockFFN) -> Tensor:
        """Read (tokens, hidden_size) float32: evenly spaced inputs of ``ffn`` to fit on."""
        return thin_batches(self.read(ffn, "fit"), self.calibration.fit_every)

    def close_blocks(self, last: int) -> None:
        """End the blocks up to number ``last``: none of their FFNs is read or changed any more."""

    def model_passes(self, purpose: Purpose) -> Iterator[Pass]:
        """Yield a pass of the model for every batch of a purpose."""
        for batch in self.calibration.batches(purpose):
            yield partial(run_base_model, self.model, batch)

    def _passes_of_host(self, ffn: StockFFN, purpose: Purpose) -> list[Pass]:
        """Passes of the module that holds ``ffn`` over what comes to it, found once a block."""
        key = ffn.host_path, purpose
        if key not in self._host_passes:
            passes = self.model_passes(purpose)
            self._host_passes[key] = record_calls(ffn.host, ffn.host_path, passes)
        return self._host_passes[key]


@torch.no_grad()
def record_calls(module: nn.Module, path: str, passes: Iterable[Pass]) -> list[Pass]:
    """Run each of ``passes`` as far as ``module``, and return the calls of it that follow there.

    Raises:
        InputError: a pass does not come to the module, which is at ``path``.
    """
    calls: list[Pass] = []

    def stop(called: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        calls.append(partial(called, *args, **kwargs))
        raise Reached

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for number, run in enumerate(passes):
            with suppress(Reached):
                run()
            if len(calls) == number:
                raise make_unread_error(path)
    finally:
        hook.remove()
    return calls
