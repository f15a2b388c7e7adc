"""The rows of real_frontier.py, and how each is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_kernel_ffn.distillation import Recipe

CONTROLS = "recipes/examples/kernels/controls.py"
"""Kernels that are none, to see what a kernel is worth."""
LOCAL = "recipes/examples/kernels/local.py"
"""Kernels that fall with the distance from a piece, on the line of its unit's row."""
IN_ITS_PLACE = {
    "half-yat": "half-yat",
    "root-half-yat": "root-half-yat",
    "yat": "yat",
    "relu": f"{CONTROLS}:relu",
    "relu2": f"{CONTROLS}:relu2",
    "line-gaussian": f"{LOCAL}:line-gaussian",
    "line-imq": f"{LOCAL}:line-imq",
    "line-hat": f"{LOCAL}:line-hat",
}
"""Kernels that readouts have instead of brownian, by the name in the table."""
RATE = 0.001
"""Peak step of AdamW, as a share of a tensor's size. Readouts with 192 active units have less KL
after 250 thousand tokens at 0.001 than at 0.003; the teacher truncated to as many is as near at
both, and further away at 0.01 and 0.03."""
FRESH_RATE = 0.2
"""That of transcoders layer-wise, by Muon: they start from nothing."""
WRITE_MASS = 0.1


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


@dataclass(frozen=True)
class Budget:
    """What all rows are trained with."""

    train: str
    """File of text."""
    tokens: int
    batch_size: int
    """Rows of 256 tokens in a step."""
    dtype: str
    """Of the computation."""
    rate: float
    """Peak step on the logits."""
    seed: int = 0


def make_rows(count: int, units: int) -> dict[str, Row]:
    """The rows with ``count`` active units per token, of ``units``, by name."""
    sparse = {"simplex": "threshold", "top_k": count}
    tied = {"rows": "tied", **sparse}
    skip = {**tied, "skip": True}
    rows = {
        "readout, skip, allocated": Row("kernel", skip, allocate=True),
        "teacher truncated, trained": Row("teacher", sparse),
        "readout, allocated": Row("kernel", tied, allocate=True),
        "readout": Row("kernel", tied),
        "readout, skip": Row("kernel", skip),
        "readout, skip, allocated, write mass": Row(
            "kernel", skip, allocate=True, write_mass=WRITE_MASS
        ),
        "teacher truncated": Row("teacher", sparse, trained=False),
        "readout, untrained": Row("kernel", tied, trained=False),
        "readout, skip, allocated, untrained": Row("kernel", skip, allocate=True, trained=False),
    }
    for name, kernel in IN_ITS_PLACE.items():
        settings = {**skip, "kernel": kernel, "values": "product"}
        label = f"{name} in its place, skip, allocated"
        rows[label] = Row("kernel", settings, allocate=True)
        rows[f"{label}, untrained"] = Row("kernel", settings, trained=False, allocate=True)
    for times in (4, 16):
        for with_skip in (True, False):
            settings = {"width": times * units, "top_k": count, "skip": with_skip}
            name = f"transcoder, {times}x" + (", skip" if with_skip else "")
            rows[name] = Row("transcoder", settings)
    return {f"{name}, {count}": row for name, row in rows.items()}


def make_recipe(teacher: str, row: Row, budget: Budget) -> Recipe:
    """All tokens on the logits; transcoders, which start from nothing, half of them layer-wise."""
    stages: list[dict[str, Any]] = [
        {
            "name": "logits",
            "tokens": budget.tokens,
            "optimizer": "adamw",
            "learning_rate": budget.rate,
            "batch_size": budget.batch_size,
            "write_mass": row.write_mass,
        }
    ]
    if row.kind == "transcoder":
        layer_wise = {"name": "layer-wise", "optimizer": "muon", "learning_rate": FRESH_RATE}
        stages[0]["tokens"] = budget.tokens // 2
        stages.insert(0, {**stages[0], **layer_wise})
    return Recipe(
        teacher=teacher,
        data={"train": budget.train, "bos": "always"},
        stages=stages,
        seed=budget.seed,
        dtype=budget.dtype,
        output_dir="runs/real_frontier",
    )
