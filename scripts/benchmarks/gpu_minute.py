#!/usr/bin/env python3
"""The figures of a GPU that matter most, in one process of about a minute and a half.

    bash scripts/gpu_day.sh minute OUT.json

The steps come one after the other, and OUT.json is written after every figure: what a time limit
cuts off is lost, and no more. Models are random ones, since no weight changes a time.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from ffn_timing import benchmark
from ffn_variants import SHAPES, make_tied_readout
from generation_speed import compare_speeds
from gpu_day_table import format_speed
from random_llama import SHAPES as LLAMA_SHAPES
from random_llama import make_random_llama

from hf_kernel_ffn.gpu.fused import Fused
from hf_kernel_ffn.storage.files import write_text

FFN_SHAPES = "llama-3.2-1b,llama-3-8b,smollm2-135m"
WRITER = "smollm2-135m"
"""The shape of the model that writes."""
PROMPT_TOKENS = 12


def main(
    out: Annotated[Path, typer.Argument(help="JSON file")],
    steps: Annotated[
        str, typer.Option(help="fused, generate, compiled, eager; in this order")
    ] = "fused,generate,compiled",
    shapes: Annotated[str, typer.Option(help="of FFNs")] = FFN_SHAPES,
    tokens: Annotated[int, typer.Option(help="of an FFN's input")] = 8192,
    repeats: Annotated[int, typer.Option(help="rounds of an FFN")] = 5,
    written: Annotated[int, typer.Option(help="tokens that a model writes")] = 48,
    layers: Annotated[int, typer.Option(help="of the model that writes")] = 30,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    device: Annotated[str, typer.Option()] = "cuda",
) -> None:
    """Measure FFNs with tied rows against the stock ones, and the writing of a model of them."""
    began = time.perf_counter()
    found: dict[str, Any] = {"device": device, "dtype": dtype, "torch": torch.__version__}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()

    def keep(name: str, result: object) -> None:
        found[name] = result
        found["seconds"] = round(time.perf_counter() - began, 1)
        write_text(out, json.dumps(found, indent=1) + "\n")

    for step in steps.split(","):
        if step == "generate":
            keep(step, measure_generation(written, layers, getattr(torch, dtype), device))
            typer.echo(json.dumps(found[step]))
            continue
        for shape in shapes.split(","):
            name = f"{step} {shape}"
            report = benchmark(
                {shape: SHAPES[shape]},
                tokens=tokens,
                repeats=repeats,
                modes=[step],
                phases=["forward", "forward+backward"],
                dtype=getattr(torch, dtype),
                device=device,
                only="tied",
                progress=lambda line: typer.echo(line, err=True),
            )
            keep(name, report)
            typer.echo("\n".join([name, *format_speed(report)]))
    typer.echo(f"{found['seconds']} s")


def measure_generation(tokens: int, layers: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Tokens per second of a stock model, and of one with tied rows by each form that serves it."""
    teacher = make_random_llama(LLAMA_SHAPES[WRITER], layers)
    student = copy.deepcopy(teacher)
    for block in student.model.layers:
        block.mlp = make_tied_readout(SHAPES[WRITER])
    models = {"teacher": teacher, "student": student}
    if device == "cuda":
        models["student, Triton"] = copy.deepcopy(student)
        for block in models["student, Triton"].model.layers:
            block.mlp.fused = Fused()
    for model in models.values():
        model.to(device, dtype).eval().requires_grad_(False)
        model.generation_config.pad_token_id = 0
    ids = torch.arange(1, 1 + PROMPT_TOKENS, device=device)[None]
    return {"tokens": tokens, **compare_speeds(models, ids, tokens=tokens, rounds=2)}


if __name__ == "__main__":
    typer.run(main)
