#!/usr/bin/env python3
"""Tokens per second that a converted model writes, beside its teacher's.

    python scripts/benchmarks/generation_speed.py runs/smollm2 runs/smollm2-converted \
        --tokens 64 --rounds 7 --threads 2 --json recipes/results/speed/generation.json

Both stay in memory and have their turns in rounds, so that a disturbance hits both. Generation is
greedy, of one row, and always as long as asked. On a busy machine, take one thread and its
processor time: --threads 1 --clock cpu.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from hf_kernel_ffn import load_teacher, load_tokenizer
from hf_kernel_ffn.gpu.fused import fuse
from hf_kernel_ffn.gpu.measuring import quartiles
from hf_kernel_ffn.storage.loading import load_student

PROMPT = "The old house stood at the end of the lane, and"
WARM_UP = 4
"""Tokens that each model writes before it is timed."""


def main(
    teacher: Annotated[str, typer.Argument(help="folder or hub id of the stock model")],
    student: Annotated[str, typer.Argument(help="folder of the converted one")],
    tokens: Annotated[int, typer.Option(help="written in each round")] = 64,
    rounds: Annotated[int, typer.Option(help="of both")] = 7,
    dtype: Annotated[str, typer.Option(help="of both")] = "float32",
    device: Annotated[str, typer.Option()] = "cpu",
    threads: Annotated[int, typer.Option(help="of the CPU")] = 2,
    clock: Annotated[str, typer.Option(help="wall; or cpu, the processor time")] = "wall",
    fused: Annotated[bool, typer.Option("--fused", help="by Triton kernels too")] = False,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write the figures")
    ] = None,
) -> None:
    """Let TEACHER and STUDENT write the same number of tokens in turn."""
    torch.set_num_threads(threads)
    models = {
        "teacher": load_teacher(teacher, dtype, device).eval(),
        "student": load_student(student, dtype, device).eval(),
    }
    if fused:
        models["student, Triton"] = load_student(student, dtype, device).eval()
        fuse(models["student, Triton"])
    ids = load_tokenizer(teacher)(PROMPT, return_tensors="pt")["input_ids"].to(device)
    report = {
        "tokens": tokens,
        "prompt_tokens": ids.shape[1],
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "clock": clock,
        **compare_speeds(models, ids, tokens=tokens, rounds=rounds, clock=clock),
    }
    text = json.dumps(report, indent=1)
    typer.echo(text)
    if json_file is not None:
        json_file.write_text(text + "\n")


def compare_speeds(
    models: Mapping[str, PreTrainedModel],
    ids: Tensor,
    *,
    tokens: int,
    rounds: int,
    clock: str = "wall",
) -> dict[str, Any]:
    """Tokens per second of each of ``models`` after ``ids`` (1, prompt), and its ratio to the
    first's, paired by round: median and quartiles of ``rounds``."""
    for model in models.values():
        time_generation(model, ids, WARM_UP, clock)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            seconds[name].append(time_generation(model, ids, tokens, clock))

    first, *others = models
    return {
        "rounds": rounds,
        "tokens_per_second": {
            name: quartiles([tokens / taken for taken in times]) for name, times in seconds.items()
        },
        "ratio": {
            name: quartiles(
                [own / other for own, other in zip(seconds[first], seconds[name], strict=True)]
            )
            for name in others
        },
    }


def time_generation(model: PreTrainedModel, ids: Tensor, tokens: int, clock: str) -> float:
    """Seconds in which ``model`` writes so many tokens after ``ids``."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    wait(ids.device)
    began = now()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
    )
    wait(ids.device)
    seconds = now() - began
    assert output.shape[1] == ids.shape[1] + tokens
    return seconds


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    typer.run(main)
