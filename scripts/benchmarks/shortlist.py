#!/usr/bin/env python3
"""Sub-linear selection, an experiment: can a coarse quantiser find the prototypes that a sparse
readout keeps, without scoring all of them?

Input prototypes are put into cells by k-means of their directions; a token scores the cells, and
exactly only the prototypes in its best ones. Recall of the exact top-k, and one token's time
against scoring everything, for random rows at the shape of a large model, and recall alone for the
prototypes of a converted teacher at its own inputs on text.

    python scripts/benchmarks/shortlist.py recipes/teachers/llama \\
        --out recipes/results/speed/shortlist.json
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.conversion.sampling import read_ffn_inputs
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_teacher, load_tokenizer
from hf_kernel_ffn.text.packing import read_token_ids

PROBED = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the cells that are opened."""
ROUNDS = 8
"""Of k-means."""
TOKENS = 256
"""Random ones that are looked up."""
EXPANSION = 8
"""Prototypes per hidden unit of the converted teacher: a large dictionary from a small model."""


class Cells:
    """Input prototypes (prototypes, d) in cells of similar directions, by spherical k-means."""

    def __init__(self, rows: Tensor, seed: int):
        self.count = round(len(rows) ** 0.5)
        directions = nn.functional.normalize(rows, dim=-1)
        generator = torch.Generator().manual_seed(seed)
        self.centres = directions[torch.randperm(len(rows), generator=generator)[: self.count]]
        for _ in range(ROUNDS):
            self.place = (directions @ self.centres.T).argmax(-1)
            sums = torch.zeros_like(self.centres).index_add_(0, self.place, directions)
            self.centres = nn.functional.normalize(sums, dim=-1)

    def members(self) -> list[Tensor]:
        """The numbers of the prototypes in each cell."""
        return [(self.place == cell).nonzero()[:, 0] for cell in range(self.count)]

    def opened(self, share: float) -> int:
        """How many cells a ``share`` of them is."""
        return max(1, round(share * self.count))


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
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rows = torch.randn(prototypes, hidden_size) / hidden_size**0.5
    x = torch.randn(TOKENS, hidden_size)
    random = measure_recall(rows, torch.zeros(prototypes), x, kept, seed)
    for figures, time_ratio in zip(random, measure_times(rows, x, repeats, seed), strict=True):
        figures["time_over_scoring_all"] = time_ratio
    converted = measure_converted(teacher, kept, seed)
    report = {
        "shape": [hidden_size, prototypes],
        "kept": kept,
        "random": random,
        "converted": {"teacher": teacher, "mean": converted},
    }
    write_text(out, json.dumps(report, indent=1) + "\n")
    tables = {"random rows": random, f"{teacher}, {EXPANSION} per unit": converted}
    for name, lines in tables.items():
        typer.echo(name)
        for line in lines:
            typer.echo("  " + "  ".join(f"{key} {value:.3g}" for key, value in line.items()))


def measure_recall(rows: Tensor, bias: Tensor, x: Tensor, kept: int, seed: int) -> list[dict]:
    """Measure how many of the ``kept`` largest relu(x·w + b) of the tokens ``x`` (tokens, d) lie
    in the cells opened, by share of cells."""
    cells = Cells(rows, seed)
    best = (x @ rows.T + bias).relu().topk(kept, -1)
    by_score = (x @ cells.centres.T).argsort(-1, descending=True)
    order = by_score.argsort(-1)  # each cell's rank for each token
    rank = order.gather(-1, cells.place[best.indices])
    sizes = cells.place.bincount(minlength=cells.count).float()
    weights = best.values.square()

    figures = []
    for share in PROBED:
        opened = cells.opened(share)
        is_found = rank < opened
        scored = (sizes * (order < opened)).sum(-1).mean() / len(rows)
        figures.append(
            {
                "cells": opened,
                "rows_scored": (scored + cells.count / len(rows)).item(),
                "recall": is_found.float().mean().item(),
                "mass": ((weights * is_found).sum() / weights.sum()).item(),
            }
        )
    return figures


def measure_times(rows: Tensor, x: Tensor, repeats: int, seed: int) -> list[float]:
    """Measure one token's time by share of cells, over the time of scoring every row; medians of
    interleaved repeats."""
    cells = Cells(rows, seed)
    blocks = [rows[numbers].contiguous() for numbers in cells.members()]

    def score_opened(token: Tensor, opened: int) -> Tensor:
        chosen = (cells.centres @ token).topk(opened).indices.tolist()
        return torch.cat([blocks[cell] @ token for cell in chosen])

    ratios: list[list[float]] = [[] for _ in PROBED]
    for repeat in range(repeats):
        token = x[repeat % len(x)]
        start = time.perf_counter()
        rows @ token
        whole = time.perf_counter() - start
        for of_share, share in zip(ratios, PROBED, strict=True):
            start = time.perf_counter()
            score_opened(token, cells.opened(share))
            of_share.append((time.perf_counter() - start) / whole)
    return [median(of_share) for of_share in ratios]


def measure_converted(teacher: str, kept: int, seed: int) -> list[dict]:
    """Measure recall for the prototypes of a converted teacher; means over its layers."""
    model = load_teacher(teacher)
    tokenizer = load_tokenizer(teacher)
    train = read_token_ids(tokenizer, ["recipes/text/books-distil.txt"], 128, 4096)
    test = read_token_ids(tokenizer, ["recipes/text/books-test.txt"], 128, 4096)
    settings = KernelFFNConfig(expansion=EXPANSION)
    student, _ = convert(model, settings, calibration_ids=train, calibration_tokens=4096)

    layers = []
    for path, ffn in student.kernel_ffns().items():
        inputs = torch.cat(list(read_ffn_inputs(model, path, test)))
        linear = ffn.input_prototypes
        layers.append(measure_recall(linear.weight, linear.bias, inputs, kept, seed))
    return [
        {key: fmean(line[key] for line in lines) for key in lines[0]}
        for lines in zip(*layers, strict=True)
    ]


if __name__ == "__main__":
    typer.run(main)
