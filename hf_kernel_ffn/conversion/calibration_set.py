"""Which rows a conversion reads, and for what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint_code.settings import KernelFFNConfig
from ..text.inputs import Inputs, count_rows, select_rows, tokens_per_row

CALIBRATION_TOKENS = 16_384
"""Tokens that a conversion reads, of the user's text or of the model's own making."""
PIECES_TOKENS = 4096
"""Tokens of its own that a model writes where all that is fitted are pieces of units. On SmolLM2
four times as many leave less KL, in more time (docs: Results)."""
PIECES_ROW_LENGTH = 64
"""Length of the rows that it then writes: many rows have many first tokens, which are what
spikes."""
FIT_TOKENS = 2048
"""Tokens on which the input prototypes of single units are fitted."""
PIECES_FIT_TOKENS = 12_288
"""Tokens on which the pieces of units are fitted: those of CALIBRATION_TOKENS that are not held
out. On SmolLM2 that many leave a quarter less KL than 2,048."""
FIT_ROWS = 32
"""Rows of text that those are taken from: with fewer the fit is worse, with more every layer is
read longer."""
BATCH_TOKENS = 4096
"""Tokens that the model reads at once."""
HELD_OUT_PARTS = 4
"""One of so many rows is held out."""

Purpose = Literal["fit", "ridge", "held_out"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
"""What rows are read for: each is a field of :class:`CalibrationSet`."""


@dataclass(frozen=True)
class CalibrationSet:
    """The rows that a conversion reads, chosen once and read in every block."""

    tokens: int
    """How many tokens all processes read together."""
    fit: Inputs
    """(rows, …) on which input prototypes are fitted, the same on every process."""
    ridge: Inputs
    """(rows, …) on which output prototypes are solved for, this process's share."""
    held_out: Inputs
    """(rows, …) by which the strength of the pull is chosen, this process's share."""
    fit_every: int
    """One of so many tokens of ``fit`` is fitted on."""

    @classmethod
    def choose(cls, inputs: Inputs, tokens: int) -> CalibrationSet:
        """Divide the first ``tokens`` of ``inputs`` (rows, …), at least one row, by what for."""
        rows = select_rows(inputs, slice(max(1, tokens // tokens_per_row(inputs))))
        ridge, held_out = split_fitted_and_held(rows)
        fit = select_fit_rows(rows)
        return cls(
            tokens=count_rows(rows) * tokens_per_row(rows),
            fit=fit,
            ridge=ridge,
            held_out=held_out,
            fit_every=thin_tokens(fit, FIT_TOKENS),
        )

    @classmethod
    def choose_for_pieces(cls, inputs: Inputs, tokens: int) -> CalibrationSet:
        """The same where no output prototypes are solved for: all but the rows held out are fit."""
        rows = select_rows(inputs, slice(max(1, tokens // tokens_per_row(inputs))))
        fitted, _ = _hold_out(rows)
        _, held_out = split_fitted_and_held(rows)
        most_rows = max(FIT_ROWS, PIECES_FIT_TOKENS // tokens_per_row(fitted))
        fit = select_fit_rows(fitted, most_rows)
        return cls(
            tokens=count_rows(rows) * tokens_per_row(rows),
            fit=fit,
            ridge=select_rows(fitted, slice(0)),
            held_out=held_out,
            fit_every=thin_tokens(fit, PIECES_FIT_TOKENS),
        )

    def batches(self, purpose: Purpose) -> Iterator[Inputs]:
        """Yield the rows of one purpose, about ``BATCH_TOKENS`` at a time."""
        return split_batches(getattr(self, purpose))


def fits_only_pieces(settings: Iterable[KernelFFNConfig]) -> bool:
    """Whether a conversion by ``settings``, one for each FFN, solves for no output prototypes."""
    return all(each.rows == "tied" and not (each.sparse or each.skip) for each in settings)


def choose_calibration(inputs: Inputs, tokens: int, *, only_pieces: bool) -> CalibrationSet:
    """Divide the first ``tokens`` of ``inputs`` (rows, …) by what they are read for."""
    if only_pieces:
        return CalibrationSet.choose_for_pieces(inputs, tokens)
    return CalibrationSet.choose(inputs, tokens)


def select_fit_rows(ids: Inputs, most: int | None = None) -> Inputs:
    """Select at most so many evenly spaced rows of ``ids`` (rows, …), to fit prototypes on.

    None: ``FIT_ROWS``.
    """
    count = count_rows(ids)
    return select_rows(ids, torch.linspace(0, count - 1, min(count, most or FIT_ROWS)).long())


def thin_tokens(rows: Inputs, tokens: int) -> int:
    """Return n such that one of n tokens of ``rows`` makes about ``tokens`` of them."""
    return max(1, count_rows(rows) * tokens_per_row(rows) // tokens)


def split_fitted_and_held(ids: Inputs) -> tuple[Inputs, Inputs]:
    """Split ``ids`` (rows, …) into rows to fit on and the last quarter of them to choose by.

    Returns this process's share of each.
    """
    fitted, held = _hold_out(ids)
    if not is_distributed():
        return fitted, held

    share = slice(dist.get_rank(), None, dist.get_world_size())
    return select_rows(fitted, share), select_rows(held, share)


def _hold_out(ids: Inputs) -> tuple[Inputs, Inputs]:
    """The same split, of all processes together."""
    if isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) < HELD_OUT_PARTS <= ids.shape[1]:
        length = ids.shape[1] // HELD_OUT_PARTS  # too few rows to hold out some of them
        ids = ids[:, : length * HELD_OUT_PARTS].reshape(HELD_OUT_PARTS * len(ids), -1)

    count = count_rows(ids)
    split = max(1, count * (HELD_OUT_PARTS - 1) // HELD_OUT_PARTS)
    fitted = select_rows(ids, slice(split))
    held = select_rows(ids, slice(split, None)) if split < count else ids
    return fitted, held


def split_batches(ids: Inputs) -> Iterator[Inputs]:
    """Yield ``ids`` (rows, …), about ``BATCH_TOKENS`` at a time."""
    size = max(1, BATCH_TOKENS // tokens_per_row(ids))
    for first in range(0, count_rows(ids), size):
        yield select_rows(ids, slice(first, first + size))


def is_distributed() -> bool:
    """Return whether torch.distributed is there and initialised."""
    return dist.is_available() and dist.is_initialized()
