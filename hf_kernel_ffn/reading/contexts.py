"""Where prototypes fire: their top contexts and their use, streamed over a corpus, and the rules that follow."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint_code.errors import InputError
from ..families.hooks import capture_inputs_and_outputs
from ..families.lookup import find_ffn_paths
from ..storage.files import replace_file
from .naming import nearest_tokens, written
from .rows import Rows
from .tracing import family_of, ffn_readout, get_layer_number

BEFORE, AFTER = 8, 2
"""Tokens of a context on either side of the one that fires."""
SKIP = 8
"""Positions at the start of each row that are left out: with little before it, a token's input is much the same everywhere."""
RARE, ALWAYS = 0.001, 0.5
"""A prototype is rare below, and always on above, this share of tokens."""


class Contexts(NamedTuple):
    """Of one FFN's P prototypes: the strongest contexts, and how often each is used."""

    values: Tensor
    """(P, top) float32, descending: |coefficient| at the token that fires; 0 where a prototype fires on fewer tokens."""
    windows: Tensor
    """(P, top, BEFORE + 1 + AFTER) int32 token ids around it, −1 beyond the row's ends."""
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
        share = (self.fired.double() / self.tokens).tolist()
        return [
            "dead" if s == 0 else "rare" if s < RARE else "always on" if s > ALWAYS else "usual"
            for s in share
        ]

    def purity(self) -> Tensor:
        """(P,) float64: the share of a prototype's top contexts whose firing token is their most common one; NaN where it fires on
        fewer tokens than there are contexts (fewer are purer by chance alone)."""
        ids = self.windows[:, :, BEFORE]
        share = (ids == ids.mode(-1, keepdim=True).values).double().mean(-1)
        return share.where(self.values[:, -1] > 0, torch.nan)

    def most_used(self, count: int) -> Tensor:
        """(count,) prototypes with the most mass, descending."""
        return self.mass.topk(min(count, len(self.mass))).indices


@torch.no_grad()
def contexts(
    model: Any,
    batches: Iterable[Tensor],
    paths: list[str] | None = None,
    top: int = 20,
    progress: bool = False,
) -> dict[str, Contexts]:
    """Stream token ids through ``model``, stock or converted, and keep each prototype's ``top`` contexts.

    Args:
        batches: (rows, length) int64 each, such as ``ids.split(8)``; read once, one at a time: memory grows with prototypes × top,
            not with the text.
        paths: FFNs to read; None for all.

    Raises:
        InputError: the rows are too short.
    """
    paths = find_ffn_paths(model.eval(), family_of(model)) if paths is None else paths
    modules = {path: model.base_model.get_submodule(path) for path in paths}
    device = model.get_input_embeddings().weight.device
    found: dict[str, Contexts] = {}
    for batch in _progress(batches, progress):
        if batch.ndim != 2 or batch.shape[1] <= SKIP:
            raise InputError(
                f"found ids of shape {tuple(batch.shape)}, expected rows longer than {SKIP} tokens: join short ones"
            )
        ids = batch.to(device)
        with capture_inputs_and_outputs(modules) as seen:
            model.base_model(input_ids=ids, use_cache=False)
        for path in paths:
            record = ffn_readout(model, path, seen[path][0])
            new = _of_batch(record.coefficients.float(), record.dictionary, ids, top)
            found[path] = new if path not in found else _merged(found[path], new, top)
    return found


def _of_batch(c: Tensor, dictionary: Tensor, ids: Tensor, top: int) -> Contexts:
    """``c`` (rows, length, P)."""
    rows, length, _ = c.shape
    late = c[:, SKIP:]
    flat = late.flatten(0, 1).abs()
    values, places = flat.T.topk(min(top, len(flat)))
    row, position = places // (length - SKIP), places % (length - SKIP) + SKIP
    around = torch.arange(-BEFORE, AFTER + 1, device=ids.device)
    where = position[..., None] + around
    inside = (where >= 0) & (where < length)
    where = where.clamp(0, length - 1)
    windows = ids[row[..., None], where].where(inside, -1).to(torch.int32)
    unit = torch.arange(c.shape[2], device=ids.device)[:, None, None]
    activations = c[row[..., None], where, unit].where(inside, 0.0)
    total = flat.double().sum(0)
    mass = total * dictionary.double().norm(dim=-1)
    return Contexts(
        values,
        windows,
        activations,
        (flat != 0).sum(0),
        total,
        flat.double().square().sum(0),
        mass,
        len(flat),
    )


def _merged(a: Contexts, b: Contexts, top: int) -> Contexts:
    values = torch.cat([a.values, b.values], 1)
    values, kept = values.topk(min(top, values.shape[1]))
    wide = kept[..., None].expand(-1, -1, BEFORE + 1 + AFTER)
    windows, activations = (
        torch.cat(pair, 1).gather(1, wide)
        for pair in ((a.windows, b.windows), (a.activations, b.activations))
    )
    sums = {name: getattr(a, name) + getattr(b, name) for name in Contexts._fields[3:]}
    return Contexts(values, windows, activations, **sums)


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
    model: Any, tokenizer: Any, path: str, found: Contexts, prototypes: Iterable[int] | None = None
) -> Rows[Rule]:
    """The rules of ``prototypes`` (None: all) of the FFN at ``path``, whose contexts have been ``found``."""
    chosen = list(range(len(found.mass))) if prototypes is None else [int(i) for i in prototypes]
    size = model.get_input_embeddings().weight
    record = ffn_readout(model, path, size.new_zeros(1, size.shape[1]))
    writes = written(model, tokenizer, record.dictionary[chosen])
    nearest, usage, purity = (
        nearest_tokens(model, tokenizer, path),
        found.usage(),
        found.purity().tolist(),
    )
    return Rows(
        Rule(
            get_layer_number(path), record.names[i], " ".join(repr(token) for token, _ in nearest[i]),
            _text(tokenizer, found.windows[i, 0]) if found.values[i, 0] > 0 else "", " ".join(repr(t) for t, _ in write.promoted),
            " ".join(repr(t) for t, _ in write.suppressed), usage[i], None if purity[i] != purity[i] else purity[i],
        )
        for i, write in zip(chosen, writes)
    )  # fmt: skip


def _text(tokenizer: Any, window: Tensor) -> str:
    before, token, after = window[:BEFORE], window[BEFORE : BEFORE + 1], window[BEFORE + 1 :]
    return "{}»{}«{}".format(
        *(tokenizer.decode([i for i in part.tolist() if i >= 0]) for part in (before, token, after))
    )


def export_contexts(
    model: Any, tokenizer: Any, found: dict[str, Contexts], file: Path | str
) -> int:
    """Write JSON lines for an automatic labeller, one prototype a line: layer, path, prototype, promoted and suppressed tokens,
    share of tokens on which it fires, and its contexts as token strings with one activation each. Dead ones are left out;
    returns how many lines."""
    lines = 0
    with replace_file(file) as beside, beside.open("w", encoding="utf-8") as out:
        for path, entry in found.items():
            size = model.get_input_embeddings().weight
            record = ffn_readout(model, path, size.new_zeros(1, size.shape[1]))
            for i, write in enumerate(written(model, tokenizer, record.dictionary)):
                if not entry.fired[i]:
                    continue
                examples = []
                for value, window, activation in zip(
                    entry.values[i], entry.windows[i].tolist(), entry.activations[i].tolist()
                ):
                    inside = [
                        (tokenizer.decode([t]), a) for t, a in zip(window, activation) if t >= 0
                    ]
                    if value > 0:
                        examples.append(
                            {
                                "tokens": [t for t, _ in inside],
                                "activations": [a for _, a in inside],
                            }
                        )
                line = {
                    "layer": get_layer_number(path), "path": path, "prototype": record.names[i],
                    "promoted": [t for t, _ in write.promoted], "suppressed": [t for t, _ in write.suppressed],
                    "fires_on": entry.fired[i].item() / entry.tokens, "contexts": examples,
                }  # fmt: skip
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                lines += 1
    return lines


def _progress(batches, show):
    if not show:
        return batches
    from rich.progress import track

    return track(list(batches), description="contexts")
