#!/usr/bin/env python3
"""Intruder detection: can one strange context be told from four of a prototype's own?

For each of some hundred prototypes, four of its strongest contexts and one of another prototype of
the same layer are embedded by an encoder of sentences. The one with the lowest mean cosine to the
others is taken for the intruder. By chance that is right once in five times.

    python scripts/real_models.py smollm2 runs/smollm2
    python scripts/real_models.py minilm runs/minilm
    hf-kernel-ffn convert runs/smollm2 runs/smollm2-student
    python scripts/experiments/intruders.py runs/smollm2 runs/smollm2-student \\
        --encoder runs/minilm --text recipes/text/books-distil.txt \\
        --out recipes/results/graphs/intruders.json

A prototype of tied rows is one side of a unit, ``17+`` or ``17-``. So a stock model is asked twice:
by units, whose strongest contexts may be of either sign, and by the same sides of units as the
student. A file that real_frontier.py saved of a student or control of the first model is asked too.
Contexts that overlap count once. All are asked about the same prototypes, with intruders
of the same others: those of which all have four contexts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from real_frontier_saved import load_any, shorten
from sentence_fidelity import embed
from torch import Tensor

from hf_kernel_ffn.reading.contexts import BEFORE, OUTSIDE, Contexts, contexts
from hf_kernel_ffn.reading.model_parts import decode_tokens, has_tied_rows, list_ffn_paths
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_teacher, load_tokenizer
from hf_kernel_ffn.text.packing import read_token_ids

OWN = 4
"""Contexts of a prototype that stand beside the intruder."""
KEPT = 200
"""Strongest contexts that are collected; those of one side, without overlaps, are taken."""
SHARED = 4
"""Tokens in a row that two contexts have in common where they are one passage."""
RESAMPLES = 2000
"""Of the bootstrap."""
LENGTH = 128
"""Tokens of a row of text."""


class Prototype(NamedTuple):
    """A row of a readout's dictionary, by the unit it stems from."""

    path: str
    unit: int
    sign: int
    """1 or −1 for one side of a unit, 0 for both."""


def choose_prototypes(
    paths: list[str], width: int, count: int, rng: random.Random
) -> list[Prototype]:
    """``count`` sides of units, evenly over ``paths``, no unit twice."""
    chosen = []
    for number, path in enumerate(paths):
        share = count // len(paths) + (number < count % len(paths))
        for unit in rng.sample(range(width), share):
            chosen.append(Prototype(path, unit, rng.choice((-1, 1))))
    return chosen


def take_windows(used: Contexts, prototype: Prototype, is_tied: bool) -> list[list[int]]:
    """The strongest contexts of ``prototype``, OWN at most, as token ids without overlaps."""
    width = len(used.mass) // (2 if is_tied else 1)
    row = prototype.unit + (width if is_tied and prototype.sign < 0 else 0)
    windows: list[list[int]] = []
    for value, window, activations in zip(
        used.values[row].tolist(), used.windows[row], used.activations[row], strict=True
    ):
        is_other_side = not is_tied and activations[BEFORE].item() * prototype.sign < 0
        ids = [number for number in window.tolist() if number != OUTSIDE]
        if value <= 0 or is_other_side or any(overlap(ids, other) for other in windows):
            continue
        windows.append(ids)
        if len(windows) == OWN:
            break
    return windows


def overlap(one: list[int], other: list[int]) -> bool:
    """Whether two contexts have SHARED tokens in a row in common."""

    def runs(ids: list[int]) -> set[tuple[int, ...]]:
        return {tuple(ids[start : start + SHARED]) for start in range(len(ids) - SHARED + 1)}

    return not runs(one).isdisjoint(runs(other))


def find_intruder(embeddings: Tensor) -> int:
    """The place, among ``embeddings`` (n, size) of length one, of the least like the others."""
    cosines = embeddings @ embeddings.T
    return int((cosines.sum(-1) - cosines.diagonal()).argmin())


def bootstrap(hits: list[bool], seed: int) -> tuple[float, float]:
    """The 95% interval of the mean of ``hits``, by resampling."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(hits, dtype=torch.float64)
    picks = torch.randint(len(hits), (RESAMPLES, len(hits)), generator=generator)
    low, high = values[picks].mean(-1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high


Windows = list[list[list[int]]]
"""By prototype, its strongest contexts as token ids."""


def choose_questions(
    prototypes: list[Prototype], answerers: list[Windows], rng: random.Random
) -> list[tuple[int, int, int]]:
    """(prototype, the one its intruder is of, the intruder's place) for all that every answerer has
    enough contexts of."""
    complete = [
        number
        for number in range(len(prototypes))
        if all(len(windows[number]) == OWN for windows in answerers)
    ]
    questions = []
    for number in complete:
        others = [
            other
            for other in complete
            if other != number
            and prototypes[other].path == prototypes[number].path
            and all(pick_foreign(windows, number, other) for windows in answerers)
        ]
        if others:
            # Anywhere among the five, so that a tie is no help.
            questions.append((number, rng.choice(others), rng.randrange(OWN + 1)))
    return questions


def pick_foreign(windows: Windows, number: int, other: int) -> list[int] | None:
    """The strongest context of ``other`` that is no passage of ``number``'s; None without one."""
    for window in windows[other]:
        if not any(overlap(window, own) for own in windows[number]):
            return window
    return None


def ask(
    questions: list[tuple[int, int, int]],
    windows: Windows,
    decode: Callable[[list[int]], str],
    embed_texts: Callable[[list[str]], Tensor],
) -> list[bool]:
    """Whether the intruder was found, by question."""
    texts: list[str] = []
    for number, other, place in questions:
        foreign = pick_foreign(windows, number, other)
        assert foreign is not None, "questions have one"
        own = windows[number]
        texts += [decode(ids) for ids in (*own[:place], foreign, *own[place:])]
    fives = embed_texts(texts).unflatten(0, (-1, OWN + 1))
    return [
        find_intruder(five) == place for five, (_, _, place) in zip(fives, questions, strict=True)
    ]


def main(
    models: Annotated[list[str], typer.Argument(help="a teacher, and students with tied rows")],
    encoder: Annotated[str, typer.Option(help="an encoder of sentences, by mean pooling")],
    text: Annotated[str, typer.Option(help="where contexts are looked for")],
    out: Annotated[Path, typer.Option(help="where to write figures")],
    units: Annotated[int, typer.Option(min=2, help="prototypes of each model")] = 200,
    layers: Annotated[int, typer.Option(min=1, help="evenly spaced, that they are of")] = 10,
    tokens: Annotated[int, typer.Option(help="of the text")] = 16_384,
    seed: Annotated[int, typer.Option(help="of units and intruders")] = 0,
) -> None:
    """Ask for the intruders of the same prototypes of all MODELS."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(models[0])
    encoder_tokenizer = load_tokenizer(encoder)
    sentence_encoder = load_teacher(encoder)
    ids = read_token_ids(tokenizer, [text], LENGTH, tokens)

    prototypes: list[Prototype] = []
    answerers: dict[tuple[str, str], Windows] = {}
    for name in models:
        model = load_any(name, models[0])
        all_paths = list_ffn_paths(model)
        spaced = torch.linspace(0, len(all_paths) - 1, min(layers, len(all_paths))).round()
        paths = [all_paths[int(layer)] for layer in spaced.tolist()]
        used = contexts(model, ids.split(8), paths, top=KEPT)
        ffn = model.base_model.get_submodule(paths[0])
        is_tied = has_tied_rows(ffn)
        if not prototypes:
            width = len(used[paths[0]].mass) // (2 if is_tied else 1)
            prototypes = choose_prototypes(paths, width, units, random.Random(seed))
        kinds = {"side of a unit": prototypes}
        if not is_tied:
            kinds["unit"] = [prototype._replace(sign=0) for prototype in prototypes]
        for kind, asked in kinds.items():
            answerers[shorten(name), kind] = [
                take_windows(used[one.path], one, is_tied) for one in asked
            ]

    questions = choose_questions(prototypes, list(answerers.values()), random.Random(seed))
    rows = []
    for (name, kind), windows in answerers.items():
        hits = ask(
            questions,
            windows,
            decode=lambda ids: decode_tokens(tokenizer, ids),
            embed_texts=lambda texts: embed(sentence_encoder, encoder_tokenizer, texts),
        )
        row = {
            "model": name,
            "prototype": kind,
            "asked": len(hits),
            "of": len(prototypes),
            "accuracy": sum(hits) / len(hits),
            "interval": bootstrap(hits, seed),
            "chance": 1 / (OWN + 1),
            "tokens": ids.numel(),
            "layers": len({one.path for one in prototypes}),
            "seed": seed,
        }
        rows.append(row)
        typer.echo(json.dumps(row))
    write_text(out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
