"""Where prototypes fire: their top contexts and their use over a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..progress import track_progress
from .model_parts import ffn_readout, get_embedding_weight, list_ffn_paths, read_row_inputs
from .top_k import merge_top_k

BEFORE = 8
"""Tokens of a context before the one that fires."""
AFTER = 2
"""Tokens of a context after the one that fires."""
SKIP = 8
"""Positions at the start of each row that are left out: with little before it, a token's input is
much the same everywhere."""
RARE = 0.001
"""A prototype is rare below this share of tokens."""
ALWAYS = 0.5
"""A prototype is always on above this share of tokens."""
OUTSIDE = -1
"""Stands in a context for a token beyond the row's ends."""


class Contexts(NamedTuple):
    """Of one FFN's P prototypes: the strongest contexts, and how often each is used."""

    values: Tensor
    """(P, top) float32, descending: |coefficient| at the token that fires; 0 where a prototype
    fires on fewer tokens."""
    windows: Tensor
    """(P, top, BEFORE + 1 + AFTER) int32 token ids around it, OUTSIDE beyond the row's ends."""
    activations: Tensor
    """Same shape, float32: the signed coefficient at each of them."""
    fired: Tensor
    """(P,) int64: tokens on which the coefficient is not zero."""
    coefficients: Tensor
    """(P,) float64: Σ|c| over the text."""
    squares: Tensor
    """(P,) float64: Σc² over the text."""
    mass: Tensor
    """(P,) float64: Σ|c|‖v‖ over the text."""
    tokens: int
    """Tokens read."""

    def usage(self) -> list[str]:
        """Per prototype: dead, rare (under 0.1% of tokens), usual, or always on (over half)."""
        shares = self.fired.double() / self.tokens
        return [_describe_usage(share) for share in shares.tolist()]

    def purity(self) -> Tensor:
        """(P,) float64: the share of a prototype's top contexts that fire on their most common
        token.

        NaN where it fires on fewer tokens than there are contexts (fewer are purer by chance
        alone).
        """
        firing_tokens = self.windows[:, :, BEFORE]
        most_common = firing_tokens.mode(-1, keepdim=True).values
        share = (firing_tokens == most_common).double().mean(-1)
        return share.where(self.values[:, -1] > 0, torch.nan)

    def most_used(self, count: int) -> Tensor:
        """(count,) prototypes with the most mass, descending."""
        return self.mass.topk(min(count, len(self.mass))).indices


def _describe_usage(share: float) -> str:
    """A word for a prototype that fires on this ``share`` of tokens."""
    if share == 0:
        return "dead"
    if share < RARE:
        return "rare"
    return "always on" if share > ALWAYS else "usual"


@torch.no_grad()
def contexts(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    paths: Sequence[str] | None = None,
    *,
    top: int = 20,
    progress: bool = False,
) -> dict[str, Contexts]:
    """Stream token ids through ``model``, stock or converted, and keep each prototype's ``top``
    contexts.

    Args:
        batches: (rows, length) int64 each, such as ``ids.split(8)``; read once, one at a time:
            memory grows with prototypes × top, not with the text.
        paths: FFNs to read; None for all.

    Raises:
        InputError: the rows are too short, or an FFN does not read whole rows (a mixture's expert,
            one that several layers share).
    """
    model.eval()
    paths = list_ffn_paths(model) if paths is None else paths
    device = get_embedding_weight(model).device

    by_path: dict[str, Contexts] = {}
    for batch in track_progress(batches, "contexts", progress):
        if batch.ndim != 2 or batch.shape[1] <= SKIP:
            raise InputError(
                f"found ids of shape {tuple(batch.shape)}, expected rows longer than {SKIP} "
                "tokens: join short ones"
            )
        ids = batch.to(device)
        for path, inputs in read_row_inputs(model, paths, ids).items():
            record = ffn_readout(model, path, inputs)
            new = _read_batch(record.coefficients.float(), record.dictionary, ids, top)
            by_path[path] = _merge(by_path[path], new, top) if path in by_path else new
    return by_path


def _read_batch(coefficients: Tensor, dictionary: Tensor, ids: Tensor, top: int) -> Contexts:
    """The contexts of one batch: ``coefficients`` (rows, length, P) at ``ids`` (rows, length)."""
    length = ids.shape[1]
    sizes = coefficients[:, SKIP:].flatten(0, 1).abs()
    values, places = sizes.T.topk(min(top, len(sizes)))
    row = places // (length - SKIP)
    position = places % (length - SKIP) + SKIP

    around = torch.arange(-BEFORE, AFTER + 1, device=ids.device)
    where = position[..., None] + around
    inside = (where >= 0) & (where < length)
    where = where.clamp(0, length - 1)
    prototype = torch.arange(coefficients.shape[2], device=ids.device)[:, None, None]
    windows = ids[row[..., None], where].where(inside, OUTSIDE)
    activations = coefficients[row[..., None], where, prototype].where(inside, 0.0)

    total = sizes.double().sum(0)
    return Contexts(
        values=values,
        windows=windows.to(torch.int32),
        activations=activations,
        fired=(sizes != 0).sum(0),
        coefficients=total,
        squares=sizes.double().square().sum(0),
        mass=total * dictionary.double().norm(dim=-1),
        tokens=len(sizes),
    )


def _merge(before: Contexts, new: Contexts, top: int) -> Contexts:
    """The contexts of two texts together."""
    values, windows, activations = merge_top_k(before[:3], new[:3], top)
    return Contexts(
        values=values,
        windows=windows,
        activations=activations,
        fired=before.fired + new.fired,
        coefficients=before.coefficients + new.coefficients,
        squares=before.squares + new.squares,
        mass=before.mass + new.mass,
        tokens=before.tokens + new.tokens,
    )
