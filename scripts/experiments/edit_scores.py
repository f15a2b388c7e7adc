#!/usr/bin/env python3
"""Steering by one prototype: how often it reaches its goal, and what it does to other text.

A goal is a context and a token that the teacher ranks 10th to 1000th after it. In every model one
prototype (one hidden unit) is rewritten, so that the token gets a probability of one half there.
Of four candidates the edit is taken whose KL on other text is least. The same goals for all models.

    python scripts/experiments/edit_scores.py TEACHER STUDENT … --bos always \\
        --out recipes/results/graphs/edits.json

A model is a folder, or a file that real_frontier.py saved of a student or control of the first one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from readings import LIKELY, describe_edits, draw_goals
from real_frontier_saved import load_any, shorten

from hf_kernel_ffn.reading import trace
from hf_kernel_ffn.reading.contexts import contexts
from hf_kernel_ffn.reading.steering import raise_token
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_teacher, load_tokenizer
from hf_kernel_ffn.text.packing import read_token_ids
from hf_kernel_ffn.text.text_format import TextFormat

LENGTH = 256
"""Tokens of a row."""
GOAL_ROWS = 32
"""Rows of the test text that contexts are drawn from; what is disturbed is measured behind."""


def main(
    models: Annotated[list[str], typer.Argument(help="the teacher, and students of it")],
    out: Annotated[Path, typer.Option(help="where to write figures")],
    edits: Annotated[int, typer.Option(min=1, help="goals")] = 50,
    train: Annotated[
        str, typer.Option(help="ordinary text, to see where a prototype fires")
    ] = "recipes/text/books-distil.txt",
    test: Annotated[str, typer.Option(help="text of the goals")] = "recipes/text/books-test.txt",
    tokens: Annotated[int, typer.Option(help="of the ordinary text")] = 8192,
    others: Annotated[int, typer.Option(min=1, help="rows of other text to disturb")] = 8,
    bos: Annotated[str, typer.Option(help="auto, always or never a start token")] = "auto",
    seed: Annotated[int, typer.Option(help="of the goals")] = 0,
) -> None:
    """Write the figures of all MODELS into OUT."""
    tokenizer = load_tokenizer(models[0])
    text_format = TextFormat(bos=bos)
    ordinary = read_token_ids(tokenizer, [train], LENGTH, tokens, text_format, spread=True)
    ids = read_token_ids(tokenizer, [test], LENGTH, (GOAL_ROWS + others) * LENGTH, text_format)
    rest = ids[GOAL_ROWS:]
    goals = draw_goals(load_teacher(models[0]), tokenizer, ids[:GOAL_ROWS], edits, seed)

    rows = []
    for name in models:
        model = load_any(name, models[0])
        used = contexts(model, ordinary.split(8))
        results = [
            raise_token(
                trace(model, tokenizer, context, [-1]), token, used, rest, probability=LIKELY
            )
            for context, token in goals
        ]
        figures = describe_edits("edits", "", results)
        rows.append({"model": shorten(name), "goals": edits, "seed": seed, **figures})
        typer.echo(json.dumps(rows[-1]))
        write_text(out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
