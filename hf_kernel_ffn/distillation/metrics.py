"""What is said of every step: to metrics.jsonl beside the state, and to whoever listens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from accelerate import Accelerator

from ..storage.files import explain_write_errors, write_text

METRICS = "metrics.jsonl"
"""File of a run's metrics, in output_dir while it runs and when it is finished."""


@dataclass(frozen=True)
class StepReport:
    """What is known of a step once it is made."""

    stage: str
    """Name of the stage."""
    part: int
    """Number of the part of the recipe: a stage, or one of its groups of layers."""
    step: int
    """Number of the step in its part."""
    tokens: int
    """Read so far, by all stages and processes."""
    loss: float
    """Mean over all processes, without the price of write mass."""
    learning_rate: float
    """As a share of each tensor's root mean square, as the recipe gives its peak."""
    tokens_per_second: float
    """Of this step, over all processes."""
    skipped: bool = False
    """Whether the step was left out, since its numbers were not finite."""
    validation_loss: float | None = None
    """The stage's loss on text held out, where it was measured after this step."""


Listener = Callable[[StepReport], None]
"""Is called after every step."""


class MetricsFile:
    """Appends a line for every step. It is for one process alone to write."""

    def __init__(self, folder: Path, tokens: int = 0):
        """Go on after ``tokens`` were read: lines of later steps, which will be made again, go."""
        self.path = folder / METRICS
        self.file: TextIO | None = None
        if self.path.exists():
            write_text(self.path, "".join(_lines_until(self.path, tokens)))

    def __call__(self, report: StepReport) -> None:
        """Append what ``report`` says.

        Raises:
            InputError: it could not be written.
        """
        with explain_write_errors(self.path):
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open("a", encoding="utf-8")
            self.file.write(json.dumps(_entry(report)) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Close the file, if there is one. A full disk was reported when the line was written."""
        if self.file is not None:
            with suppress(OSError):
                self.file.close()


class Trackers:
    """Passes the loss on to the accelerator's trackers."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def __call__(self, report: StepReport) -> None:
        """Log the losses of ``report`` under its stage."""
        values = {f"{report.stage}/loss": report.loss, f"{report.stage}/step": report.step}
        if report.validation_loss is not None:
            values[f"{report.stage}/validation_loss"] = report.validation_loss
        self.accelerator.log(values)


def _entry(report: StepReport) -> dict[str, object]:
    """A line's content; JSON has no number for what is not finite."""
    entry: dict[str, object] = {
        "stage": report.stage,
        "part": report.part,
        "step": report.step,
        "tokens": report.tokens,
        "loss": report.loss if math.isfinite(report.loss) else None,
        "learning_rate": report.learning_rate,
        "tokens_per_second": round(report.tokens_per_second, 1),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if report.validation_loss is not None:
        finite = math.isfinite(report.validation_loss)
        entry["validation_loss"] = report.validation_loss if finite else None
    if report.skipped:
        entry["skipped"] = True
    return entry


def _lines_until(file: Path, tokens: int) -> list[str]:
    """The lines of steps within the first ``tokens``; not what a killed run left half-written."""
    lines = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        read = entry.get("tokens") if isinstance(entry, dict) else None
        if isinstance(read, int) and read <= tokens and line.endswith("\n"):
            lines.append(line)
    return lines
