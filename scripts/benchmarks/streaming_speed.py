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

import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_kernel_ffn import KernelFFNConfig
from hf_kernel_ffn.conversion.streaming import convert_streamed
from hf_kernel_ffn.storage.files import write_text

HIDDEN_SIZE = 2048
INTERMEDIATE_SIZE = 8192
"""Of Llama-3.2-1B, with the hidden size."""
BYTES_PER_LAYER = 2 * (4 * HIDDEN_SIZE**2 + 3 * HIDDEN_SIZE * INTERMEDIATE_SIZE)
"""In bfloat16: four matrices of attention, three of the FFN."""
NOISE = 2**20
"""Random numbers that are repeated: filling gigabytes with new ones takes longer than the rest."""


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
    size = make_teacher(folder / "teacher", gib)
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


def make_teacher(folder: Path, gib: float) -> int:
    """Save a random Llama with Llama-3.2-1B's sizes and as many layers as make ``gib``; its
    bytes."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=round(gib * 2**30 / BYTES_PER_LAYER) + 1,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        noise = torch.randn(NOISE) * 0.02 if parameter.ndim > 1 else torch.ones(NOISE)
        fill(parameter.data.view(-1), noise)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained("recipes/teachers/llama").save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def fill(numbers: Tensor, noise: Tensor) -> None:
    """Repeat ``noise`` over ``numbers``."""
    for low in range(0, len(numbers), len(noise)):
        numbers[low : low + len(noise)] = noise[: len(numbers) - low]


if __name__ == "__main__":
    typer.run(main)
