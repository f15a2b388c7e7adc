"""Where prototypes fire: their top contexts and their use over a corpus, and the rules that
follow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from ..families.hooks import capture_inputs_and_outputs
from ..storage.files import replace_file
from .model_parts import (
    decode_tokens,
    ffn_readout,
    get_embedding_weight,
    get_layer_number,
    list_ffn_paths,
    read_dictionary,
)
from .naming import Written, nearest_tokens, written
from .rows import Rows
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
        InputError: the rows are too short.
    """
    model.eval()
    paths = list_ffn_paths(model) if paths is None else paths
    modules = {path: model.base_model.get_submodule(path) for path in paths}
    device = get_embedding_weight(model).device

    by_path: dict[str, Contexts] = {}
    for batch in _progress(batches, progress):
        if batch.ndim != 2 or batch.shape[1] <= SKIP:
            raise InputError(
                f"found ids of shape {tuple(batch.shape)}, expected rows longer than {SKIP} "
                "tokens: join short ones"
            )
        ids = batch.to(device)
        with capture_inputs_and_outputs(modules) as captured:
            model.base_model(input_ids=ids, use_cache=False)
        for path in paths:
            record = ffn_readout(model, path, captured[path][0])
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


class Rule(NamedTuple):
    """One prototype as a rule: when the input looks like this, write that."""

    layer: int
    name: str
    when_token: str
    """Tokens whose own embeddings fire it most."""
    when_context: str
    """The text that fires it most, the token that does so in »«."""
    promotes: str
    suppresses: str
    usage: str
    """dead, rare, usual or always on."""
    purity: float | None
    """Share of its top contexts with the same token; None where it fires on too few."""


def rules(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    found: Contexts,
    prototypes: Iterable[int] | None = None,
) -> Rows[Rule]:
    """Put the prototypes of the FFN at ``path`` as rules.

    Args:
        found: its contexts.
        prototypes: which of them; None: all.
    """
    if prototypes is None:
        prototypes = range(len(found.mass))
    numbers = [int(number) for number in prototypes]
    record = read_dictionary(model, path)
    writes = written(model, tokenizer, record.dictionary[numbers])
    nearest = nearest_tokens(model, tokenizer, path)
    usage = found.usage()
    purity = found.purity().tolist()

    table = Rows[Rule]()
    for number, write in zip(numbers, writes, strict=True):
        fires = bool(found.values[number, 0] > 0)
        fires_too_rarely = purity[number] != purity[number]  # NaN
        table.append(
            Rule(
                layer=get_layer_number(path),
                name=record.names[number],
                when_token=_join_tokens(nearest[number]),
                when_context=mark_text(tokenizer, found.windows[number, 0]) if fires else "",
                promotes=_join_tokens(write.promoted),
                suppresses=_join_tokens(write.suppressed),
                usage=usage[number],
                purity=None if fires_too_rarely else purity[number],
            )
        )
    return table


def _join_tokens(tokens: Iterable[tuple[str, float]]) -> str:
    """Tokens with their values as one line of quoted tokens."""
    return " ".join(repr(token) for token, _ in tokens)


def mark_text(tokenizer: PreTrainedTokenizerBase, window: Tensor) -> str:
    """The text of ``window`` (BEFORE + 1 + AFTER,), the token that fires in »«."""

    def decode(part: Tensor) -> str:
        return decode_tokens(tokenizer, [number for number in part.tolist() if number != OUTSIDE])

    before = decode(window[:BEFORE])
    firing = decode(window[BEFORE : BEFORE + 1])
    after = decode(window[BEFORE + 1 :])
    return f"{before}»{firing}«{after}"


def export_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    found: dict[str, Contexts],
    file: Path | str,
) -> int:
    """Write JSON lines for an automatic labeller, one prototype a line; dead ones are left out.

    A line has layer, path, prototype, promoted and suppressed tokens, the share of tokens on which
    it fires, and its contexts as token strings with one activation each.

    Returns:
        How many lines were written.
    """
    lines = 0
    with replace_file(file) as beside, beside.open("w", encoding="utf-8") as out:
        for path, of_path in found.items():
            record = read_dictionary(model, path)
            for number, write in enumerate(written(model, tokenizer, record.dictionary)):
                if not of_path.fired[number]:
                    continue
                line = {
                    "layer": get_layer_number(path),
                    "path": path,
                    "prototype": record.names[number],
                    **_describe_prototype(tokenizer, of_path, number, write),
                }
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                lines += 1
    return lines


def _describe_prototype(
    tokenizer: PreTrainedTokenizerBase, found: Contexts, number: int, write: Written
) -> dict:
    """What a line of :func:`export_contexts` says of one prototype's use."""
    examples = []
    for value, window, activations in zip(
        found.values[number].tolist(),
        found.windows[number].tolist(),
        found.activations[number].tolist(),
        strict=True,
    ):
        if value <= 0:
            continue
        inside = [place for place, token in enumerate(window) if token != OUTSIDE]
        examples.append(
            {
                "tokens": [decode_tokens(tokenizer, [window[place]]) for place in inside],
                "activations": [activations[place] for place in inside],
            }
        )
    return {
        "promoted": [token for token, _ in write.promoted],
        "suppressed": [token for token, _ in write.suppressed],
        "fires_on": found.fired[number].item() / found.tokens,
        "contexts": examples,
    }


def _progress(batches: Iterable[Tensor], show: bool) -> Iterable[Tensor]:
    """``batches``, with a bar if it is to be shown."""
    if not show:
        return batches
    from rich.progress import track

    return track(list(batches), description="contexts")
