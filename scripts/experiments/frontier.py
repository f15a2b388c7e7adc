#!/usr/bin/env python3
"""The frontier of fidelity and readability: named configurations and their controls at one budget
of tokens, in one table.

    python scripts/experiments/frontier.py run  recipes/teachers/llama --out recipes/results/llama
    # what is there already is kept python scripts/experiments/frontier.py show
    recipes/results/llama                                  # table.csv, table.md, frontier.png

Any causal language model of a supported family serves, with text of your own:
    python scripts/experiments/frontier.py run gpt2 --out runs/gpt2 --train my.txt --test other.txt
    --tokens 5000000 --device cuda
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True)
CONTROLS = "recipes/examples/kernels/controls.py"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kind: str
    """kernel; teacher (its own FFNs, truncated or not); transcoder; recipe (a file, with its own
    budget)."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of KernelFFNConfig, TeacherFFN or Transcoder; for a recipe, its file."""
    stages: dict[str, Any] = field(default_factory=dict)
    """What the row's stages have beside the common ones, by stage, or for both under ``*``."""
    trained: bool = True


def rows(units: int, gated: bool, family: str) -> dict[str, Row]:
    """The configurations for a teacher with ``units`` hidden units per FFN: k = units/16 and
    units/32 active per token."""
    k, few = units // 16, units // 32
    single, pieces = ("polarised ", 2) if gated else ("single ", 1)

    def some(active: int, simplex: str = "threshold", **more) -> dict:
        return {"simplex": simplex, "top_k": active, **more}

    relu, relu2 = f"{CONTROLS}:relu", f"{CONTROLS}:relu2"
    mass, more_mass = (
        {"layer-wise": {"write_mass": MASS}, "logits": {"write_mass": MASS / 2}},
        {"*": {"write_mass": 3 * MASS}},
    )
    table = {
        f"{single}half-yat": Row("kernel"),
        f"{single}half-yat, {2 * pieces} per unit": Row("kernel", {"expansion": 2.0 * pieces}),
        "half-yat, firing means": Row("kernel", {"init": "firing-means"}),
        f"{single}yat": Row("kernel", {"kernel": "yat"}),
        f"{single}ReLU²": Row("kernel", {"kernel": relu2}),
        f"half-yat, top-k {k}": Row("kernel", some(k, "top-k")),
        f"half-yat, threshold {k}": Row("kernel", some(k)),
        f"half-yat, threshold {k}, write mass": Row("kernel", some(k), mass),
        f"half-yat, threshold {k}, write mass x3": Row("kernel", some(k), more_mass),
        f"half-yat, threshold {few}, write mass": Row("kernel", some(few), mass),
        f"half-yat, {2 * pieces} per unit, threshold {k}, write mass": Row(
            "kernel", some(k, expansion=2.0 * pieces), mass
        ),
        f"half-yat, data-scale, threshold {k}, write mass": Row(
            "kernel", some(k, init="data-scale"), mass
        ),
        f"half-yat, firing means, threshold {k}, write mass": Row(
            "kernel", some(k, init="firing-means"), mass
        ),
        f"ReLU², threshold {k}, write mass": Row("kernel", some(k, kernel=relu2), mass),
        f"ReLU, threshold {k}, write mass": Row("kernel", some(k, kernel=relu), mass),
        "half-yat, entmax-1.5 with gate": Row(
            "kernel", {"simplex": "entmax-1.5", "intensity": "gate"}
        ),
        f"teacher truncated to {k}": Row("teacher", some(k, "top-k"), trained=False),
        f"teacher truncated to {few}": Row("teacher", some(few, "top-k"), trained=False),
        f"teacher, top-k {k}, trained": Row("teacher", some(k, "top-k")),
        f"teacher, threshold {k}, trained": Row("teacher", some(k)),
        f"teacher, threshold {k}, write mass, trained": Row("teacher", some(k), mass),
        f"teacher, threshold {few}, write mass, trained": Row("teacher", some(few), mass),
        "teacher trained further": Row(
            "teacher", {}, {"logits": {"kl": 0.0, "cross_entropy": 1.0}}
        ),
    }
    if gated:
        table["gated half-yat"] = Row("kernel", {"values": "gated"})
        table[f"gated half-yat, threshold {k}"] = Row("kernel", some(k, values="gated"))
        table[f"gated half-yat, threshold {k}, write mass"] = Row(
            "kernel", some(k, values="gated"), mass
        )
    for width in (1, 4):
        for skip in (False, True):
            name = f"transcoder, {width}m wide, top-k {k}{', skip' if skip else ''}"
            table[name] = Row("transcoder", {"width": width * units, "top_k": k, "skip": skip})
    for file in sorted(Path("recipes").glob(f"{family}-*.yaml")):
        table[f"recipe {file.stem}"] = Row("recipe", {"file": str(file)})
    return table


QUESTIONS = 200
"""Questions of the multiple-choice file that are asked."""
MASS = 0.03
"""Price on write mass layer-wise, in the rows that have one; half of it on the logits."""
SPARSE = {"layer-wise": {"learning_rate": 0.008}, "logits": {"learning_rate": 0.003}}
DENSE = {"layer-wise": {"learning_rate": 0.004}, "logits": {"learning_rate": 0.0005}}
FRESH = {"layer-wise": {"learning_rate": 0.2}, "logits": {"learning_rate": 0.003}}
"""Learning rates of the stages: of dense rows, which start close to the teacher, of sparse ones,
which do not, and of transcoders, which start from nothing."""


def make_recipe(teacher: str, row: Row, train: str, tokens: int, seed: int):
    """Half of the budget layer-wise by Muon, half on the logits by AdamW; the same for every row
    that has no file."""
    from hf_kernel_ffn.distillation import Recipe, load_recipe

    if row.kind == "recipe":
        return load_recipe(row.settings["file"])
    rates = (
        FRESH
        if row.kind == "transcoder"
        else SPARSE
        if row.settings.get("top_k") is not None
        else DENSE
    )
    stages = []
    for name, share, optimizer in (("layer-wise", 0.5, "muon"), ("logits", 0.5, "adamw")):
        stage = {
            "name": name,
            "tokens": round(share * tokens),
            "optimizer": optimizer,
            "batch_size": 4,
        }
        stage.update(rates[name])
        stages.append({**stage, **row.stages.get(name, {}), **row.stages.get("*", {})})
    if stages[1].get("kl") == 0.0:  # there is nothing to regress on
        stages = [{**stages[1], "tokens": tokens}]
    settings = row.settings if row.kind == "kernel" else {}
    return Recipe(
        teacher=teacher,
        kernel_ffn=settings,
        data={"train": train},
        stages=stages,
        seed=seed,
        output_dir="runs/frontier",
    )


def make_student(row: Row, recipe, teacher, tokenizer):
    """The student as it is before training."""
    from hf_kernel_ffn.conversion.convert import convert
    from hf_kernel_ffn.evaluation.baselines import teacher_as_student, transcoder_student
    from hf_kernel_ffn.text.packing import read_token_ids

    data = recipe.data
    ids = read_token_ids(
        tokenizer, data.sources, data.sequence_length, recipe.calibration_tokens, spread=True
    )
    if row.kind == "teacher":
        return teacher_as_student(teacher, ids=ids, **row.settings)
    if row.kind == "transcoder":
        return transcoder_student(teacher, ids, **row.settings, seed=recipe.seed)
    return convert(
        teacher,
        recipe.kernel_settings(),
        recipe.kernel_ffn.get("layers"),
        calibration_ids=ids,
        calibration_tokens=recipe.calibration_tokens,
        seed=recipe.seed,
    )[0]


def measure(
    name: str, row: Row, teacher, tokenizer, recipe, test, questions, students: Path | None
) -> dict:
    """Build, train and evaluate one row; everything that its report says."""
    from hf_kernel_ffn.distillation.trainer import train
    from hf_kernel_ffn.evaluation.probes import multiple_choice
    from hf_kernel_ffn.evaluation.report import evaluate_student

    student = make_student(row, recipe, teacher, tokenizer)
    if row.trained:
        train(recipe, tokenizer, teacher, student, progress=True)
    if students is not None and row.kind in ("kernel", "recipe"):
        for part in (student, tokenizer):
            part.save_pretrained(students / file_stem(name))
    ffns = list(student.kernel_ffns().values())
    report: dict[str, Any] = {
        "row": name,
        **asdict(row),
        "seed": recipe.seed,
        "teacher": recipe.teacher,
    }
    report["regime"] = regime(row, ffns[0])
    report["stages"] = (
        [stage.model_dump(exclude_defaults=True) for stage in recipe.stages] if row.trained else []
    )
    report["tokens"] = sum(stage.tokens for stage in recipe.stages) if row.trained else 0
    report["parameters_per_layer"] = sum(
        p.numel() for ffn in ffns for p in ffn.parameters()
    ) // len(ffns)
    report["prototypes"] = ffns[0].config.prototypes
    report.update(summary(evaluate_student(student, teacher, test)))
    if questions:
        report["cloze"] = multiple_choice(student, tokenizer, questions)["accuracy"]
    return report


def regime(row: Row, ffn) -> str:
    """What may be said about the row's coefficients."""
    if row.kind == "teacher":
        return "linear"
    if row.kind == "transcoder":
        return "conic + linear" if row.settings["skip"] else "conic"
    return ffn.config.settings.regime


def file_stem(name: str) -> str:
    """Of the row's report."""
    return name.replace(" ", "_").replace(",", "")


def summary(report: dict) -> dict:
    """The figures of an evaluation, those of layers averaged."""
    from hf_kernel_ffn.evaluation.readability import Readability

    kept = {k: report[k] for k in ("delta_cross_entropy", "kl", "top1_agreement", "loss_recovered")}
    kept["test_tokens"] = report["tokens"]
    for name in (
        "fvu",
        "write_mass_ratio",
        *(name for name in Readability.FIGURES if name != "write_mass"),
    ):
        for prefix, layers in (
            ("", report["layers"]),
            ("teacher_", [layer["teacher"] for layer in report["layers"]]),
        ):
            kept[prefix + name] = sum(layer[name] for layer in layers) / len(layers)
    own = [layer["active_prototypes_student_inputs"] for layer in report["layers"]]
    kept["active_prototypes_student_inputs"] = sum(own) / len(own)
    kept["dead_prototypes"] = sum(layer["dead_prototypes"] for layer in report["layers"]) / len(
        report["layers"]
    )
    return {**kept, "teacher_cross_entropy": report["teacher"]["cross_entropy"]}


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
        typer.Option(
            help="such as 1/2: every second row from the first on; 2/2, for a second process, is the others"
        ),
    ] = "1/1",
    students: Annotated[
        Optional[Path], typer.Option(help="folder in which trained kernel readouts are saved too")
    ] = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Run the rows that OUT does not hold yet."""
    from hf_kernel_ffn.evaluation.probes import load_questions, multiple_choice
    from hf_kernel_ffn.families.lookup import find_stock_ffns
    from hf_kernel_ffn.families.registry import get_architecture_of_model
    from hf_kernel_ffn.families.weights import read_stock_weights
    from hf_kernel_ffn.storage.files import write_text
    from hf_kernel_ffn.storage.loading import load_teacher, load_tokenizer
    from hf_kernel_ffn.text.packing import read_token_ids

    model, tokenizer = load_teacher(teacher, device=device), load_tokenizer(teacher)
    weights = read_stock_weights(
        model, next(iter(find_stock_ffns(model, get_architecture_of_model(model)).values()))
    )
    ids = read_token_ids(tokenizer, [test], 256, test_tokens)
    questions = load_questions(cloze)[:QUESTIONS] if cloze else []
    teacher_cloze = multiple_choice(model, tokenizer, questions)["accuracy"] if questions else None
    out.mkdir(parents=True, exist_ok=True)
    wanted = rows(len(weights.up), weights.gate is not None, model.config.model_type)
    part_number, parts = map(int, part.split("/"))
    names = [only] if only in wanted else [name for name in wanted if only in name]
    wanted = {name: wanted[name] for name in names[part_number - 1 :: parts]}
    for number, (name, row) in enumerate(wanted.items(), 1):
        file = out / f"{file_stem(name)}.json"
        if file.exists():
            continue
        typer.echo(f"row {number} of {len(wanted)}: {name}")
        recipe = make_recipe(teacher, row, train, tokens, seed)
        report = measure(name, row, model, tokenizer, recipe, ids, questions, students)
        report["teacher_cloze"] = teacher_cloze
        write_text(
            file, json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        )  # whole or not at all: what is there is not run again
        typer.echo(
            "  "
            + "  ".join(
                f"{k} {report[k]:.4f}"
                for k in ("delta_cross_entropy", "kl", "top1_agreement", "coherence")
            )
        )


COLUMNS = (
    "row",
    "regime",
    "tokens",
    "parameters_per_layer",
    "prototypes",
    "active_prototypes",
    "active_prototypes_student_inputs",
    "dead_prototypes",
    "delta_cross_entropy",
    "kl",
    "top1_agreement",
    "loss_recovered",
    "cloze",
    "fvu",
    "coherence",
    "orthogonal_coherence",
    "effective_prototypes",
    "opposed_share",
    "write_mass_ratio",
    "seed",
)
GROUPS = ("operating points", "dense", "sparse", "controls")


def group(row: dict) -> int:
    """The number in GROUPS of a report."""
    if row["kind"] == "kernel":
        control = str(row["settings"].get("kernel", "")).startswith(CONTROLS)
        return 3 if control else 2 if row["settings"].get("top_k") else 1
    return 0 if row["kind"] == "recipe" else 3


@app.command()
def show(out: Annotated[Path, typer.Argument(help="folder of reports that run has made")]) -> None:
    """Write table.csv, table.md and frontier.png into OUT; print the Markdown."""
    import csv

    from hf_kernel_ffn.storage.files import replace_file, write_text

    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))]
    if not found:
        sys.exit(
            f"error: found no reports in {out}, expected those of 'frontier.py run': run it first"
        )
    found.sort(key=lambda row: (group(row), row["kl"]))
    with (
        replace_file(out / "table.csv") as beside,
        beside.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    table = markdown(found)
    write_text(out / "table.md", table)
    typer.echo(table, nl=False)
    plot(found, out / "frontier.png")


def markdown(found: list[dict]) -> str:
    """The table; ``read`` is how many rows of the dictionary a token reads, of how many, at the
    teacher's inputs (as all figures of readability are), ``own`` the same when the student itself
    runs."""
    first = found[0]
    lines = [
        "| # | | regime | parameters | tokens | ΔCE | KL | top-1 | cloze | read | own | dead | coherence | 1/√n_eff | opposed | mass |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        f"| | *the teacher, untouched* | linear | | | 0 | 0 | 100% | {_share(first['teacher_cloze'])} "
        f"| {first['teacher_active_prototypes']:.0f} | | | {first['teacher_coherence']:.3f} "
        f"| {first['teacher_orthogonal_coherence']:.3f} | {first['teacher_opposed_share']:.3f} | 1 |",
    ]
    for number, row in enumerate(found, 1):
        if number == 1 or group(row) != group(found[number - 2]):
            lines.append(f"| | *{GROUPS[group(row)]}* {'| ' * 14}|")
        lines.append(
            f"| {number} | {row['row']} | {row['regime']} | {row['parameters_per_layer'] / 1000:.0f}k "
            f"| {row['tokens'] / 1e6:.1f}M | {row['delta_cross_entropy']:.4f} | {row['kl']:.4f} | {row['top1_agreement']:.1%} "
            f"| {_share(row.get('cloze'))} | {row['active_prototypes']:.1f} of {row['prototypes']} "
            f"| {_number(row.get('active_prototypes_student_inputs'))} | {row['dead_prototypes']:.0f} | {row['coherence']:.3f} | {row['orthogonal_coherence']:.3f} "
            f"| {row['opposed_share']:.3f} | {row['write_mass_ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


MARKS = {"kernel": "o", "recipe": "*", "teacher": "s", "transcoder": "^"}


def plot(found: list[dict], file: Path) -> None:
    """ΔCE against active prototypes per token, coloured by coherence, and against coherence; points
    by their number in the table."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(14, 7), layout="constrained", sharey=True)
    scale = plt.Normalize(0, max(row["coherence"] for row in found))
    for axes, across in zip(panels, ("active_prototypes", "coherence")):
        for kind, mark in MARKS.items():
            here = [row for row in found if row["kind"] == kind]
            points = axes.scatter(
                [row[across] for row in here],
                [max(row["delta_cross_entropy"], 1e-4) for row in here],
                c=[row["coherence"] for row in here],
                norm=scale,
                cmap="viridis",
                marker=mark,
                s=160 if mark == "*" else 70,
                edgecolors="black",
                linewidths=0.6,
                label=kind,
            )
        for number, row in enumerate(found, 1):
            place = (row[across], max(row["delta_cross_entropy"], 1e-4))
            axes.annotate(str(number), place, xytext=(5, 3), textcoords="offset points", fontsize=8)
    panels[0].set(xscale="log", yscale="log", xlabel="active prototypes per token")
    panels[0].set_ylabel("ΔCE (nats per token; 1e-4 or less at the bottom)")
    panels[1].set_xlabel("coherence")
    panels[0].legend()
    figure.colorbar(points, label="coherence")
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    app()
