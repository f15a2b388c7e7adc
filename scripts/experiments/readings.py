#!/usr/bin/env python3
"""What reading a converted model is worth: a distilled student against its own untouched teacher
and against the truncated teacher.

    hf-kernel-ffn distill recipes/llama-readable.yaml
    python scripts/experiments/readings.py recipes/teachers/llama runs/llama-readable \\
        --out recipes/results/llama/reading
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kernel_ffn.evaluation.baselines import teacher_as_student
from hf_kernel_ffn.evaluation.report import evaluate_student
from hf_kernel_ffn.reading import trace
from hf_kernel_ffn.reading.attribution import logit_split
from hf_kernel_ffn.reading.contexts import Contexts, contexts
from hf_kernel_ffn.reading.steering import raise_token, raise_token_by_addition
from hf_kernel_ffn.reading.support import scrambled, separations
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_student, load_teacher, load_tokenizer
from hf_kernel_ffn.text.packing import read_token_ids

MOST_USED = 100
"""Prototypes whose contexts are looked at per layer."""
SPLITS = 200
"""Logit gaps that are split."""
LARGEST = 10
"""Contributions that are to carry a gap."""
EDITS = 50
LIKELY = 0.5
"""The probability that an edit is to reach."""
LENGTH = 256
"""Tokens of a row."""
EARLIEST = 20
"""Tokens that a context has at least."""
ROWS = {
    "effective prototypes": ".1f", "coherence": ".3f", "purity of the 100 most used": ".3f",
    "gap carried by 10, median": ".2f", "|contributions| in 10": ".1%",
    "AUC nearest, scrambled": ".2f", "AUC nearest, code": ".2f",
    "AUC mass, scrambled": ".2f", "AUC mass, code": ".2f",
    "edits that reach 50%": ".0%", "collateral KL, median": ".5f", "collateral KL, mean": ".5f",
    "new prototypes that reach 50%": ".0%",
    "their collateral KL, median": ".5f", "their collateral KL, mean": ".5f",
}  # fmt: skip
"""Of the table, and how many digits they have."""

Goal = tuple[Tensor, int]
"""A context, and the token that is to follow it."""


@dataclass
class Texts:
    """What is read."""

    ordinary: Tensor
    """(rows, LENGTH), to find contexts on."""
    test: Tensor
    """(rows, LENGTH), to measure on."""
    code: Tensor
    """(rows, LENGTH), of another domain."""
    goals: list[Goal]


def main(
    teacher: Annotated[str, typer.Argument(help="local folder or hub id")],
    student: Annotated[str, typer.Argument(help="a distilled student of it")],
    out: Annotated[Path, typer.Option(help="folder of readings.json and table.md")],
    train: Annotated[
        str, typer.Option(help="ordinary text, to find contexts on")
    ] = "recipes/text/books-distil.txt",
    test: Annotated[str, typer.Option(help="text to measure on")] = "recipes/text/books-test.txt",
    code: Annotated[Path, typer.Option(help="a file of another domain")] = Path(
        "hf_kernel_ffn/checkpoint_code/ffn.py"
    ),
    seed: int = 0,
) -> None:
    """Write the figures into OUT, and print the table."""
    tokenizer = load_tokenizer(teacher)
    stock = load_teacher(teacher)
    converted = load_student(student)
    ids = read_token_ids(tokenizer, [test], LENGTH, 16_384)
    texts = Texts(
        ordinary=read_token_ids(tokenizer, [train], LENGTH, 32_768, spread=True),
        test=ids,
        code=read_rows(tokenizer, code),
        goals=draw_goals(stock, tokenizer, ids[:32], EDITS, seed),
    )
    top_k = next(iter(converted.kernel_ffns().values())).config.settings.top_k
    truncated = teacher_as_student(stock, texts.ordinary[:64], simplex="threshold", top_k=top_k)

    reports = {
        "student": evaluate_student(converted, stock, ids),
        "truncated": evaluate_student(truncated, stock, ids),
    }
    figures = {}
    for name, model in {"teacher": stock, "student": converted, "truncated": truncated}.items():
        figures[name] = measure(name, model, tokenizer, texts, reports, seed)
        typer.echo(f"{name}: done")
    report = {"teacher": teacher, "student": student, "seed": seed, **figures}
    write_text(out / "readings.json", json.dumps(report, indent=1) + "\n")
    table = format_markdown(figures)
    write_text(out / "table.md", table)
    typer.echo(table, nl=False)


def read_rows(tokenizer: PreTrainedTokenizerBase, file: Path) -> Tensor:
    """Read a file as whole rows of LENGTH tokens."""
    ids = torch.tensor(tokenizer(file.read_text(encoding="utf-8"))["input_ids"])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def measure(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    reports: dict[str, dict],
    seed: int,
) -> dict[str, float]:
    """Take all figures of one model."""
    layers = reports["student" if name == "teacher" else name]["layers"]
    if name == "teacher":
        layers = [layer["teacher"] for layer in layers]
    used = contexts(model, texts.ordinary.split(8))
    purities = [layer.purity()[layer.most_used(MOST_USED)].nanmean() for layer in used.values()]
    figures = {
        "effective prototypes": fmean(layer["effective_prototypes"] for layer in layers),
        "coherence": fmean(layer["coherence"] for layer in layers),
        "purity of the 100 most used": fmean(purity.item() for purity in purities),
        **measure_gaps(model, tokenizer, texts.test, seed),
        **measure_edits(model, tokenizer, texts, used, additions=name == "student"),
    }
    if name != "teacher":
        figures |= {key: reports[name][key] for key in ("delta_cross_entropy", "kl")}
    if name != "truncated":  # which has the teacher's own rows
        figures |= measure_support(model, texts, seed)
    return figures


def measure_support(model: PreTrainedModel, texts: Texts, seed: int) -> dict[str, float]:
    """How well support tells the test text from scrambled text and from code, mean over layers."""
    others = {"scrambled": scrambled(texts.test, seed), "code": texts.code}
    found = separations(model, texts.test, others)
    figures = {}
    for score in ("nearest", "mass"):
        for against in others:
            aucs = [one.auc for one in found if (one.score, one.against) == (score, against)]
            figures[f"AUC {score}, {against}"] = fmean(aucs)
    return figures


def measure_gaps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, seed: int
) -> dict[str, float]:
    """How much of the gap between the two likeliest tokens the LARGEST contributions carry, of
    whatever kind."""
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    shares = []
    for row in torch.randint(len(ids), (SPLITS,), generator=generator).tolist():
        position = int(torch.randint(EARLIEST, ids.shape[1], (1,), generator=generator))
        passed = trace(model, tokenizer, ids[row, : position + 1], [position])
        first, second = passed.logits[0].topk(2).indices.tolist()
        split = logit_split(passed, first, second, position)
        amounts = [part.amount for part in split.parts]
        ratios.append(sum(amounts[:LARGEST]) / split.value)
        shares.append(sum(map(abs, amounts[:LARGEST])) / sum(map(abs, amounts)))
    return {"gap carried by 10, median": median(ratios), "|contributions| in 10": fmean(shares)}


def draw_goals(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    count: int,
    seed: int,
) -> list[Goal]:
    """Draw ``count`` contexts of 20 to 60 tokens, and for each a token that the teacher ranks
    between 10th and 1000th after it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    goals = []
    for _ in range(count):
        row = draw(0, len(ids))
        end = draw(EARLIEST, 61)
        rank = draw(10, 1001)
        passed = trace(teacher, tokenizer, ids[row, :end], [-1])
        order = passed.logits[0].argsort(descending=True)
        goals.append((ids[row, :end], int(order[rank - 1])))
    return goals


def measure_edits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    used: dict[str, Contexts],
    additions: bool,
) -> dict[str, float]:
    """Success and collateral of one rewritten prototype, or neuron, per goal, and with
    ``additions`` of one new prototype."""
    ordinary = texts.ordinary[:12]
    others = texts.test[32:40]
    rewritten = []
    added = []
    for context, token in texts.goals:
        passed = trace(model, tokenizer, context, [-1])
        rewritten.append(raise_token(passed, token, used, others, probability=LIKELY))
        if additions:
            addition = raise_token_by_addition(passed, token, ordinary, others, probability=LIKELY)
            added.append(addition)
    return {
        **describe_edits("edits", "", rewritten),
        **describe_edits("new prototypes", "their ", added),
    }


def describe_edits(name: str, prefix: str, results: list[Any]) -> dict[str, float]:
    """How many edits there are that reach LIKELY, and what they change elsewhere."""
    collateral = [result[1].collateral_kl for result in results if result is not None]
    if not collateral:
        return {}
    return {
        f"{name} that reach 50%": len(collateral) / len(results),
        f"{prefix}collateral KL, median": median(collateral),
        f"{prefix}collateral KL, mean": fmean(collateral),
    }


def format_markdown(figures: dict[str, dict[str, float]]) -> str:
    """Format the figures, one line each."""
    lines = ["| | teacher | truncated teacher | student |", "|---|---|---|---|"]
    for row, form in ROWS.items():
        cells = [
            format(figures[name][row], form) if row in figures[name] else "–"
            for name in ("teacher", "truncated", "student")
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
