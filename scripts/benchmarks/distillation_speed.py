#!/usr/bin/env python3
"""Tokens per second of the layer-wise stage against its floor: the teacher's forward pass, and one
forward and backward pass of each FFN on inputs that are at hand.

    python scripts/benchmarks/distillation_speed.py recipes/teachers/llama --json
    recipes/results/speed/distillation.json
"""

import json
from pathlib import Path
from typing import Annotated, Optional

import typer


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
):
    """Time one step of the layer-wise stage on random token ids, the student converted without
    calibration."""
    import torch

    from hf_kernel_ffn import convert
    from hf_kernel_ffn.distillation.objectives import layer_wise
    from hf_kernel_ffn.distillation.optimizers import make_optimizers
    from hf_kernel_ffn.distillation.recipe import Stage
    from hf_kernel_ffn.distillation.step import Step
    from hf_kernel_ffn.distillation.teacher_signal import RunningTeacher
    from hf_kernel_ffn.gpu.measuring import interleaved, ratio
    from hf_kernel_ffn.storage.files import write_text
    from hf_kernel_ffn.storage.loading import load_teacher

    torch.set_num_threads(1)
    stock = load_teacher(teacher, device=device)
    student, _ = convert(stock, calibration_tokens=0)
    ffns = student.kernel_ffns()
    for model in (stock, student):
        model.requires_grad_(False)
    for ffn in ffns.values():
        ffn.float().requires_grad_(True)
    parameters = [p for ffn in ffns.values() for p in ffn.parameters()]
    stage = Stage(
        name="layer-wise",
        tokens=1,
        optimizer="adamw" if optimizer == "none" else optimizer,
        learning_rate=1e-9,
    )
    made = make_optimizers(student, parameters, stage)
    for group in (group for one in made for group in one.param_groups):
        group["lr"] = group["peak"]
    ids = torch.randint(stock.config.vocab_size, (rows, length), device=device)
    hidden = torch.randn(rows, length, stock.config.hidden_size, device=device)

    one_step = Step(stage, RunningTeacher(stock), student, ffns, ids, torch.Tensor.backward)

    def step():
        layer_wise(one_step)
        if optimizer != "none":
            for one in made:
                one.step()
        student.zero_grad(set_to_none=True)

    def floor():
        with torch.no_grad():
            stock.base_model(input_ids=ids, use_cache=False)
        for ffn in ffns.values():
            ffn(hidden).backward(hidden)
        student.zero_grad(set_to_none=True)

    times = interleaved({"layer-wise": step, "floor": floor}, repeats, torch.device(device), clock)
    found = {
        "teacher": teacher,
        "tokens_per_step": ids.numel(),
        "optimizer": optimizer,
        "clock": clock,
        "torch": torch.__version__,
        "tokens_per_second": {
            name: ids.numel() / seconds["median"] for name, seconds in times.items()
        },
        "throughput_over_floor": ratio(times, "floor", "layer-wise"),
    }
    typer.echo(json.dumps(found, indent=1))
    if json_file is not None:
        write_text(json_file, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
