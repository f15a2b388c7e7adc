#!/usr/bin/env python3
"""Trained models of other families, by their recipes: how close they are converted with
calibration, and how close distilled.

    # Reports that are there already are kept.
    python scripts/experiments/trained_families.py recipes/qwen3-faithful.yaml
    python scripts/experiments/trained_families.py MY_RECIPE.yaml … --out runs/results

Writes OUT/<teacher>/converted.json and distilled.json, what `hf-kernel-ffn evaluate --json` writes,
and prints the table.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kernel_ffn.distillation import Recipe, distill, load_recipe
from hf_kernel_ffn.distillation.run import student_of
from hf_kernel_ffn.distillation.state import find_state
from hf_kernel_ffn.evaluation.report import evaluate_student
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_student, load_teacher, load_tokenizer
from hf_kernel_ffn.text.packing import read_token_ids

HEAD = (
    "| | tokens | CE | ΔCE | KL | top-1 | pooled cosine, centred | read | dead | coherence "
    "| opposed | mass |"
)
READABILITY = {
    "dead_prototypes": ".0f",
    "coherence": ".3f",
    "opposed_share": ".3f",
    "write_mass_ratio": ".2f",
}
"""Figures of the last columns, and how many digits they have."""


def main(
    recipes: Annotated[
        list[str], typer.Argument(help="recipes whose teachers are in folders of different names")
    ],
    out: Annotated[Path, typer.Option(help="folder of reports")] = Path("recipes/results"),
    text: Annotated[str, typer.Option(help="text to evaluate on")] = "recipes/text/books-test.txt",
    max_tokens: Annotated[int, typer.Option(help="tokens of it")] = 16_384,
) -> None:
    """Make the reports that OUT does not hold yet, and print the table."""
    lines = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    for name in recipes:
        recipe = load_recipe(name)
        folder = out / Path(recipe.teacher).name
        folder.mkdir(parents=True, exist_ok=True)
        for stage in ("converted", "distilled"):
            file = folder / f"{stage}.json"
            if not file.exists():
                typer.echo(f"{name}: {stage}", err=True)
                report = measure(name, recipe, stage == "distilled", text, max_tokens)
                write_text(file, json.dumps(report, indent=1) + "\n")
            report = json.loads(file.read_text(encoding="utf-8"))
            if stage == "converted":
                lines.append(format_untouched(f"*{folder.name}, untouched*", report))
            lines.append(format_student(f"{folder.name}, {stage}", report))
    typer.echo("\n".join(lines))


def measure(name: str, recipe: Recipe, distilled: bool, text: str, max_tokens: int) -> dict:
    """Evaluate the student of a recipe as its distillation starts it, or ``distilled``."""
    teacher = load_teacher(recipe.teacher)
    tokenizer = load_tokenizer(recipe.teacher)
    ids = read_token_ids(tokenizer, [text], recipe.data.sequence_length, max_tokens)
    make = load_distilled if distilled else student_of
    student = make(recipe, teacher, tokenizer)
    ffns = student.kernel_ffns().values()
    return {
        "recipe": name,
        "training_tokens": sum(stage.tokens for stage in recipe.stages) if distilled else 0,
        "text": text,
        "prototypes": [ffn.config.prototypes for ffn in ffns],
        "parameters": [sum(p.numel() for p in ffn.parameters()) for ffn in ffns],
        **evaluate_student(student, teacher, ids, tokenizer=tokenizer, progress=True),
    }


def load_distilled(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load the finished student, distilled first if it is not there; an interrupted distillation
    goes on."""
    folder = Path(recipe.output_dir)
    if not (folder / "config.json").exists():
        distill(recipe, resume=find_state(folder) is not None)
    return load_student(str(folder))


def format_untouched(name: str, report: dict) -> str:
    """The line of the teacher itself."""
    layers = [layer["teacher"] for layer in report["layers"]]
    pooled = "–"
    if "pooled_cosine" in report:
        pooled = f"between rows {report['teacher']['pooled_cosine_of_neighbours']:.3f}"
    return (
        f"| {name} |  | {report['teacher']['cross_entropy']:.4f} | 0 | 0 | 100% | {pooled} "
        f"| {fmean(layer['active_prototypes'] for layer in layers):.1f} "
        f"{format_readability(layers)}"
    )


def format_student(name: str, report: dict) -> str:
    """The line of a student: figures of layers are means over them."""
    layers = report["layers"]
    pooled = "–"
    if "pooled_cosine" in report:
        pooled = f"{report['pooled_cosine']:.5f}, {report['pooled_cosine_centred']:.4f}"
    return (
        f"| {name} | {report['training_tokens'] / 1e6:.1f}M "
        f"| {report['student']['cross_entropy']:.4f} | {report['delta_cross_entropy']:.4f} "
        f"| {report['kl']:.4f} | {report['top1_agreement']:.1%} | {pooled} "
        f"| {fmean(layer['active_prototypes'] for layer in layers):.1f} "
        f"of {report['prototypes'][0]} {format_readability(layers)}"
    )


def format_readability(layers: list[dict]) -> str:
    """The last columns."""
    cells = [
        format(fmean(layer[name] for layer in layers), form) for name, form in READABILITY.items()
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
