#!/usr/bin/env python3
"""How fast kernel readouts are against the FFNs they replace, in one run, as ratios: at named
shapes, or at a checkpoint's.

    python scripts/benchmarks/ffn_speed.py --shapes gpt2 --json speed.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from ffn_timing import CLOCKS, MODES, benchmark
from ffn_variants import PHASES, SHAPES, find_checkpoint_ffns

from hf_kernel_ffn.checkpoint_code.settings import require_one_of
from hf_kernel_ffn.cli.app import run_app
from hf_kernel_ffn.cli.options import Device, Dtype, Trust, quieten
from hf_kernel_ffn.cli.tables import print_table
from hf_kernel_ffn.storage.files import require_place, write_text
from hf_kernel_ffn.storage.loading import get_torch_dtype, load_model

COLUMNS = (
    "shape",
    "mode",
    "phase",
    "what",
    "ms",
    "against",
    "time ratio",
    "aimed at",
    "MiB held",
    "ratio",
    "aimed at",
    "MiB moved",
    "ms to copy weights",
)
"""Of the table that is printed."""


def print_benchmark(report: dict) -> None:
    """Print the table of what :func:`benchmark` returns."""
    print_table(list(COLUMNS), [format_row(row) for row in report["rows"]])
    typer.echo(
        f"{report['machine']}, torch {report['torch']}, {report['dtype']}, "
        f"{report['tokens']} tokens, medians of {report['repeats']}"
    )


def format_row(row: dict) -> list[str]:
    """One line of the table; what was not measured is left empty."""

    def cell(name: str, form: str, unit: float = 1.0) -> str:
        return "" if row.get(name) is None else form.format(row[name] / unit)

    spread = row["ratio"]
    return [
        row["shape"],
        row["mode"],
        row["phase"],
        row["variant"],
        f"{row['seconds']['median'] * 1e3:.2f}",
        row["against"],
        f"{spread['median']:.2f} ({spread['low']:.2f}–{spread['high']:.2f})",
        cell("target", "≤ {}"),
        cell("memory", "{:.1f}", 2**20),
        cell("memory_ratio", "{:.2f}"),
        cell("memory_target", "≤ {}"),
        cell("bytes_moved", "{:.0f}", 2**20),
        cell("seconds_at_copy_bandwidth", "{:.2f}", 1e-3),
    ]


def main(
    shapes: Annotated[
        str, typer.Option(help=f"{', '.join(SHAPES)}; several comma-separated")
    ] = "gpt2,llama-3.2-1b",
    model: Annotated[
        Optional[str],
        typer.Option(help="a checkpoint whose FFNs are timed instead of named shapes"),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, help="read at once, forward and backward; fewer are faster")
    ] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="rounds; medians of them are reported")] = 7,
    active: Annotated[
        int, typer.Option(min=1, help="prototypes per token of the sparse readouts")
    ] = 64,
    modes: Annotated[
        str, typer.Option(help="eager, compiled, fused (Triton kernels)")
    ] = "eager,compiled",
    phases: Annotated[
        str, typer.Option(help="forward, forward+backward, decode")
    ] = "forward,forward+backward,decode",
    only: Annotated[
        Optional[str],
        typer.Option(help="readouts whose name has one of these parts, comma-separated"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="of a CPU")] = 1,
    clock: Annotated[
        str,
        typer.Option(help="wall, or cpu: this process's own time, on a machine that others use"),
    ] = "wall",
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write all of it")
    ] = None,
    trust_remote_code: Trust = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Time readouts against the FFNs they replace: forward, forward+backward and one-token decode,
    as ratios."""
    if json_file is not None:
        require_place(json_file)
    quieten()
    choices = {"mode": (modes, MODES), "phase": (phases, PHASES), "clock": (clock, CLOCKS)}
    for name, (text, known) in choices.items():
        for part in text.split(","):
            require_one_of(name, part, known)

    own = None
    if model is not None:
        loaded = load_model(model, dtype, device, trust_remote_code)
        shape, own = find_checkpoint_ffns(loaded, model)
        selected = {model: shape}
    else:
        for part in shapes.split(","):
            require_one_of("shape", part, SHAPES)
        selected = {part: SHAPES[part] for part in shapes.split(",")}

    def keep(so_far: dict) -> None:
        if json_file is not None:
            write_text(json_file, json.dumps(so_far, indent=1) + "\n")

    torch.set_num_threads(threads)
    report = benchmark(
        selected,
        tokens=tokens,
        repeats=repeats,
        active=active,
        modes=modes.split(","),
        phases=phases.split(","),
        dtype=get_torch_dtype(dtype),
        device=device,
        clock=clock,
        own=own,
        only=only,
        progress=lambda line: typer.echo(line, err=True),
        keep=keep,
    )
    print_benchmark(report)


if __name__ == "__main__":
    run_app(lambda: typer.run(main))
