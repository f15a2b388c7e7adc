#!/usr/bin/env python3
"""The frontier of fidelity and readability: named configurations and their controls at one budget
of tokens, in one table.

    # What is there already is kept.
    python scripts/experiments/frontier.py run recipes/teachers/llama --out recipes/results/llama
    # table.csv, table.md, frontier.png
    python scripts/experiments/frontier.py show recipes/results/llama

Any causal language model of a supported family serves, with text of your own:

    python scripts/experiments/frontier.py run gpt2 --out runs/gpt2 --train my.txt \\
        --test other.txt --tokens 5000000 --device cuda
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Optional

import typer
from frontier_rows import Row, make_recipe, make_rows
from frontier_table import find_group, format_markdown, plot, write_csv
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kernel_ffn.conversion.convert import convert
from hf_kernel_ffn.distillation import Recipe
from hf_kernel_ffn.distillation.trainer import train as train_student
from hf_kernel_ffn.evaluation.baselines import teacher_as_student, transcoder_student
from hf_kernel_ffn.evaluation.probes import load_questions, multiple_choice
from hf_kernel_ffn.evaluation.readability import Readability
from hf_kernel_ffn.evaluation.report import evaluate_student
from hf_kernel_ffn.families.lookup import find_stock_ffns
from hf_kernel_ffn.families.registry import get_architecture_of_model
from hf_kernel_ffn.families.weights import read_stock_weights
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_teacher, load_tokenizer
from hf_kernel_ffn.text.packing import read_token_ids

app = typer.Typer(add_completion=False, no_args_is_help=True)

QUESTIONS = 200
"""Questions of the multiple-choice file that are asked."""
SEQUENCE_LENGTH = 256
"""Of the text to evaluate on."""
SHOWN = ("delta_cross_entropy", "kl", "top1_agreement", "coherence")
"""Figures that are printed as soon as a row is done."""


@dataclass
class Setting:
    """What all rows have in common."""

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    test: Tensor
    """(rows, length) token ids to evaluate on."""
    questions: list[dict]
    students: Path | None
    """Folder in which trained kernel readouts are saved."""


@app.command()
def run(
    teacher: Annotated[str, typer.Argument(help="local folder or hub id")],
    out: Annotated[
        Path,
        typer.Option(
            help="folder of reports, one JSON file a row; rows found there are not run again"
        ),
    ],
    tokens: Annotated[int, typer.Option(help="training tokens of every row")] = 400_000,
    train: Annotated[str, typer.Option(help="text to train on")] = "recipes/text/books-distil.txt",
    test: Annotated[str, typer.Option(help="text to evaluate on")] = "recipes/text/books-test.txt",
    test_tokens: Annotated[int, typer.Option(help="tokens of it")] = 16_384,
    cloze: Annotated[
        str, typer.Option(help="multiple-choice questions; '' for none")
    ] = "recipes/text/cloze.jsonl",
    only: Annotated[
        str, typer.Option(help="the row of this name, or all whose name contains it")
    ] = "",
    part: Annotated[
        str,
        typer.Option(help="such as 1/2: every second row from the first on; 2/2 is the others"),
    ] = "1/1",
    students: Annotated[
        Optional[Path], typer.Option(help="folder in which trained kernel readouts are saved too")
    ] = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Run the rows that OUT does not hold yet."""
    model = load_teacher(teacher, device=device)
    tokenizer = load_tokenizer(teacher)
    ids = read_token_ids(tokenizer, [test], SEQUENCE_LENGTH, test_tokens)
    questions = load_questions(cloze)[:QUESTIONS] if cloze else []
    teacher_cloze = multiple_choice(model, tokenizer, questions)["accuracy"] if questions else None
    setting = Setting(model, tokenizer, ids, questions, students)

    out.mkdir(parents=True, exist_ok=True)
    rows = select_rows(make_rows_for(model), only, part)
    for number, (name, row) in enumerate(rows.items(), 1):
        file = out / f"{file_stem(name)}.json"
        if file.exists():
            continue
        typer.echo(f"row {number} of {len(rows)}: {name}")
        recipe = make_recipe(teacher, row, train, tokens, seed)
        report = measure(name, row, recipe, setting)
        report["teacher_cloze"] = teacher_cloze
        # Whole or not at all: what is there is not run again.
        write_text(file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        typer.echo("  " + "  ".join(f"{figure} {report[figure]:.4f}" for figure in SHOWN))


@app.command()
def show(out: Annotated[Path, typer.Argument(help="folder of reports that run has made")]) -> None:
    """Write table.csv, table.md and frontier.png into OUT; print the Markdown."""
    files = sorted(out.glob("*.json"))
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not reports:
        sys.exit(
            f"error: found no reports in {out}, expected those of 'frontier.py run': run it first"
        )
    reports.sort(key=lambda report: (find_group(report), report["kl"]))
    write_csv(reports, out / "table.csv")
    table = format_markdown(reports)
    write_text(out / "table.md", table)
    typer.echo(table, nl=False)
    plot(reports, out / "frontier.png")


def make_rows_for(teacher: PreTrainedModel) -> dict[str, Row]:
    """Make the rows for a teacher, by the sizes of its first FFN."""
    first = next(iter(find_stock_ffns(teacher, get_architecture_of_model(teacher)).values()))
    weights = read_stock_weights(teacher, first)
    return make_rows(len(weights.up), weights.gate is not None, teacher.config.model_type)


def select_rows(rows: dict[str, Row], only: str, part: str) -> dict[str, Row]:
    """Keep the row of the name ``only``, or all that contain it, and of them a ``part``."""
    names = [only] if only in rows else [name for name in rows if only in name]
    number, parts = map(int, part.split("/"))
    return {name: rows[name] for name in names[number - 1 :: parts]}


def file_stem(name: str) -> str:
    """Of the row's report."""
    return name.replace(" ", "_").replace(",", "")


def measure(name: str, row: Row, recipe: Recipe, setting: Setting) -> dict[str, Any]:
    """Build, train and evaluate one row; everything that its report says."""
    student = make_student(row, recipe, setting)
    if row.trained:
        train_student(recipe, setting.tokenizer, setting.teacher, student, progress=True)
    if setting.students is not None and row.kind in ("kernel", "recipe"):
        student.save_pretrained(setting.students / file_stem(name))
        setting.tokenizer.save_pretrained(setting.students / file_stem(name))

    ffns = list(student.kernel_ffns().values())
    stages = recipe.stages if row.trained else []
    parameters = sum(parameter.numel() for ffn in ffns for parameter in ffn.parameters())
    report = {
        "row": name,
        **asdict(row),
        "seed": recipe.seed,
        "teacher": recipe.teacher,
        "regime": find_regime(row, ffns[0]),
        "stages": [stage.model_dump(exclude_defaults=True) for stage in stages],
        "tokens": sum(stage.tokens for stage in stages),
        "parameters_per_layer": parameters // len(ffns),
        "prototypes": ffns[0].config.prototypes,
        **average_layers(evaluate_student(student, setting.teacher, setting.test)),
    }
    if setting.questions:
        answers = multiple_choice(student, setting.tokenizer, setting.questions)
        report["cloze"] = answers["accuracy"]
    return report


def make_student(row: Row, recipe: Recipe, setting: Setting) -> PreTrainedModel:
    """Make the student as it is before training."""
    data = recipe.data
    ids = read_token_ids(
        setting.tokenizer,
        data.sources,
        data.sequence_length,
        recipe.calibration_tokens,
        spread=True,
    )
    if row.kind == "teacher":
        return teacher_as_student(setting.teacher, ids=ids, **row.settings)
    if row.kind == "transcoder":
        return transcoder_student(setting.teacher, ids, **row.settings, seed=recipe.seed)
    student, _ = convert(
        setting.teacher,
        recipe.kernel_settings(),
        recipe.kernel_ffn.get("layers"),
        calibration_ids=ids,
        calibration_tokens=recipe.calibration_tokens,
        seed=recipe.seed,
    )
    return student


def find_regime(row: Row, ffn: nn.Module) -> str:
    """What may be said about the row's coefficients."""
    if row.kind == "teacher":
        return "linear"
    if row.kind == "transcoder":
        return "conic + linear" if row.settings["skip"] else "conic"
    return ffn.config.settings.regime


def average_layers(report: dict) -> dict[str, Any]:
    """The figures of an evaluation, those of layers averaged."""
    layers = report["layers"]
    teachers = [layer["teacher"] for layer in layers]
    names = ("delta_cross_entropy", "kl", "top1_agreement", "loss_recovered")
    figures = {name: report[name] for name in names}
    figures["test_tokens"] = report["tokens"]
    readable = [name for name in Readability.FIGURES if name != "write_mass"]
    for name in ("fvu", "write_mass_ratio", *readable):
        figures[name] = fmean(layer[name] for layer in layers)
        figures[f"teacher_{name}"] = fmean(layer[name] for layer in teachers)
    for name in ("active_prototypes_student_inputs", "dead_prototypes"):
        figures[name] = fmean(layer[name] for layer in layers)
    figures["teacher_cross_entropy"] = report["teacher"]["cross_entropy"]
    return figures


if __name__ == "__main__":
    app()
