"""The rows of the frontier: named configurations and their controls, and how each is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_kernel_ffn.distillation import Recipe, load_recipe

CONTROLS = "recipes/examples/kernels/controls.py"
"""Kernels that are none, to see what a kernel is worth."""
MASS = 0.03
"""Price on write mass layer-wise, in the rows that have one; half of it on the logits."""
SPARSE = {"layer-wise": {"learning_rate": 0.008}, "logits": {"learning_rate": 0.003}}
"""Learning rates of sparse rows, which do not start close to the teacher."""
DENSE = {"layer-wise": {"learning_rate": 0.004}, "logits": {"learning_rate": 0.0005}}
"""Those of dense rows, which do."""
FRESH = {"layer-wise": {"learning_rate": 0.2}, "logits": {"learning_rate": 0.003}}
"""Those of transcoders, which start from nothing."""
OPTIMIZERS = {"layer-wise": "muon", "logits": "adamw"}
SHARE = 0.5
"""Of the tokens that each of the two stages has."""
BATCH_SIZE = 4
WIDTHS = (1, 4)
"""Latents of transcoders per hidden unit."""


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


PRICED = {"layer-wise": {"write_mass": MASS}, "logits": {"write_mass": MASS / 2}}
PRICED_THRICE = {"*": {"write_mass": 3 * MASS}}


def make_rows(units: int, gated: bool, family: str) -> dict[str, Row]:
    """Make the configurations for a teacher with ``units`` hidden units per FFN: k = units/16 and
    units/32 prototypes active per token."""
    k = units // 16
    few = units // 32
    return {
        **make_dense_rows(gated),
        **make_sparse_rows(k, few, gated),
        **make_teacher_rows(k, few),
        **(make_gated_rows(k) if gated else {}),
        **make_transcoder_rows(units, k),
        **make_recipe_rows(family),
    }


def kernel(**settings: Any) -> Row:
    """A kernel readout that is trained as all are."""
    return Row("kernel", settings)


def priced(simplex_row: Row, stages: dict[str, Any] = PRICED) -> Row:
    """The same row with a price on write mass."""
    return Row(simplex_row.kind, simplex_row.settings, stages)


def thresholded(k: int, kind: str = "kernel", **settings: Any) -> Row:
    """A row with ``k`` prototypes active per token on average."""
    return Row(kind, {"simplex": "threshold", "top_k": k, **settings})


def truncated(k: int, kind: str = "kernel", trained: bool = True) -> Row:
    """A row with ``k`` prototypes active for every token."""
    return Row(kind, {"simplex": "top-k", "top_k": k}, trained=trained)


def make_dense_rows(gated: bool) -> dict[str, Row]:
    """Readouts in which all prototypes may be active."""
    single = "polarised" if gated else "single"
    pieces = 4 if gated else 2
    return {
        f"{single} half-yat": kernel(kernel="half-yat"),
        f"{single} half-yat, {pieces} per unit": kernel(expansion=float(pieces)),
        "half-yat, firing means": kernel(init="firing-means"),
        f"{single} yat": kernel(kernel="yat"),
        f"{single} ReLU²": kernel(kernel=f"{CONTROLS}:relu2"),
    }


def make_sparse_rows(k: int, few: int, gated: bool) -> dict[str, Row]:
    """Readouts in which few prototypes are active, with and without a price on write mass."""
    pieces = 4 if gated else 2
    half_yat = thresholded(k)
    relu = thresholded(k, kernel=f"{CONTROLS}:relu")
    relu2 = thresholded(k, kernel=f"{CONTROLS}:relu2")
    more = thresholded(k, expansion=float(pieces))
    data_scale = thresholded(k, init="data-scale")
    firing_means = thresholded(k, init="firing-means")
    return {
        f"half-yat, top-k {k}": truncated(k),
        f"half-yat, threshold {k}": half_yat,
        f"half-yat, threshold {k}, write mass": priced(half_yat),
        f"half-yat, threshold {k}, write mass x3": priced(half_yat, PRICED_THRICE),
        f"half-yat, threshold {few}, write mass": priced(thresholded(few)),
        f"half-yat, {pieces} per unit, threshold {k}, write mass": priced(more),
        f"half-yat, data-scale, threshold {k}, write mass": priced(data_scale),
        f"half-yat, firing means, threshold {k}, write mass": priced(firing_means),
        f"ReLU², threshold {k}, write mass": priced(relu2),
        f"ReLU, threshold {k}, write mass": priced(relu),
        "half-yat, entmax-1.5 with gate": kernel(simplex="entmax-1.5", intensity="gate"),
    }


def make_teacher_rows(k: int, few: int) -> dict[str, Row]:
    """The teacher's own FFNs, truncated as they are or trained."""
    of_k = thresholded(k, kind="teacher")
    of_few = thresholded(few, kind="teacher")
    on_text = {"logits": {"kl": 0.0, "cross_entropy": 1.0}}
    return {
        f"teacher truncated to {k}": truncated(k, "teacher", trained=False),
        f"teacher truncated to {few}": truncated(few, "teacher", trained=False),
        f"teacher, top-k {k}, trained": truncated(k, "teacher"),
        f"teacher, threshold {k}, trained": of_k,
        f"teacher, threshold {k}, write mass, trained": priced(of_k),
        f"teacher, threshold {few}, write mass, trained": priced(of_few),
        "teacher trained further": Row("teacher", stages=on_text),
    }


def make_gated_rows(k: int) -> dict[str, Row]:
    """Readouts with gated values, for gated teachers."""
    sparse = thresholded(k, values="gated")
    return {
        "gated half-yat": kernel(values="gated"),
        f"gated half-yat, threshold {k}": sparse,
        f"gated half-yat, threshold {k}, write mass": priced(sparse),
    }


def make_transcoder_rows(units: int, k: int) -> dict[str, Row]:
    """Transcoders of several widths, with and without a skip connection."""
    rows = {}
    for width in WIDTHS:
        for skip in (False, True):
            name = f"transcoder, {width}m wide, top-k {k}{', skip' if skip else ''}"
            settings = {"width": width * units, "top_k": k, "skip": skip}
            rows[name] = Row("transcoder", settings)
    return rows


def make_recipe_rows(family: str) -> dict[str, Row]:
    """The recipes that are shipped for a family."""
    files = sorted(Path("recipes").glob(f"{family}-*.yaml"))
    return {f"recipe {file.stem}": Row("recipe", {"file": str(file)}) for file in files}


def make_recipe(teacher: str, row: Row, train: str, tokens: int, seed: int) -> Recipe:
    """Make a row's recipe: half of the budget layer-wise by Muon, half on the logits by AdamW; the
    same for every row that has no file."""
    if row.kind == "recipe":
        return load_recipe(row.settings["file"])
    rates = DENSE
    if row.kind == "transcoder":
        rates = FRESH
    elif row.settings.get("top_k") is not None:
        rates = SPARSE

    stages = [
        {
            "name": name,
            "tokens": round(SHARE * tokens),
            "optimizer": optimizer,
            "batch_size": BATCH_SIZE,
            **rates[name],
            **row.stages.get(name, {}),
            **row.stages.get("*", {}),
        }
        for name, optimizer in OPTIMIZERS.items()
    ]
    if stages[1].get("kl") == 0.0:  # there is nothing to regress on
        stages = [{**stages[1], "tokens": tokens}]
    return Recipe(
        teacher=teacher,
        kernel_ffn=row.settings if row.kind == "kernel" else {},
        data={"train": train},
        stages=stages,
        seed=seed,
        output_dir="runs/frontier",
    )
