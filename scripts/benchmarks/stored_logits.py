#!/usr/bin/env python3
"""What a recorded teacher costs and is worth in the logits stage: bytes, tokens per second, and KL
on other text after the same steps.

    python scripts/benchmarks/stored_logits.py recipes/llama-faithful.yaml \\
        recipes/llama-readable.yaml --json recipes/results/speed/stored_logits.json
"""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kernel_ffn.distillation import Recipe, load_recipe
from hf_kernel_ffn.distillation.batches import open_text
from hf_kernel_ffn.distillation.divergence import kl
from hf_kernel_ffn.distillation.objectives import logits
from hf_kernel_ffn.distillation.optimizers import make_optimizers
from hf_kernel_ffn.distillation.recipe import Stage
from hf_kernel_ffn.distillation.recording import record
from hf_kernel_ffn.distillation.records import Record
from hf_kernel_ffn.distillation.run import student_of
from hf_kernel_ffn.distillation.step import Step, accumulate_gradients
from hf_kernel_ffn.distillation.teacher_signal import (
    RecordedTeacher,
    RunningTeacher,
    TeacherSignal,
)
from hf_kernel_ffn.distillation.trainer import train
from hf_kernel_ffn.evaluation.report import evaluate_student
from hf_kernel_ffn.gpu.measuring import Work, interleaved, ratio
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_teacher, load_tokenizer
from hf_kernel_ffn.text.packing import read_token_ids

HELD_OUT_TOKENS = 16_384
"""Of the text to compare on."""


@dataclass
class Start:
    """What a recipe's logits stage begins with, whoever the teacher is."""

    recipe: Recipe
    """With that stage alone."""
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel
    student: PreTrainedModel
    held_out: Tensor
    """(rows, length) token ids to compare on."""

    @property
    def stage(self) -> Stage:
        """The logits stage."""
        return self.recipe.stages[0]


def main(
    recipes: Annotated[
        list[str], typer.Argument(help="YAML files; their last stages are on the logits")
    ],
    tokens: Annotated[
        int, typer.Option(help="of the logits stage; the stages before it are left out")
    ] = 100_000,
    top_k: Annotated[
        str,
        typer.Option(
            help="tokens to record at every position, comma-separated; the first exactly too"
        ),
    ] = "64,16",
    text: Annotated[str, typer.Option(help="text to compare on")] = "recipes/text/books-test.txt",
    repeats: Annotated[int, typer.Option(help="rounds of timing, interleaved")] = 7,
    clock: Annotated[str, typer.Option(help="wall or cpu")] = "cpu",
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write the figures")
    ] = None,
) -> None:
    """Convert each recipe's teacher, record it, and run the logits stage with the teacher running
    and with each record. Steps are timed without the price of write mass."""
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "tokens": tokens,
        "text": text,
        "clock": clock,
        "torch": torch.__version__,
        "records": {},
        "recipes": {},
    }
    counts = [int(count) for count in top_k.split(",")]
    kinds = [(f"top {counts[0]}, exact", counts[0], True)]
    kinds += [(f"top {count}", count, False) for count in counts]
    for file in recipes:
        start = prepare(file, tokens, text)
        with tempfile.TemporaryDirectory() as scratch:
            folders = {}
            for number, (name, count, exact) in enumerate(kinds):
                folder = Path(scratch, str(number))
                record(start.recipe, folder, count, exact=exact, say=typer.echo)
                folders[name] = folder
                report["records"][name] = {
                    "bytes_per_token": Record(folder).facts.form.token_bytes,
                    "bytes": sum(part.stat().st_size for part in folder.iterdir()),
                }
            exact_name, packed_name, *_ = folders
            report["recipes"][file] = {
                "KL": measure_divergences(start, folders),
                "KL of packing": measure_packing(
                    start, Record(folders[exact_name]), Record(folders[packed_name])
                ),
                **measure_speeds(start, folders, repeats, clock),
            }
    typer.echo(json.dumps(report, indent=1))
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")


def prepare(file: str, tokens: int, text: str) -> Start:
    """Load a recipe with its logits stage alone, and convert its teacher."""
    recipe = load_recipe(file)
    recipe.stages[-1].tokens = tokens
    recipe.stages[:-1] = []
    tokenizer = load_tokenizer(recipe.teacher)
    teacher = load_teacher(recipe.teacher)
    student = student_of(recipe, teacher, tokenizer)
    length = recipe.data.sequence_length
    held_out = read_token_ids(tokenizer, [text], length, HELD_OUT_TOKENS)
    return Start(recipe, tokenizer, teacher, student, held_out)


def measure_packing(start: Start, exact: Record, packed: Record) -> float:
    """KL in nats of what a packed record says of the same tokens, by its first sequences."""
    text = open_text(start.tokenizer, start.recipe.data, start.recipe.seed)
    ids = torch.stack(list(islice(text, start.stage.batch_size)))
    vocabulary = start.teacher.config.vocab_size
    _, expected = exact.look_up(ids, vocabulary)
    _, found = packed.look_up(ids, vocabulary)
    return kl(found.double(), expected.double()).mean().item()


def measure_speeds(start: Start, folders: dict[str, Path], repeats: int, clock: str) -> dict:
    """Time a step with the teacher running and with each record."""
    signals: dict[str, TeacherSignal] = {"teacher": RunningTeacher(start.teacher)}
    for name, folder in folders.items():
        signals[name] = RecordedTeacher(start.teacher, Record(folder))
    work = {name: make_step(start, signal) for name, signal in signals.items()}
    times = interleaved(work, repeats, torch.device("cpu"), clock)
    tokens = start.stage.batch_size * start.recipe.data.sequence_length
    return {
        "tokens_per_second": {name: tokens / times[name]["median"] for name in times},
        "throughput_over_running_teacher": {
            name: ratio(times, "teacher", name) for name in folders
        },
    }


def make_step(start: Start, signal: TeacherSignal) -> Work:
    """One step of the stage on a student of its own."""
    student = copy.deepcopy(start.student).requires_grad_(False)
    ffns = student.kernel_ffns()
    parameters = [
        parameter.requires_grad_(True) for ffn in ffns.values() for parameter in ffn.parameters()
    ]
    optimizers = make_optimizers(student, parameters, start.stage)
    text = open_text(start.tokenizer, start.recipe.data, start.recipe.seed)
    batch = torch.stack(list(islice(text, start.stage.batch_size)))
    step = Step(start.stage, signal, student, ffns, batch, torch.Tensor.backward)

    def run() -> None:
        accumulate_gradients(logits, step)
        for optimizer in optimizers:
            optimizer.step()
        student.zero_grad(set_to_none=True)

    return run


def measure_divergences(start: Start, folders: dict[str, Path]) -> dict[str, float]:
    """KL on held-out text: as converted, and trained by the teacher and by each record."""
    stages = {"teacher": start.stage}
    for name, folder in folders.items():
        stages[name] = start.stage.model_copy(update={"stored_logits": str(folder)})

    divergences = {"converted": measure_divergence(start.student, start)}
    for name, stage in stages.items():
        student = copy.deepcopy(start.student)
        recipe = start.recipe.model_copy(update={"stages": [stage]})
        train(recipe, start.tokenizer, start.teacher, student, progress=True)
        divergences[name] = measure_divergence(student, start)
    return divergences


def measure_divergence(student: PreTrainedModel, start: Start) -> float:
    """KL from the teacher on held-out text, nats per token."""
    return evaluate_student(student, start.teacher, start.held_out)["kl"]


if __name__ == "__main__":
    typer.run(main)
