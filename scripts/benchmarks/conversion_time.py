#!/usr/bin/env python3
"""How long a conversion takes and how much memory, by the number of layers, on random Llamas.

    python scripts/benchmarks/conversion_time.py runs/times --layers 8,16,32 \
        --json recipes/results/speed/conversion.json
    python scripts/benchmarks/conversion_time.py runs/times --shape llama-3.2-1b --layers 2,4 \
        --stream --json recipes/results/speed/conversion-1b.json

Every case is a process of its own, whose peak is its own. ``--stream`` reads text and one block at
a time. From the two largest cases follows what the shape's own number of layers would take; that
line says "computed".
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from random_llama import SHAPES, LlamaShape, save_random_llama
from streaming_speed import read_peak_memory

from hf_kernel_ffn import convert, load_teacher
from hf_kernel_ffn.conversion.streaming import convert_streamed
from hf_kernel_ffn.storage.files import write_text

TEXT = "recipes/text/books-distil.txt"
FIGURES = ("seconds", "cpu_seconds", "peak_rss_bytes")


def main(
    folder: Annotated[Path, typer.Argument(help="new folder for the models")],
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "smollm2-135m",
    layers: Annotated[str, typer.Option(help="numbers of layers")] = "8,16,32",
    stream: Annotated[bool, typer.Option("--stream", help="a block at a time")] = False,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write the figures")
    ] = None,
    convert_one: Annotated[bool, typer.Option("--convert-one", hidden=True)] = False,
) -> None:
    """Convert random models of so many layers of SHAPE, one after the other."""
    if convert_one:
        typer.echo(json.dumps(convert_once(folder, stream)))
        return
    if shape not in SHAPES:
        raise typer.BadParameter(f"found {shape!r}, expected one of {', '.join(SHAPES)}")
    counts = sorted(int(number) for number in layers.split(","))
    cases = [time_case(folder, SHAPES[shape], count, stream) for count in counts]
    report: dict[str, Any] = {
        "shape": shape,
        "stream": stream,
        "threads": torch.get_num_threads(),
        "cases": cases,
    }
    if len(cases) > 1:
        report["computed"] = extrapolate(cases[-2], cases[-1], SHAPES[shape].layers)
    typer.echo(json.dumps(report, indent=1))
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")


def time_case(folder: Path, shape: LlamaShape, layers: int, stream: bool) -> dict[str, Any]:
    """The figures of one conversion, in a process of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    size = save_random_llama(folder / "teacher", shape, layers)
    command = [sys.executable, __file__, str(folder), "--convert-one"]
    if stream:
        command.append("--stream")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(folder)
    figures = json.loads(done.stdout.splitlines()[-1])
    return {"layers": layers, "teacher_bytes": size, **figures}


def convert_once(folder: Path, stream: bool) -> dict[str, float]:
    """Convert the teacher in ``folder`` by the default settings: its time and its memory."""
    teacher = str(folder / "teacher")
    imports = read_peak_memory()
    start = time.perf_counter()
    cpu_start = time.process_time()
    if stream:
        out = folder / "student"
        out.mkdir()
        convert_streamed(teacher, out, calibration_text=TEXT)
    else:
        convert(load_teacher(teacher))
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "peak_rss_bytes": read_peak_memory(),
        "rss_of_imports_bytes": imports,
    }


def extrapolate(less: dict[str, Any], more: dict[str, Any], layers: int) -> dict[str, float]:
    """What ``layers`` layers would take along the line through two cases."""
    figures: dict[str, float] = {"layers": layers}
    for name in FIGURES:
        slope = (more[name] - less[name]) / (more["layers"] - less["layers"])
        figures[name] = more[name] + slope * (layers - more["layers"])
    return figures


if __name__ == "__main__":
    typer.run(main)
