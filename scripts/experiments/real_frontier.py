#!/usr/bin/env python3
"""The frontier of a real model: every FFN sparse, at several numbers of active units per token.

    python scripts/real_models.py smollm2 runs/smollm2
    python scripts/experiments/real_frontier.py run runs/smollm2 --out runs/frontier \\
        --test wikitext2-test.txt --test books-test.txt --device cuda --batch-size 32
    python scripts/experiments/real_frontier.py show runs/frontier     # table.csv, table.md

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

CONTROLS = "recipes/examples/kernels/controls.py"
"""Kernels that are none, to see what a kernel is worth."""
COUNTS = "384,192,96,48,24"
RATES = {"kernel": 0.003, "teacher": 0.003, "transcoder": 0.003}
"""Peak steps of AdamW, as shares of a tensor's size. Of 0.003, 0.01 and 0.03 the first left least
KL in the teacher truncated to 192 after 250 thousand tokens."""
FRESH_RATE = 0.2
"""That of transcoders layer-wise, by Muon: they start from nothing."""
CALIBRATION_TOKENS = 16_384
READABILITY_ROWS = 8
"""Rows of the first test text on which figures of layers are taken."""
DIRECTIONS = 8
"""Random directions that a cosine of Jacobians is estimated from."""
WRITE_MASS = 0.03


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kind: str
    """kernel; teacher (its own FFNs, truncated); transcoder."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of KernelFFNConfig, TeacherFFN or Transcoder."""
    trained: bool = True
    allocate: bool = False
    """Whether active units are shared out over layers by cost."""
    write_mass: float = 0.0


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


def make_rows(count: int, units: int) -> dict[str, Row]:
    """The rows with ``count`` active units per token, of ``units``."""
    sparse = {"simplex": "threshold", "top_k": count}
    tied = {"rows": "tied", **sparse}
    return {
        f"readout, skip, allocated, {count}": Row("kernel", {**tied, "skip": True}, allocate=True),
        f"teacher truncated, trained, {count}": Row("teacher", sparse),
        f"readout, allocated, {count}": Row("kernel", tied, allocate=True),
        f"readout, {count}": Row("kernel", tied),
        f"readout, skip, {count}": Row("kernel", {**tied, "skip": True}),
        f"readout, skip, allocated, write mass, {count}": Row(
            "kernel", {**tied, "skip": True}, allocate=True, write_mass=WRITE_MASS
        ),
        f"relu2 in its place, skip, allocated, {count}": Row(
            "kernel", {**tied, "skip": True, "kernel": f"{CONTROLS}:relu2"}, allocate=True
        ),
        f"transcoder, 4x, skip, {count}": Row(
            "transcoder", {"width": 4 * units, "top_k": count, "skip": True}
        ),
        f"transcoder, 4x, {count}": Row(
            "transcoder", {"width": 4 * units, "top_k": count, "skip": False}
        ),
        f"teacher truncated, {count}": Row("teacher", sparse, trained=False),
        f"readout, untrained, {count}": Row("kernel", tied, trained=False),
        f"readout, skip, allocated, untrained, {count}": Row(
            "kernel", {**tied, "skip": True}, allocate=True, trained=False
        ),
    }


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
    if start is not None:
        setting.starts[""] = load_student(start, device=device)
    units = model.config.intermediate_size

    out.mkdir(parents=True, exist_ok=True)
    wanted = [name.strip() for name in only.split(";")] if only else None
    names = list(make_rows(0, units))
    for name in names:
        if wanted is not None and name.removesuffix(", 0") not in wanted:
            continue
        for count in map(int, counts.split(",")):
            label = f"{name.removesuffix(', 0')}, {count}"
            file = out / f"{label.replace(', ', '_').replace(' ', '-')}.json"
            late = seconds is not None and time.perf_counter() - began > seconds
            if file.exists() or late:
                continue
            row = make_rows(count, units)[label]
            recipe = make_recipe(teacher, row, train, tokens, batch_size, seed, dtype)
            report = {"row": label, "count": count, **measure(row, recipe, setting)}
            # Whole or not at all: what is there is not run again.
            write_text(file, json.dumps(report, indent=1) + "\n")
            typer.echo(f"{label}: {describe(report)}")


def make_recipe(
    teacher: str,
    row: Row,
    train: str,
    tokens: int,
    batch_size: int,
    seed: int,
    dtype: str,
) -> Recipe:
    """All tokens on the logits; transcoders, which start from nothing, half of them layer-wise."""
    stages: list[dict[str, Any]] = [
        {
            "name": "logits",
            "tokens": tokens,
            "optimizer": "adamw",
            "learning_rate": RATES[row.kind],
            "batch_size": batch_size,
            "write_mass": row.write_mass,
        }
    ]
    if row.kind == "transcoder":
        layer_wise = {"name": "layer-wise", "optimizer": "muon", "learning_rate": FRESH_RATE}
        stages[0]["tokens"] = tokens // 2
        stages.insert(0, {**stages[0], **layer_wise})
    return Recipe(
        teacher=teacher,
        data={"train": train, "bos": "always"},
        stages=stages,
        seed=seed,
        dtype=dtype,
        output_dir="runs/real_frontier",
    )


def measure(row: Row, recipe: Recipe, setting: Setting) -> dict[str, Any]:
    """Build, train and evaluate one row; everything that its report says."""
    began = time.perf_counter()
    student = make_student(row, recipe, setting)
    converted = time.perf_counter()
    if row.trained:
        train_student(
            recipe, setting.tokenizer, setting.teacher, student, listeners=[print_every_so_often]
        )
    trained = time.perf_counter()
    return {
        **asdict(row),
        "seed": recipe.seed,
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
    """Write table.csv and table.md into OUT; print the Markdown."""
    reports = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
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
    typer.echo("\n".join(lines))


def make_cells(report: Mapping[str, Any]) -> dict[str, str]:
    """One line of the table by column."""
    cells = {"row": report["row"], "tokens": f"{report['tokens']:,}"}
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
