"""A distillation of gpu_day.py: by a recipe, with as many tokens as there are seconds for."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer

from hf_kernel_ffn.distillation import distill, load_recipe, run
from hf_kernel_ffn.distillation.recipe import Recipe
from hf_kernel_ffn.storage.loading import load_tokenizer
from hf_kernel_ffn.text.packing import stream_tokens

PROBE_STEPS = 8
"""Of each stage, to measure how fast it is."""
SHARE = 0.85
"""Of the seconds that is planned for: warming up and saving take some."""


def main(
    recipe: Annotated[Path, typer.Argument(help="YAML file")],
    teacher: Annotated[str, typer.Argument(help="folder of the stock model")],
    out: Annotated[Path, typer.Argument(help="new folder for the student")],
    json_file: Annotated[Path, typer.Option("--json", help="where to write the figures")],
    seconds: Annotated[float, typer.Option(help="of training, halved between the stages")] = 35,
    batch_size: Annotated[int, typer.Option(help="rows of a step")] = 32,
    most_tokens: Annotated[Optional[int], typer.Option(help="of a stage")] = None,
    block_bytes: Annotated[
        int, typer.Option(help="that a layer of tied rows may take for its pieces at once")
    ] = 2**31,
    compiled: Annotated[bool, typer.Option("--compiled", help="FFNs by torch.compile")] = False,
) -> None:
    """Measure the speed of every stage of RECIPE in a few steps, then run it with what fits."""
    began = time.perf_counter()
    conversion: list[float] = []
    run.student_of = convert_once(run.student_of, conversion, block_bytes, compiled)
    base = [f"teacher={teacher}", "dtype=bfloat16", f"save_every_tokens={10**12}"]
    stages = load_recipe(recipe, base).stages
    for number in range(len(stages)):
        base.append(f"stages.{number}.batch_size={batch_size}")

    probe = run_recipe(recipe, base, out.with_name(out.name + "-probe"), [1] * len(stages))
    speeds = [stage["tokens_per_second"] for stage in probe["stages"]]
    report: dict[str, Any] = {"conversion_seconds": conversion[0], "probe": probe}
    write(json_file, report)
    budgets = [int(speed * seconds * SHARE / len(stages)) for speed in speeds]
    if most_tokens is not None:
        budgets = [min(budget, most_tokens) for budget in budgets]
    report.update(run_recipe(recipe, base, out, budgets))
    report["epochs"] = sum(budgets) / count_text_tokens(load_recipe(recipe, base))
    report["all_seconds"] = time.perf_counter() - began
    write(json_file, report)


def convert_once(
    student_of: Callable[..., Any], seconds: list[float], block_bytes: int, compiled: bool
) -> Callable[..., Any]:
    """``student_of``, whose first student is kept: each call returns a copy of it."""
    made: list[Any] = []

    def again(*arguments: Any, **options: Any) -> Any:
        if not made:
            began = time.perf_counter()
            made.append(student_of(*arguments, **options))
            seconds.append(time.perf_counter() - began)
        student = copy.deepcopy(made[0])
        for ffn in student.kernel_ffns().values():
            ffn.activation_bytes = block_bytes
            if compiled:
                ffn.compile(dynamic=False)
        return student

    return again


def run_recipe(recipe: Path, base: list[str], out: Path, tokens: list[int]) -> dict[str, Any]:
    """Run ``recipe`` with so many tokens in its stages, PROBE_STEPS steps at least; returns the
    seconds, the peak of the GPU's memory, and tokens/s, first and last loss of every stage."""
    overrides = [*base, f"output_dir={out}"]
    for number, stage in enumerate(load_recipe(recipe, base).stages):
        length = load_recipe(recipe, base).data.sequence_length
        least = PROBE_STEPS * stage.batch_size * length
        overrides.append(f"stages.{number}.tokens={max(tokens[number], least)}")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    distill(load_recipe(recipe, overrides), progress=False)
    return {
        "seconds": time.perf_counter() - began,
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0,
        "stages": summarise(out / "metrics.jsonl"),
    }


def summarise(metrics: Path) -> list[dict[str, Any]]:
    """Of every stage: name, tokens, median tokens/s of the later half, first and last losses."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = []
    read = 0
    for part in sorted({line["part"] for line in lines}):
        steps = [line for line in lines if line["part"] == part]
        later = steps[len(steps) // 2 :]
        found.append(
            {
                "stage": steps[0]["stage"],
                "tokens": steps[-1]["tokens"] - read,
                "tokens_per_second": statistics.median(s["tokens_per_second"] for s in later),
                "first_loss": statistics.mean(s["loss"] for s in steps[:4]),
                "last_loss": statistics.mean(s["loss"] for s in steps[-4:]),
            }
        )
        read = steps[-1]["tokens"]
    return found


def count_text_tokens(recipe: Recipe) -> int:
    """Tokens of the recipe's training text."""
    return sum(1 for _ in stream_tokens(load_tokenizer(recipe.teacher), recipe.data.sources))


def write(file: Path, report: dict[str, Any]) -> None:
    """Write ``report`` as JSON."""
    file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
