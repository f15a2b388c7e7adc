#!/usr/bin/env python3
"""Sub-linear selection, an experiment: can a coarse quantiser find the prototypes that a sparse
readout keeps, without scoring all of them?

Input prototypes are put into cells by k-means of their directions; a token scores the cells, and
exactly only the prototypes in its best ones. Recall of the exact top-k, and one token's time
against scoring everything, for random rows at the shape of a large model, and recall alone for the
prototypes of a converted teacher at its own inputs on text.

    python scripts/benchmarks/shortlist.py recipes/teachers/llama --out
    recipes/results/speed/shortlist.json
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

PROBED = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the cells that are opened."""
ROUNDS = 8
"""Of k-means."""


def cells(rows: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(count, d) directions and, for each, the numbers of its rows of ``rows`` (m, d), by spherical
    k-means."""
    unit = torch.nn.functional.normalize(rows, dim=-1)
    centres = unit[torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))[:count]]
    for _ in range(ROUNDS):
        member = (unit @ centres.T).argmax(-1)
        centres = torch.nn.functional.normalize(
            torch.zeros_like(centres).index_add_(0, member, unit), dim=-1
        )
    return centres, [(member == cell).nonzero()[:, 0] for cell in range(count)]


def recall(rows, bias, x, kept: int, seed: int) -> list[dict]:
    """For tokens ``x`` (tokens, d), how many of the ``kept`` largest relu(x·w + b) lie in the cells
    opened, by share of cells."""
    count = round(len(rows) ** 0.5)
    centres, members = cells(rows, count, seed)
    place = torch.empty(len(rows), dtype=torch.long)
    for cell, numbers in enumerate(members):
        place[numbers] = cell
    score = (x @ rows.T + bias).relu()
    best = score.topk(kept, -1)
    order = (
        (x @ centres.T).argsort(-1, descending=True).argsort(-1)
    )  # each cell's rank for each token
    rank = order.gather(-1, place[best.indices])
    size = torch.tensor([len(numbers) for numbers in members]).float()
    found = []
    for share in PROBED:
        opened = max(1, round(share * count))
        hit = rank < opened
        read = (size * (order < opened)).sum(-1).mean() / len(rows)
        mass = (best.values.square() * hit).sum() / best.values.square().sum()
        found.append(
            {
                "cells": opened,
                "rows_scored": (read + count / len(rows)).item(),
                "recall": hit.float().mean().item(),
                "mass": mass.item(),
            }
        )
    return found


def times(rows, x, repeats: int, seed: int) -> list[float]:
    """One token's time by share of cells, over the time of scoring every row; medians of
    interleaved repeats."""
    count = round(len(rows) ** 0.5)
    centres, members = cells(rows, count, seed)
    blocks = [rows[numbers].contiguous() for numbers in members]

    def some(token, opened):
        chosen = (centres @ token).topk(opened).indices.tolist()
        return torch.cat([blocks[cell] @ token for cell in chosen])

    ratios: dict[int, list[float]] = {}
    for repeat in range(repeats):
        token = x[repeat % len(x)]
        start = time.perf_counter()
        rows @ token
        whole = time.perf_counter() - start
        for number, share in enumerate(PROBED):
            start = time.perf_counter()
            some(token, max(1, round(share * count)))
            ratios.setdefault(number, []).append((time.perf_counter() - start) / whole)
    return [statistics.median(values) for values in ratios.values()]


@torch.no_grad()
def main(
    teacher: Annotated[
        str, typer.Argument(help="local folder or hub id of the model that is converted")
    ],
    out: Annotated[Path, typer.Option(help="JSON file")],
    hidden_size: int = 4096,
    prototypes: int = 14336,
    kept: Annotated[int, typer.Option(help="prototypes that the readout keeps")] = 64,
    repeats: int = 50,
    seed: int = 0,
) -> None:
    """Write the figures to OUT and print them."""
    from hf_kernel_ffn import KernelFFNConfig, convert
    from hf_kernel_ffn.conversion.sampling import read_ffn_inputs
    from hf_kernel_ffn.storage.files import write_text
    from hf_kernel_ffn.storage.loading import load_teacher, load_tokenizer
    from hf_kernel_ffn.text.packing import read_token_ids

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rows, x = torch.randn(prototypes, hidden_size) / hidden_size**0.5, torch.randn(256, hidden_size)
    random = recall(rows, 0.0, x, kept, seed)
    for entry, ratio in zip(random, times(rows, x, repeats, seed)):
        entry["time_over_scoring_all"] = ratio
    model, tokenizer = load_teacher(teacher), load_tokenizer(teacher)
    train, test = (
        read_token_ids(tokenizer, [f"recipes/text/books-{name}.txt"], 128, 4096)
        for name in ("distil", "test")
    )
    student, _ = convert(
        model, KernelFFNConfig(expansion=8), calibration_ids=train, calibration_tokens=4096
    )
    trained = []
    for path, ffn in student.kernel_ffns().items():
        inputs = torch.cat(list(read_ffn_inputs(model, path, test)))
        trained.append(
            recall(ffn.input_prototypes.weight, ffn.input_prototypes.bias, inputs, kept, seed)
        )
    means = [
        {key: sum(layer[i][key] for layer in trained) / len(trained) for key in trained[0][i]}
        for i in range(len(PROBED))
    ]
    report = {
        "shape": [hidden_size, prototypes],
        "kept": kept,
        "random": random,
        "converted": {"teacher": teacher, "mean": means},
    }
    write_text(out, json.dumps(report, indent=1) + "\n")
    for name, found in (("random rows", random), (f"{teacher}, 8 per unit", means)):
        typer.echo(name)
        for entry in found:
            typer.echo("  " + "  ".join(f"{key} {value:.3g}" for key, value in entry.items()))


if __name__ == "__main__":
    typer.run(main)
