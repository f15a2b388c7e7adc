#!/usr/bin/env python3
"""What a streamed conversion costs: a random Llama of at least 3 GiB, its peak memory and its time
against copying the files.

python scripts/benchmarks/streaming_speed.py runs/streaming --json
recipes/results/speed/streaming.json
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer


def main(
    folder: Annotated[Path, typer.Argument(help="new folder for the models")],
    gib: Annotated[float, typer.Option(help="size of the model")] = 3.0,
    layers: Annotated[Optional[str], typer.Option(help="such as 0-5,7  [default: all]")] = None,
    values: Annotated[str, typer.Option(help="fixed or gated")] = "fixed",
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write the figures")
    ] = None,
    convert: Annotated[bool, typer.Option("--convert", hidden=True)] = False,
):
    """Make a random bfloat16 Llama in FOLDER, copy it, convert it block by block without
    calibration, and compare."""
    from hf_kernel_ffn import KernelFFNConfig
    from hf_kernel_ffn.conversion.streaming import convert_streamed
    from hf_kernel_ffn.storage.files import write_text

    teacher, out = folder / "teacher", folder / "student"
    if convert:  # in a process of its own, whose peak is its own
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line has it
        out.mkdir()
        before = peak_memory()
        start = time.perf_counter(), time.process_time()
        convert_streamed(
            str(teacher), out, KernelFFNConfig(values=values), layers, calibration_tokens=0
        )
        found = {
            "seconds": time.perf_counter() - start[0],
            "cpu_seconds": time.process_time() - start[1],
        }
        print(
            json.dumps({**found, "peak_rss_bytes": peak_memory(), "rss_of_imports_bytes": before})
        )
        return
    size = make_teacher(teacher, gib)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", teacher, folder / "copy"], check=True)
    copying = time.perf_counter() - start
    shutil.rmtree(folder / "copy")
    command = [
        sys.executable,
        __file__,
        str(folder),
        "--values",
        values,
        *(["--layers", layers] if layers else []),
        "--convert",
    ]
    found = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    found = {
        "teacher_bytes": size,
        "layers": layers or "all",
        "values": values,
        "calibration": "none",
        "cp_seconds": copying,
        **found,
    }
    found["time_over_cp"] = found["seconds"] / copying
    typer.echo(json.dumps(found, indent=1))
    if json_file is not None:
        write_text(json_file, json.dumps(found, indent=1) + "\n")


def peak_memory() -> int:
    """Bytes that this process has had resident at most; of getrusage, a child's begins at its
    parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def make_teacher(folder: Path, gib: float) -> int:
    """A random Llama with Llama-3.2-1B's sizes and as many layers as make ``gib``; its bytes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    per_layer = 2 * (4 * 2048**2 + 3 * 2048 * 8192)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=round(gib * 2**30 / per_layer) + 1,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in (
        model.parameters()
    ):  # random numbers, repeated: filling gigabytes takes longer than all the rest
        noise = torch.randn(2**20) * 0.02 if parameter.ndim > 1 else torch.ones(2**20)
        flat = parameter.data.view(-1)
        for low in range(0, len(flat), 2**20):
            flat[low : low + 2**20] = noise[: len(flat) - low]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained("recipes/teachers/llama").save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    typer.run(main)
