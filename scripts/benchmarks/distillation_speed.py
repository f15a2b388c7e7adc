#!/usr/bin/env python3
"""Tokens per second of the layer-wise stage against its floor: the teacher's forward pass, and one
forward and backward pass of each FFN on inputs that are at hand.

    python scripts/benchmarks/distillation_speed.py recipes/teachers/llama \\
        --json recipes/results/speed/distillation.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from transformers import PreTrainedModel

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.distillation.objectives import layer_wise
from hf_kernel_ffn.distillation.optimizers import make_optimizers
from hf_kernel_ffn.distillation.recipe import Stage
from hf_kernel_ffn.distillation.step import Step
from hf_kernel_ffn.distillation.teacher_signal import RunningTeacher
from hf_kernel_ffn.gpu.measuring import Work, interleaved, ratio
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_teacher

LEARNING_RATE = 1e-9
"""So small that the student stays what it is however many steps are timed."""


def main(
    teacher: Annotated[str, typer.Argument(help="local folder or hub id of a stock model")],
    rows: Annotated[int, typer.Option(help="sequences per step")] = 4,
    length: Annotated[int, typer.Option(help="tokens per sequence")] = 256,
    repeats: Annotated[int, typer.Option(help="rounds, interleaved")] = 7,
    optimizer: Annotated[
        str, typer.Option(help="muon or adamw; none leaves the steps out")
    ] = "muon",
    clock: Annotated[str, typer.Option(help="wall or cpu")] = "wall",
    device: str = "cpu",
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write the figures")
    ] = None,
) -> None:
    """Time one step of the layer-wise stage on random token ids, the student converted without
    calibration."""
    torch.set_num_threads(1)
    stock = load_teacher(teacher, device=device)
    student, _ = convert(stock, KernelFFNConfig(), calibration_tokens=0)
    prepare(stock, student)
    work = {
        "layer-wise": make_step(stock, student, rows, length, optimizer),
        "floor": make_floor(stock, student, rows, length),
    }

    times = interleaved(work, repeats, torch.device(device), clock)
    tokens = rows * length
    report = {
        "teacher": teacher,
        "tokens_per_step": tokens,
        "optimizer": optimizer,
        "clock": clock,
        "torch": torch.__version__,
        "tokens_per_second": {name: tokens / times[name]["median"] for name in times},
        "throughput_over_floor": ratio(times, "floor", "layer-wise"),
    }
    typer.echo(json.dumps(report, indent=1))
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")


def prepare(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Freeze all but the student's FFNs, which are trained in float32."""
    for model in (teacher, student):
        model.requires_grad_(False)
    for ffn in student.kernel_ffns().values():
        ffn.float().requires_grad_(True)


def make_step(
    teacher: PreTrainedModel, student: PreTrainedModel, rows: int, length: int, optimizer: str
) -> Work:
    """One step of the stage."""
    stage = Stage(
        name="layer-wise",
        tokens=1,
        optimizer="adamw" if optimizer == "none" else optimizer,
        learning_rate=LEARNING_RATE,
    )
    ffns = student.kernel_ffns()
    parameters = [parameter for ffn in ffns.values() for parameter in ffn.parameters()]
    optimizers = make_optimizers(student, parameters, stage)
    for one in optimizers:
        for group in one.param_groups:
            group["lr"] = group["peak"]
    ids = torch.randint(teacher.config.vocab_size, (rows, length), device=teacher.device)
    step = Step(stage, RunningTeacher(teacher), student, ffns, ids, torch.Tensor.backward)

    def run() -> None:
        layer_wise(step)
        if optimizer != "none":
            for one in optimizers:
                one.step()
        student.zero_grad(set_to_none=True)

    return run


def make_floor(teacher: PreTrainedModel, student: PreTrainedModel, rows: int, length: int) -> Work:
    """What a step cannot do without."""
    ids = torch.randint(teacher.config.vocab_size, (rows, length), device=teacher.device)
    hidden = torch.randn(rows, length, teacher.config.hidden_size, device=teacher.device)

    def run() -> None:
        with torch.no_grad():
            teacher.base_model(input_ids=ids, use_cache=False)
        for ffn in student.kernel_ffns().values():
            ffn(hidden).backward(hidden)
        student.zero_grad(set_to_none=True)

    return run


if __name__ == "__main__":
    typer.run(main)
