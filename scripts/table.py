#!/usr/bin/env python3
"""The README's table: convert without text, convert with text, distil; evaluate each on text never trained on.

python scripts/table.py run              # every row that recipes/results does not hold yet; --only llama/ for some
python scripts/table.py show             # the table, in Markdown, from recipes/results
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

del sys.path[0]  # this folder, whose evaluate.py would hide the evaluate package

import typer  # noqa: E402

RESULTS = Path("recipes/results")
TEST_TEXT, TRAIN_TEXT = "recipes/text/books-test.txt", "recipes/text/books-distil.txt"
MAX_TOKENS = 32_768

GATED_FAMILY = {
    "polarised half-yat": {},
    "polarised half-yat, 1.5m": {"expansion": 1.5},
    "gated half-yat": {"values": "gated"},
    "polarised yat (PD)": {"kernel": "yat"},
    "polarised ReLU": {"kernel": "recipes/kernels/controls.py:relu"},
    "polarised ReLU²": {"kernel": "recipes/kernels/controls.py:relu2"},
}
PLAIN_FAMILY = {
    "single half-yat": {},
    "single yat (PD)": {"kernel": "yat"},
    "single ReLU": {"kernel": "recipes/kernels/controls.py:relu"},
    "single ReLU²": {"kernel": "recipes/kernels/controls.py:relu2"},
}
ROWS = {
    f"{family}/{name}": (family, settings)
    for family, rows in (("llama", GATED_FAMILY), ("mistral", GATED_FAMILY), ("gpt2", PLAIN_FAMILY))
    for name, settings in rows.items()
}

app = typer.Typer(add_completion=False)


@app.command()
def run(only: Annotated[str, typer.Option(help="rows whose name starts so")] = "") -> None:
    RESULTS.mkdir(exist_ok=True)
    for name, (family, settings) in ROWS.items():
        file = RESULTS / (name.replace("/", "-").replace(" ", "_") + ".json")
        if name.startswith(only) and not file.exists():
            report = measure(family, settings)
            file.write_text(json.dumps({"row": name, **report}, indent=1, ensure_ascii=False) + "\n")
            typer.echo(f"{name}: {report['distilled']}")


def measure(family: str, settings: dict) -> dict:
    from hf_kernel_ffn.data import token_ids
    from hf_kernel_ffn.distillation import distill, load_recipe
    from hf_kernel_ffn.evaluation import evaluate_student
    from hf_kernel_ffn.loading import load_student, load_teacher, load_tokenizer
    from hf_kernel_ffn.surgery import convert

    gated = "-gated" if settings.get("values") == "gated" else ""
    recipe_file, teacher_path = f"recipes/{family}{gated}.yaml", f"recipes/teachers/{family}"
    teacher, tokenizer = load_teacher(teacher_path), load_tokenizer(teacher_path)
    test = token_ids(tokenizer, [TEST_TEXT], 256, MAX_TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        changes = [f"kernel_ffn.{key}={value}" for key, value in settings.items()]
        recipe = load_recipe(recipe_file, [*changes, f"output_dir={scratch}/student"])
        report: dict = {"settings": settings, "tokens": {s.name: s.tokens for s in recipe.stages}, "seed": recipe.seed}
        text = token_ids(tokenizer, [TRAIN_TEXT], 256, 16_384, spread=True)
        for key, ids in (("converted", None), ("calibrated", text)):
            student, conversion = convert(teacher, recipe.kernel_settings(), calibration_ids=ids)
            report[key] = summary(evaluate_student(student, teacher, test))
        distill(recipe, progress=False)
        report["distilled"] = summary(
            evaluate_student(load_student(f"{scratch}/student", trust_remote_code=True), teacher, test)
        )
        report["parameters_per_layer"] = next(iter(conversion.layers.values()))["parameters"]
        report["prototypes"] = next(iter(conversion.layers.values()))["prototypes"]
    return report


def summary(report: dict) -> dict:
    """The figures of a report, those of layers averaged."""
    kept = {k: report[k] for k in ("tokens", "delta_cross_entropy", "kl", "top1_agreement", "loss_recovered")}
    for name in ("fvu", "active_prototypes", "effective_prototypes", "coherence", "opposed_share", "write_mass_ratio"):
        for prefix, layers in (("", report["layers"]), ("teacher_", [layer["teacher"] for layer in report["layers"]])):
            kept[prefix + name] = sum(layer[name] for layer in layers) / len(layers)
    return {**kept, "teacher_cross_entropy": report["teacher"]["cross_entropy"]}


@app.command()
def show() -> None:
    typer.echo(
        "| | parameters per FFN | ΔCE, no text | ΔCE, text | ΔCE distilled | KL | top-1 | loss recovered | active | coherence | opposed |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in ROWS:
        file = RESULTS / (name.replace("/", "-").replace(" ", "_") + ".json")
        if not file.exists():
            continue
        row = json.loads(file.read_text())
        d = row["distilled"]
        typer.echo(
            f"| {name.replace('/', ', ')} | {row['parameters_per_layer'] / 1000:.0f}k | {row['converted']['delta_cross_entropy']:.4f} "
            f"| {row['calibrated']['delta_cross_entropy']:.4f} | {d['delta_cross_entropy']:.4f} | {d['kl']:.4f} | {d['top1_agreement']:.1%} "
            f"| {d['loss_recovered']:.2%} | {d['active_prototypes']:.0f} of {row['prototypes']} "
            f"| {d['coherence']:.3f} (teacher {d['teacher_coherence']:.3f}) | {d['opposed_share']:.3f} ({d['teacher_opposed_share']:.3f}) |"
        )


if __name__ == "__main__":
    app()
