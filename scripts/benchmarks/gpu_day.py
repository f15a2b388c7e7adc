#!/usr/bin/env python3
"""Everything that is measured on a GPU, in one run of a few minutes: bash scripts/gpu_day.sh OUT.

Every part runs in a process and a time limit of its own. One that fails leaves the others their
results; the last lines of what it said stand in OUT/gpu_day.json in place of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer
from gpu_day_table import format_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHAPES = "llama-3.2-1b,llama-3-8b,smollm2-135m"
"""Of the FFNs that are timed, in this order; a dry run times the last alone."""
TEXT = "recipes/text/books-test.txt"
LAST_LINES = 15
"""Of a failed part's output, kept in the JSON."""
LEAST_SECONDS = 5
"""With fewer left, a part is not begun."""


@dataclass(frozen=True)
class Part:
    """One measurement."""

    name: str
    command: list[str]
    seconds: float
    """After which it is ended."""
    result: Path
    """The JSON file that it writes, maybe several times."""


@dataclass(frozen=True)
class Plan:
    """What to measure, and how much of it."""

    model: str
    work: Path
    """Folder for models and results in between."""
    dry: bool = False
    train_seconds: float = 35.0
    """Of training in each distillation."""

    @property
    def device(self) -> str:
        """Where everything is computed."""
        return "cpu" if self.dry else "cuda"

    def call(self, script: str, *arguments: object) -> list[str]:
        """The command that runs a script of this folder."""
        return [sys.executable, str(HERE / script), *map(str, arguments)]

    def result(self, name: str) -> Path:
        """The JSON file of the part ``name``."""
        return self.work / (name.replace(" ", "_") + ".json")


def main(
    out: Annotated[Path, typer.Argument(help="folder for gpu_day.json, .txt and .log")],
    model: Annotated[str, typer.Option(help="folder of the stock model")] = "runs/smollm2",
    work: Annotated[
        Optional[Path],
        typer.Option(help="new folder for models made on the way  [default: a temporary one]"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="for all parts together")] = 480,
    train_seconds: Annotated[float, typer.Option(help="of training in a distillation")] = 35,
    only: Annotated[
        Optional[str], typer.Option(help="parts whose name begins so, comma-separated")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="toy sizes, on the CPU")] = False,
) -> None:
    """Run every part, and print a table of what was found."""
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="gpu_day_")) if work is None else work
    folder.mkdir(parents=True, exist_ok=work is None)
    plan = Plan(model, folder.resolve(), dry_run, 2 if dry_run else train_seconds)
    parts = make_parts(plan)
    if only is not None:
        parts = [part for part in parts if part.name.startswith(tuple(only.split(",")))]

    end = time.monotonic() + seconds
    found: dict[str, dict] = {}
    for part in parts:
        typer.echo(f"{part.name} …", err=True)
        found[part.name] = run_part(part, min(part.seconds, end - time.monotonic()), out)
        report = {"model": model, "dry_run": dry_run, "parts": found}
        (out / "gpu_day.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "gpu_day.txt").write_text(format_table(found) + "\n")
    typer.echo((out / "gpu_day.txt").read_text())
    if work is None:
        shutil.rmtree(folder)


def make_parts(plan: Plan) -> list[Part]:
    """All parts in order: what is wanted most comes first, and what may take long last."""
    return [
        measure(plan, "machine", 40),
        speed(plan, "fused", "tied", 60),
        measure(plan, "convert", 60, plan.model, plan.work / "converted"),
        measure(plan, "generate", 60, plan.model, plan.work / "converted"),
        evaluate(plan, "converted"),
        measure(plan, "accuracy", 60),
        speed(plan, "compiled", "tied", 75),
        *run_tests(plan),
        distil(plan, "faithful"),
        evaluate(plan, "faithful"),
        speed(plan, "eager,fused", "Liger,polarised 2m", 60, name="speed others"),
        distil(plan, "readable"),
        evaluate(plan, "readable"),
    ]


def measure(plan: Plan, name: str, seconds: float, *arguments: object) -> Part:
    """A part of gpu_day_parts.py."""
    result = plan.result(name)
    options = ["--device", plan.device, "--json", result]
    return Part(name, plan.call("gpu_day_parts.py", name, *arguments, *options), seconds, result)


def evaluate(plan: Plan, student: str) -> Part:
    """The comparison of one student with its teacher on held-out text."""
    name = f"evaluate {student}"
    result = plan.result(name)
    tokens = 512 if plan.dry else 32_768
    options = ["--device", plan.device, "--json", result, "--tokens", tokens]
    arguments = [plan.model, plan.work / student, TEXT, *options]
    return Part(name, plan.call("gpu_day_parts.py", "evaluate", *arguments), 60, result)


def distil(plan: Plan, kind: str) -> Part:
    """A distillation by one of the recipes, for as long as there is time."""
    name = f"distil {kind}"
    result = plan.result(name)
    arguments: list[object] = [f"recipes/smollm2-{kind}.yaml", plan.model, plan.work / kind]
    arguments += ["--seconds", plan.train_seconds, "--json", result]
    if plan.dry:
        arguments += ["--batch-size", 2, "--most-tokens", 1024]
    limit = plan.train_seconds + 60
    return Part(name, plan.call("gpu_day_distil.py", *arguments), limit, result)


def speed(plan: Plan, modes: str, readouts: str, seconds: float, name: str | None = None) -> Part:
    """Readouts against the FFNs that they replace, at every shape in one process.

    Args:
        modes: of ffn_speed.py; a dry run is in eager mode, whatever is asked.
        readouts: which of them, by parts of their names.
        name: of the part; None: ``speed`` and the modes.
    """
    size = ["--tokens", 8192, "--dtype", "bfloat16", "--repeats", 5, "--threads", 8]
    shapes = SHAPES
    name = name or f"speed {modes}"
    if plan.dry:
        size = ["--tokens", 16, "--repeats", 1]
        modes = "eager"
        shapes = SHAPES.split(",")[-1]
    result = plan.result(name)
    options = ["--shapes", shapes, "--modes", modes, "--phases", "forward,forward+backward"]
    options += ["--only", readouts, "--device", plan.device]
    return Part(name, plan.call("ffn_speed.py", *options, *size, "--json", result), seconds, result)


def run_tests(plan: Plan) -> list[Part]:
    """The tests that need a GPU."""
    arguments = ["tests", "--device", plan.device, "--json", plan.result("tests")]
    return [Part("tests", plan.call("gpu_day_parts.py", *arguments), 100, plan.result("tests"))]


def run_part(part: Part, limit: float, out: Path) -> dict:
    """Run ``part`` for at most ``limit`` seconds; returns its result, its error, or both."""
    if limit < LEAST_SECONDS:
        return {"error": "no time was left for it"}
    part.result.unlink(missing_ok=True)
    log = out / "gpu_day.log"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n=== {part.name}\n")
        file.flush()
        start = log.stat().st_size
        began = time.monotonic()
        code = run_command(part.command, limit, file)
    entry: dict = {"seconds": round(time.monotonic() - began, 1)}
    if code != 0:
        said = log.read_bytes()[start:].decode("utf-8", "replace").splitlines()
        reason = f"ended after {limit:.0f} s" if code is None else f"exit code {code}"
        entry["error"] = "\n".join([reason, *said[-LAST_LINES:]])
    try:
        entry["result"] = json.loads(part.result.read_text())
    except (OSError, ValueError) as error:
        entry.setdefault("error", f"no result: {error}")
    return entry


def run_command(command: list[str], limit: float, log: object) -> int | None:
    """The exit code of ``command``; None: it was ended, with all that it had started."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


if __name__ == "__main__":
    typer.run(main)
