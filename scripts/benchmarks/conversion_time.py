#!/usr/bin/env python3
"""How long a conversion takes and how much memory, by the number of layers, on random Llamas.

    python scripts/benchmarks/conversion_time.py runs/times --layers 8,16,32 \
        --json recipes/results/speed/conversion.json
    python scripts/benchmarks/conversion_time.py runs/times --shape llama-3.2-1b --layers 2,4 \
        --stream --json recipes/results/speed/conversion-1b.json
    python scripts/benchmarks/conversion_time.py runs/times --scale \
        --json recipes/results/speed/scale.json

Every case is a process of its own, whose peak is its own. ``--stream`` reads text and one block at
a time. From the two largest cases follows what the shape's own number of layers would take; that
line says "computed".

``--scale`` streams one and two blocks of three shapes, and computes what whole models of them and
of Llama-3-70B would take. The peak of a streamed conversion is taken to stay what it is at two.
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

from hf_kernel_ffn import convert, load_teacher, load_tokenizer
from hf_kernel_ffn.conversion.calibration_set import CALIBRATION_TOKENS
from hf_kernel_ffn.conversion.streaming import convert_streamed
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.text.packing import read_token_ids

TEXT = "recipes/text/books-distil.txt"
FIGURES = ("seconds", "cpu_seconds", "peak_rss_bytes")
ROW_LENGTH = 256
"""Tokens in a row of the calibration text of a streamed conversion."""
MEASURED = ("smollm2-135m", "llama-3.2-1b", "llama-3-8b")
"""Shapes of --scale that are measured."""
PLANNED = "llama-3-70b"
"""The shape for which a plan is computed from the last two of them."""


def main(
    folder: Annotated[Path, typer.Argument(help="new folder for the models")],
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "smollm2-135m",
    layers: Annotated[str, typer.Option(help="numbers of layers")] = "8,16,32",
    stream: Annotated[bool, typer.Option("--stream", help="a block at a time")] = False,
    calibration_tokens: Annotated[
        int, typer.Option(help="that a streamed conversion reads")
    ] = CALIBRATION_TOKENS,
    scale: Annotated[bool, typer.Option("--scale", help="blocks of three shapes")] = False,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write the figures")
    ] = None,
    convert_one: Annotated[bool, typer.Option("--convert-one", hidden=True)] = False,
) -> None:
    """Convert random models of so many layers of SHAPE, one after the other."""
    tokens = calibration_tokens if stream or scale else None
    if convert_one:
        typer.echo(json.dumps(convert_once(folder, tokens)))
        return
    if shape not in SHAPES:
        raise typer.BadParameter(f"found {shape!r}, expected one of {', '.join(SHAPES)}")
    report: dict[str, Any] = {"threads": torch.get_num_threads(), "calibration_tokens": tokens}
    if scale:
        report["shapes"] = measure_scale(folder, tokens)
        typer.echo(format_scale(report["shapes"]))
    else:
        counts = sorted(int(number) for number in layers.split(","))
        report |= {"shape": shape, "stream": stream, **measure_shape(folder, shape, counts, tokens)}
        typer.echo(json.dumps(report, indent=1))
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")


def measure_shape(
    folder: Path, shape: str, counts: list[int], tokens: int | None
) -> dict[str, Any]:
    """The cases of ``counts`` layers, and what follows for the shape's own number."""
    cases = [time_case(folder, SHAPES[shape], count, tokens) for count in counts]
    found: dict[str, Any] = {"cases": cases}
    if len(cases) > 1:
        found["computed"] = extrapolate(cases[-2], cases[-1], SHAPES[shape].layers)
        if tokens is not None:
            found["computed"]["peak_rss_bytes"] = cases[-1]["peak_rss_bytes"]
    return found


def measure_scale(folder: Path, tokens: int | None) -> dict[str, dict[str, Any]]:
    """One and two blocks of every shape of MEASURED; a plan of PLANNED from the last two shapes."""
    shapes = {}
    for name in MEASURED:
        typer.echo(f"{name} …", err=True)
        shapes[name] = measure_shape(folder, name, [1, 2], tokens)
    smaller, larger = (shapes[name]["cases"] for name in MEASURED[-2:])
    sizes = [SHAPES[name].bytes_per_block for name in (*MEASURED[-2:], PLANNED)]
    shapes[PLANNED] = {"computed": plan_whole(smaller, larger, sizes, SHAPES[PLANNED].layers)}
    return shapes


def plan_whole(
    smaller: list[dict[str, Any]], larger: list[dict[str, Any]], sizes: list[int], layers: int
) -> dict[str, float]:
    """What a model of ``layers`` blocks would take, whose blocks are larger than measured ones.

    What another block adds to the processor time, and the peak, lie on the line through those of
    the two measured shapes, over the bytes of a block.

    Args:
        smaller, larger: cases of one and two blocks of two shapes.
        sizes: the bytes of a block of the smaller, the larger and the planned shape.
    """
    times = [second["cpu_seconds"] - first["cpu_seconds"] for first, second in (smaller, larger)]
    peaks = [second["peak_rss_bytes"] for _, second in (smaller, larger)]
    return {
        "layers": layers,
        "cpu_seconds": layers * continue_line(times, sizes),
        "peak_rss_bytes": continue_line(peaks, sizes),
    }


def continue_line(figures: list[float], sizes: list[int]) -> float:
    """The figure at the third of ``sizes``, on the line through those at the first two."""
    slope = (figures[1] - figures[0]) / (sizes[1] - sizes[0])
    return figures[1] + slope * (sizes[2] - sizes[1])


def format_scale(shapes: dict[str, dict[str, Any]]) -> str:
    """A table in Markdown, times of the processor: a measured block, and the computed whole."""
    lines = [
        "| shape | a block, bfloat16 | another block | peak memory | whole model, *computed* |",
        "|---|---|---|---|---|",
    ]
    for name, found in shapes.items():
        size = SHAPES[name].bytes_per_block / 2**20
        whole = found["computed"]
        minutes = f"{whole['layers']} blocks: {whole['cpu_seconds'] / 60:.1f} min"
        if "cases" in found:
            first, second = found["cases"]
            time_of_block = f"{second['cpu_seconds'] - first['cpu_seconds']:.0f} s"
            peak = f"{second['peak_rss_bytes'] / 2**30:.1f} GiB"
        else:
            time_of_block = f"*{whole['cpu_seconds'] / whole['layers']:.0f} s*"
            peak = f"*{whole['peak_rss_bytes'] / 2**30:.1f} GiB*"
        lines.append(f"| {name} | {size:.0f} MiB | {time_of_block} | {peak} | {minutes} |")
    return "\n".join(lines)


def time_case(folder: Path, shape: LlamaShape, layers: int, tokens: int | None) -> dict[str, Any]:
    """The figures of one conversion, in a process of its own; streamed if ``tokens`` are given."""
    shutil.rmtree(folder, ignore_errors=True)
    size = save_random_llama(folder / "teacher", shape, layers)
    command = [sys.executable, __file__, str(folder), "--convert-one"]
    if tokens is not None:
        command += ["--stream", "--calibration-tokens", str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(folder)
    figures = json.loads(done.stdout.splitlines()[-1])
    return {"layers": layers, "teacher_bytes": size, **figures}


def convert_once(folder: Path, tokens: int | None) -> dict[str, float]:
    """Convert the teacher in ``folder`` by the default settings: its time and its memory.

    Streamed with so many ``tokens`` of text; in memory if None.
    """
    teacher = str(folder / "teacher")
    imports = read_peak_memory()
    start = time.perf_counter()
    cpu_start = time.process_time()
    if tokens is not None:
        ids = read_token_ids(load_tokenizer(teacher), [TEXT], ROW_LENGTH, tokens)
        convert_streamed(
            teacher, folder / "student", calibration_ids=ids, calibration_tokens=tokens
        )
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
