#!/usr/bin/env python3
"""The frontier of a real model: every FFN sparse, at several numbers of active units per token.

    python scripts/real_models.py smollm2 runs/smollm2
    python scripts/experiments/real_frontier.py run runs/smollm2 --out runs/frontier \\
        --test wikitext2-test.txt --test books-test.txt --device cuda --batch-size 32
    python scripts/experiments/real_frontier.py show runs/frontier     # tables, a picture

Every row has the same tokens, steps, learning rates and loss: the KL to the teacher. A row that
OUT holds is not run again. Pieces of units are fitted once, and taken by all rows of tied rows.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Optional

import torch
import typer
from real_fidelity import compare, count_parameters, read_rows
from real_frontier_plot import plot
from real_frontier_rows import RATE, Budget, Row, make_recipe, make_rows
from real_frontier_saved import save_row
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kernel_ffn import (
    KernelFFNConfig,
    convert,
    load_student,
    load_teacher,
    load_tokenizer,
)
from hf_kernel_ffn.distillation import Recipe
from hf_kernel_ffn.distillation.metrics import StepReport
from hf_kernel_ffn.distillation.trainer import train as train_student
from hf_kernel_ffn.evaluation.baselines import teacher_as_student, transcoder_student
from hf_kernel_ffn.evaluation.generation import compare_continuations, select_prompts
from hf_kernel_ffn.evaluation.report import evaluate_student
from hf_kernel_ffn.families.hooks import capture_ffn_inputs_and_outputs
from hf_kernel_ffn.families.lookup import find_stock_ffn
from hf_kernel_ffn.gpu.fused import fuse
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.kernel_files import import_kernel

app = typer.Typer(add_completion=False, no_args_is_help=True)

COUNTS = "384,192,96,48,24"
CALIBRATION_TOKENS = 16_384
READABILITY_ROWS = 8
"""Rows of the first test text on which figures of layers are taken."""
DIRECTIONS = 8
"""Random directions that a cosine of Jacobians is estimated from."""


@dataclass
class Setting:
    """What all rows have in common."""

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: Tensor
    """(rows, length)."""
    tests: dict[str, Tensor]
    """(rows, length) by the name of the text."""
    prompts: int
    """That are continued greedily."""
    fused: bool
    """Whether Triton kernels may serve readouts."""
    starts: dict[str, PreTrainedModel] = field(default_factory=dict)
    """Dense students whose pieces are taken, by kernel."""


@app.command()
def run(
    teacher: Annotated[str, typer.Argument(help="folder or hub id of a causal language model")],
    out: Annotated[Path, typer.Option(help="folder of reports, one JSON file a row")],
    test: Annotated[list[str], typer.Option(help="held-out text; may be given several times")],
    train: Annotated[str, typer.Option(help="text to train on")] = "recipes/text/books-distil.txt",
    counts: Annotated[str, typer.Option(help="active units per token")] = COUNTS,
    tokens: Annotated[int, typer.Option(help="training tokens of every row")] = 491_520,
    test_tokens: Annotated[int, typer.Option(help="of each text")] = 8192,
    batch_size: Annotated[int, typer.Option(help="rows of 256 tokens in a step")] = 8,
    only: Annotated[
        str, typer.Option(help="rows of these names, without their count; comma-separated by ';'")
    ] = "",
    prompts: Annotated[int, typer.Option(help="that are continued greedily; 0: none")] = 24,
    start: Annotated[
        Optional[str], typer.Option(help="converted model whose pieces rows with brownian take")
    ] = None,
    seconds: Annotated[Optional[float], typer.Option(help="begin no row after so many")] = None,
    dtype: Annotated[str, typer.Option(help="of the computation in training")] = "float32",
    rate: Annotated[float, typer.Option(help="peak step on the logits")] = RATE,
    save: Annotated[
        Optional[Path],
        typer.Option(help="folder to keep the FFNs of students and controls in"),
    ] = None,
    fused: Annotated[bool, typer.Option(help="let Triton kernels serve readouts")] = True,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Run the rows that OUT does not hold yet."""
    began = time.perf_counter()
    model = load_teacher(teacher, device=device)
    tokenizer = load_tokenizer(teacher)
    tests = {Path(file).name: read_rows(tokenizer, file, test_tokens).to(device) for file in test}
    calibration = read_rows(tokenizer, train, CALIBRATION_TOKENS, spread=True)
    setting = Setting(model, tokenizer, calibration, tests, prompts, fused)
    budget = Budget(train, tokens, batch_size, dtype, rate, seed)
    if start is not None:
        setting.starts[""] = load_student(start, device=device)
    units = model.config.intermediate_size

    out.mkdir(parents=True, exist_ok=True)
    names = [name.removesuffix(", 0") for name in make_rows(0, units)]
    if only:
        names = choose_names(names, only)
    for name in names:
        for count in map(int, counts.split(",")):
            label = f"{name}, {count}"
            stem = label.replace(", ", "_").replace(" ", "-")
            file = out / f"{stem}.json"
            late = seconds is not None and time.perf_counter() - began > seconds
            if file.exists() or late:
                continue
            row = make_rows(count, units)[label]
            student, figures = measure(row, make_recipe(teacher, row, budget), setting)
            report = {"row": label, "count": count, **figures}
            # Whole or not at all: what is there is not run again.
            write_text(file, json.dumps(report, indent=1) + "\n")
            typer.echo(f"{label}: {describe(report)}")
            if save is not None:
                save_row(student, row.kind, row.settings, save / f"{stem}.safetensors")


def choose_names(names: list[str], only: str) -> list[str]:
    """Those of ``names`` that ``only`` asks for, in its order.

    Raises:
        BadParameter: there is no such row.
    """
    wanted = [name.strip() for name in only.split(";")]
    for name in wanted:
        if name not in names:
            raise typer.BadParameter(f"found {name!r}, expected one of {'; '.join(names)}")
    return wanted


def measure(row: Row, recipe: Recipe, setting: Setting) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build, train and evaluate one row: the student, and everything that its report says."""
    began = time.perf_counter()
    student = make_student(row, recipe, setting)
    converted = time.perf_counter()
    if row.trained:
        train_student(
            recipe, setting.tokenizer, setting.teacher, student, listeners=[print_every_so_often]
        )
    trained = time.perf_counter()
    return student, {
        **asdict(row),
        "seed": recipe.seed,
        "train": Path(recipe.data.sources[0]).name,
        "learning_rate": recipe.stages[-1].learning_rate,
        "tokens": sum(stage.tokens for stage in recipe.stages) if row.trained else 0,
        "batch_size": recipe.stages[0].batch_size,
        "device": str(setting.teacher.device),
        "conversion_seconds": round(converted - began, 1),
        "training_seconds": round(trained - converted, 1),
        "parameters_ratio": count_parameters(student) / count_parameters(setting.teacher),
        **evaluate(student, setting),
    }


def print_every_so_often(report: StepReport) -> None:
    """The loss of every twentieth step."""
    if report.step % 20 == 0:
        typer.echo(f"  step {report.step}: loss {report.loss:.4f}")


def make_student(row: Row, recipe: Recipe, setting: Setting) -> PreTrainedModel:
    """The student as it is before training."""
    teacher = setting.teacher
    ids = setting.calibration
    if row.kind == "teacher":
        return teacher_as_student(teacher, ids=ids, **row.settings)
    if row.kind == "transcoder":
        return transcoder_student(teacher, ids, **row.settings, seed=recipe.seed)
    settings = dict(row.settings)
    kernel = settings.pop("kernel", "")
    kernel = import_kernel(kernel) if kernel else ""
    if kernel not in setting.starts:
        dense = KernelFFNConfig(kernel=kernel, rows="tied")
        setting.starts[kernel], _ = convert(teacher, dense, calibration_ids=ids)
    student, _ = convert(
        teacher,
        KernelFFNConfig(kernel=kernel, **settings),
        calibration_ids=ids,
        allocate=row.allocate,
        start=setting.starts[kernel],
        seed=recipe.seed,
    )
    if setting.fused:
        fuse(student)
    return student


def evaluate(student: PreTrainedModel, setting: Setting) -> dict[str, Any]:
    """Fidelity on every test text; readability, continuations and Jacobians on the first."""
    student.eval()
    teacher = setting.teacher
    first = next(iter(setting.tests.values()))
    report = evaluate_student(student, teacher, first[:READABILITY_ROWS].cpu())
    layers = report["layers"]
    figures: dict[str, Any] = {
        "texts": {name: compare(student, teacher, ids) for name, ids in setting.tests.items()},
    }
    for name in ("fvu", "coherence", "orthogonal_coherence", "opposed_share", "write_mass_ratio"):
        figures[name] = fmean(layer[name] for layer in layers)
    active = [layer["active_prototypes_student_inputs"] for layer in layers]
    figures["active"] = fmean(active)
    figures["active_by_layer"] = [round(count, 1) for count in active]
    figures["dead"] = fmean(layer["dead_prototypes"] for layer in layers)
    figures["teacher_coherence"] = fmean(layer["teacher"]["coherence"] for layer in layers)
    figures["jacobian_cosine"], figures["skip_share"] = compare_ffns(student, teacher, first[:2])
    if setting.prompts:
        prompts = select_prompts(teacher, first.cpu(), setting.prompts)
        figures["generation"] = compare_continuations(student, teacher, prompts)
    return figures


def compare_ffns(
    student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor
) -> tuple[float, float | None]:
    """At the teacher's inputs, means over layers: the cosine of the Jacobians of both FFNs, by
    their products with random directions; and the share of what is written around its mean that
    the linear map writes, None without one."""
    stock = {path: find_stock_ffn(teacher, path) for path in student.kernel_ffns()}
    with torch.no_grad(), capture_ffn_inputs_and_outputs(teacher.base_model, stock) as seen:
        teacher.base_model(ids)
    cosines = []
    shares = []
    for path, ffn in student.kernel_ffns().items():
        inputs = seen[path][0].detach()[1:]
        generator = torch.Generator(inputs.device).manual_seed(0)
        products: dict[str, list[Tensor]] = {"student": [], "teacher": []}
        for _ in range(DIRECTIONS):
            seed = torch.randn(inputs.shape, generator=generator, device=inputs.device)
            products["student"].append(pull_back(ffn, inputs, seed))
            products["teacher"].append(pull_back(stock[path], inputs, seed))
        ours, theirs = (torch.stack(each).flatten() for each in products.values())
        cosines.append(nn.functional.cosine_similarity(ours, theirs, dim=0).item())
        with torch.no_grad():
            skip = ffn.readout(inputs).skip
            if skip is not None:
                mixture = measure_spread(ffn(inputs) - skip)
                linear = measure_spread(skip)
                shares.append((linear / (linear + mixture)).item())
    return fmean(cosines), fmean(shares) if shares else None


def pull_back(ffn: nn.Module, inputs: Tensor, seed: Tensor) -> Tensor:
    """The gradient of ``seed`` · ffn(inputs) by the inputs."""
    with torch.enable_grad():
        leaf = inputs.clone().requires_grad_()
        return torch.autograd.grad(ffn(leaf), leaf, seed)[0]


def measure_spread(written: Tensor) -> Tensor:
    """The mean length of ``written`` (tokens, hidden_size) around its mean."""
    return (written - written.mean(0)).norm(dim=-1).mean()


def describe(report: Mapping[str, Any]) -> str:
    """The figures of a report in one line."""
    texts = [
        f"{name} {each['delta_cross_entropy']:.3f} / {each['kl']:.3f} / "
        f"{100 * each['top1_agreement']:.1f}%"
        for name, each in report["texts"].items()
    ]
    return (
        f"{'; '.join(texts)}; active {report['active']:.0f}, coherence {report['coherence']:.3f}, "
        f"{report['training_seconds']:.0f} s"
    )


@app.command()
def show(out: Annotated[Path, typer.Argument(help="folder of reports that run has made")]) -> None:
    """Write table.csv, table.md and frontier.png of OUT and the folders in it; print the table."""
    reports = [json.loads(file.read_text()) for file in sorted(out.rglob("*.json"))]
    if not reports:
        sys.exit(
            f"error: found no reports in {out}, expected those of 'real_frontier.py run': run it "
            "first"
        )
    first = next(iter(reports[0]["texts"]))
    reports.sort(key=lambda report: (-report["count"], report["texts"][first]["kl"]))
    table = [make_cells(report) for report in reports]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    write_text(out / "table.csv", buffer.getvalue())
    lines = ["| " + " | ".join(table[0]) + " |", "|" + "---|" * len(table[0])]
    lines += ["| " + " | ".join(map(str, cells.values())) + " |" for cells in table]
    write_text(out / "table.md", "\n".join(lines) + "\n")
    plot(reports, out / "frontier.png")
    typer.echo("\n".join(lines))


def make_cells(report: Mapping[str, Any]) -> dict[str, str]:
    """One line of the table by column."""
    cells = {"row": report["row"], "tokens": f"{report['tokens']:,}"}
    trained_by = f"{Path(report['train']).stem}, {report['learning_rate']:g}"
    cells["text, rate"] = trained_by if report["trained"] else "–"
    for name, each in report["texts"].items():
        cells[f"{name}: ΔCE / KL / top-1"] = (
            f"{each['delta_cross_entropy']:.3f} / {each['kl']:.3f} / "
            f"{100 * each['top1_agreement']:.1f}%"
        )
    share = report["skip_share"]
    generation = report.get("generation")
    equal = None if generation is None else generation["tokens_until_difference"]
    cells["active"] = f"{report['active']:.0f}"
    cells["coherence"] = f"{report['coherence']:.3f}"
    cells["opposed"] = f"{100 * report['opposed_share']:.1f}%"
    cells["dead"] = f"{report['dead']:.0f}"
    cells["Jacobian cosine"] = f"{report['jacobian_cosine']:.3f}"
    cells["linear share"] = "–" if share is None else f"{100 * share:.0f}%"
    cells["greedy tokens"] = "–" if equal is None else f"{100 * equal:.0f}%"
    cells["parameters"] = f"{report['parameters_ratio']:.3f}"
    return cells


if __name__ == "__main__":
    app()
