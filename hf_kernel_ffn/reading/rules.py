"""Prototypes as rules, *when this, write that*, to read or to hand to an automatic labeller."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..storage.files import replace_file
from .contexts import BEFORE, OUTSIDE, Contexts
from .model_parts import decode_tokens, get_layer_number, read_dictionary
from .naming import Written, nearest_tokens, written
from .rows import Rows


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
    used: Contexts,
    prototypes: Iterable[int] | None = None,
) -> Rows[Rule]:
    """Put the prototypes of the FFN at ``path`` as rules.

    Args:
        used: its contexts.
        prototypes: which of them; None: all.
    """
    if prototypes is None:
        prototypes = range(len(used.mass))
    numbers = [int(number) for number in prototypes]
    record = read_dictionary(model, path)
    writes = written(model, tokenizer, record.dictionary[numbers])
    nearest = nearest_tokens(model, tokenizer, path)
    usage = used.usage()
    purity = used.purity().tolist()

    table = Rows[Rule]()
    for number, write in zip(numbers, writes, strict=True):
        fires = bool(used.values[number, 0] > 0)
        fires_too_rarely = purity[number] != purity[number]  # NaN
        table.append(
            Rule(
                layer=get_layer_number(path),
                name=record.names[number],
                when_token=_join_tokens(nearest[number]),
                when_context=mark_text(tokenizer, used.windows[number, 0]) if fires else "",
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
    by_path: dict[str, Contexts],
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
        for path, of_path in by_path.items():
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
    tokenizer: PreTrainedTokenizerBase, used: Contexts, number: int, write: Written
) -> dict:
    """What a line of :func:`export_contexts` says of one prototype's use."""
    examples = []
    for value, window, activations in zip(
        used.values[number].tolist(),
        used.windows[number].tolist(),
        used.activations[number].tolist(),
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
        "fires_on": used.fired[number].item() / used.tokens,
        "contexts": examples,
    }
