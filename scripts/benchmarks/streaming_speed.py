#!/usr/bin/env python3
"""What a streamed conversion costs: a random Llama of at least 3 GiB, its peak memory and its time
against copying the files.

    python scripts/benchmarks/streaming_speed.py runs/streaming \\
        --json recipes/results/speed/streaming.json
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer
from random_llama import SHAPES, save_random_llama

from hf_kernel_ffn import KernelFFNConfig
from hf_kernel_ffn.conversion.streaming import convert_streamed
from hf_kernel_ffn.storage.files import write_text

SHAPE = SHAPES["llama-3.2-1b"]


def main(
    folder: Annotated[Path, typer.Argument(help="new folder for the models")],
    gib: Annotated[float, typer.Option(help="size of the model")] = 3.0,
    layers: Annotated[Optional[str], typer.Option(help="such as 0-5,7  [default: all]")] = None,
    values: Annotated[str, typer.Option(help="fixed or gated")] = "fixed",
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write the figures")
    ] = None,
    convert: Annotated[bool, typer.Option("--convert", hidden=True)] = False,
) -> None:
    """Make a random bfloat16 Llama in FOLDER, copy it, convert it block by block without
    calibration, and compare."""
    if convert:  # in a process of its own, whose peak is its own
        typer.echo(json.dumps(convert_once(folder, layers, values)))
        return
    layers_of_size = round(gib * 2**30 / SHAPE.bytes_per_block) + 1
    size = save_random_llama(folder / "teacher", SHAPE, layers_of_size)
    copying = time_copy(folder)
    command = [sys.executable, __file__, str(folder), "--values", values, "--convert"]
    if layers:
        command += ["--layers", layers]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    report = {
        "teacher_bytes": size,
        "layers": layers or "all",
        "values": values,
        "calibration": "none",
        "cp_seconds": copying,
        **figures,
        "time_over_cp": figures["seconds"] / copying,
    }
    typer.echo(json.dumps(report, indent=1))
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")


def convert_once(folder: Path, layers: str | None, values: str) -> dict[str, float]:
    """Convert the teacher in ``folder``: its time and its memory."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line has it
    out = folder / "student"
    out.mkdir()
    settings = KernelFFNConfig(values=values)
    imports = read_peak_memory()
    start = time.perf_counter()
    cpu_start = time.process_time()
    convert_streamed(str(folder / "teacher"), out, settings, layers, calibration_tokens=0)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "peak_rss_bytes": read_peak_memory(),
        "rss_of_imports_bytes": imports,
    }


def time_copy(folder: Path) -> float:
    """Seconds that copying the teacher's files takes."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", folder / "teacher", folder / "copy"], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder / "copy")
    return seconds


def read_peak_memory() -> int:
    """Bytes that this process has had resident at most; of getrusage, a child's begins at its
    parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    typer.run(main)
