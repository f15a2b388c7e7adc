#!/usr/bin/env python3
"""Trained models of other families, by their recipes: how close they are converted with
calibration, and how close distilled.

    python scripts/experiments/trained_families.py recipes/qwen3-faithful.yaml         # reports
    that are there already are kept python scripts/experiments/trained_families.py MY_RECIPE.yaml …
    --out runs/results

Writes OUT/<teacher>/converted.json and distilled.json, what `hf-kernel-ffn evaluate --json` writes,
and prints the table.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

HEAD = "| | tokens | CE | ΔCE | KL | top-1 | pooled cosine, centred | read | dead | coherence | opposed | mass |"


def converted(recipe, teacher, tokenizer) -> Any:
    """The student as the recipe's distillation starts it."""
    from hf_kernel_ffn.distillation.run import student_of

    return student_of(recipe, teacher, tokenizer)


def distilled(recipe, teacher, tokenizer) -> Any:
    """The finished student, from its folder if it is there; an interrupted distillation goes on."""
    from hf_kernel_ffn.distillation import distill
    from hf_kernel_ffn.distillation.state import find_state
    from hf_kernel_ffn.storage.loading import load_student

    out = Path(recipe.output_dir)
    if not (out / "config.json").exists():
        distill(recipe, resume=find_state(out) is not None)
    return load_student(str(out))


def main(
    recipes: Annotated[
        list[str], typer.Argument(help="recipes whose teachers are in folders of different names")
    ],
    out: Annotated[Path, typer.Option(help="folder of reports")] = Path("recipes/results"),
    text: Annotated[str, typer.Option(help="text to evaluate on")] = "recipes/text/books-test.txt",
    max_tokens: Annotated[int, typer.Option(help="tokens of it")] = 16_384,
) -> None:
    from hf_kernel_ffn.distillation import load_recipe
    from hf_kernel_ffn.evaluation.report import evaluate_student
    from hf_kernel_ffn.storage.files import write_text
    from hf_kernel_ffn.storage.loading import load_teacher, load_tokenizer
    from hf_kernel_ffn.text.packing import read_token_ids

    lines = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    for name in recipes:
        recipe = load_recipe(name)
        folder = out / Path(recipe.teacher).name
        folder.mkdir(parents=True, exist_ok=True)
        for make in (converted, distilled):
            file = folder / f"{make.__name__}.json"
            if not file.exists():
                typer.echo(f"{name}: {make.__name__}", err=True)
                teacher, tokenizer = load_teacher(recipe.teacher), load_tokenizer(recipe.teacher)
                ids = read_token_ids(tokenizer, [text], recipe.data.sequence_length, max_tokens)
                student = make(recipe, teacher, tokenizer)
                ffns = student.kernel_ffns().values()
                about = {
                    "recipe": name,
                    "training_tokens": sum(s.tokens for s in recipe.stages)
                    if make is distilled
                    else 0,
                    "text": text,
                    "prototypes": [ffn.config.prototypes for ffn in ffns],
                    "parameters": [sum(p.numel() for p in ffn.parameters()) for ffn in ffns],
                }
                report = evaluate_student(student, teacher, ids, tokenizer=tokenizer, progress=True)
                write_text(file, json.dumps({**about, **report}, indent=1) + "\n")
            report = json.loads(file.read_text(encoding="utf-8"))
            if make is converted:
                lines.append(row(f"*{folder.name}, untouched*", report, untouched=True))
            lines.append(row(f"{folder.name}, {make.__name__}", report))
    typer.echo("\n".join(lines))


def row(name: str, report: dict, untouched: bool = False) -> str:
    """One line of the table: figures of layers are means over them."""

    def mean(figure: str) -> float:
        found = [(layer["teacher"] if untouched else layer)[figure] for layer in report["layers"]]
        return sum(found) / len(found)

    pooled = "–"
    if "pooled_cosine" in report:
        pooled = f"{report['pooled_cosine']:.5f}, {report['pooled_cosine_centred']:.4f}"
        if untouched:
            pooled = f"between rows {report['teacher']['pooled_cosine_of_neighbours']:.3f}"
    if untouched:
        fidelity = f"| {report['teacher']['cross_entropy']:.4f} | 0 | 0 | 100% | {pooled} "
        read = f"{mean('active_prototypes'):.1f}"
    else:
        fidelity = (
            f"| {report['student']['cross_entropy']:.4f} | {report['delta_cross_entropy']:.4f} | {report['kl']:.4f} "
            f"| {report['top1_agreement']:.1%} | {pooled} "
        )
        read = f"{mean('active_prototypes'):.1f} of {report['prototypes'][0]}"
    tokens = "" if untouched else f"{report['training_tokens'] / 1e6:.1f}M"
    return (
        f"| {name} | {tokens} {fidelity}| {read} | {mean('dead_prototypes'):.0f} | {mean('coherence'):.3f} "
        f"| {mean('opposed_share'):.3f} | {mean('write_mass_ratio'):.2f} |"
    )


if __name__ == "__main__":
    typer.run(main)
