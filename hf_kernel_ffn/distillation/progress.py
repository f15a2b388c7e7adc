"""A progress bar of a stage: loss, tokens/s and time left."""

from __future__ import annotations

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from .metrics import StepReport

KEPT = 0.95
"""Share of the average loss that a step keeps: some twenty steps are averaged."""


class ProgressBar:
    """The steps of one part of a recipe; use it as a context. Silent where it is not shown."""

    def __init__(
        self, name: str, steps: int, *, first: int = 0, tokens_per_step: int = 1, shown: bool
    ):
        self.tokens_per_step = tokens_per_step
        self.average: float | None = None
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            disable=not shown,
        )
        self.task = self.bar.add_task(name, total=steps, completed=first, loss="–", speed="–")

    def __enter__(self) -> ProgressBar:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, report: StepReport) -> None:
        """Show ``report``."""
        if report.skipped:
            return
        if self.average is None:
            self.average = report.loss
        self.average = KEPT * self.average + (1 - KEPT) * report.loss
        speed = self.bar.tasks[0].speed
        self.bar.update(
            self.task,
            advance=1,
            loss=f"{self.average:.5f}",
            speed=f"{speed * self.tokens_per_step:,.0f}" if speed else "–",
        )
