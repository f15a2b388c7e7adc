#!/usr/bin/env python3
"""What a recorded teacher costs and is worth in the logits stage: bytes, tokens per second, and KL on other text after the same steps.

python scripts/benchmarks/stored_logits.py recipes/llama-faithful.yaml recipes/llama-readable.yaml --json recipes/results/speed/stored_logits.json
"""

import copy
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Annotated, Optional

import typer


def main(
    recipes: Annotated[
        list[str], typer.Argument(help="YAML files; their last stages are on the logits")
    ],
    tokens: Annotated[
        int, typer.Option(help="of the logits stage; the stages before it are left out")
    ] = 100_000,
    top_k: Annotated[
        str, typer.Option(help="tokens to record at every position, comma-separated")
    ] = "64,16",
    text: Annotated[str, typer.Option(help="text to compare on")] = "recipes/text/books-test.txt",
    repeats: Annotated[int, typer.Option(help="rounds of timing, interleaved")] = 7,
    clock: Annotated[str, typer.Option(help="wall or cpu")] = "cpu",
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write the figures")
    ] = None,
):
    """Convert each recipe's teacher, record it, and run the logits stage with the teacher running and with each record. Steps are timed
    without the price of write mass."""
    import torch

    from hf_kernel_ffn.distillation import load_recipe
    from hf_kernel_ffn.distillation.batches import open_text
    from hf_kernel_ffn.distillation.objectives import logits
    from hf_kernel_ffn.distillation.optimizers import make_optimizers
    from hf_kernel_ffn.distillation.recording import record
    from hf_kernel_ffn.distillation.records import Record, token_bytes
    from hf_kernel_ffn.distillation.run import student_of
    from hf_kernel_ffn.distillation.step import Step, accumulate_gradients
    from hf_kernel_ffn.distillation.teacher_signal import RecordedTeacher, RunningTeacher
    from hf_kernel_ffn.distillation.trainer import train
    from hf_kernel_ffn.evaluation.report import evaluate_student
    from hf_kernel_ffn.gpu.measuring import interleaved, ratio
    from hf_kernel_ffn.storage.files import write_text
    from hf_kernel_ffn.storage.loading import load_teacher, load_tokenizer
    from hf_kernel_ffn.text.packing import read_token_ids

    torch.set_num_threads(1)
    found: dict = {
        "tokens": tokens,
        "text": text,
        "clock": clock,
        "torch": torch.__version__,
        "records": {},
        "recipes": {},
    }
    for file in recipes:
        recipe = load_recipe(file)
        recipe.stages[-1].tokens = tokens
        recipe.stages[:-1] = []
        [stage], length = recipe.stages, recipe.data.sequence_length
        teacher, tokenizer = load_teacher(recipe.teacher), load_tokenizer(recipe.teacher)
        start = student_of(recipe, teacher, tokenizer)
        held_out = read_token_ids(tokenizer, [text], length, 16_384)
        report = {"KL": {"converted": evaluate_student(start, teacher, held_out)["kl"]}}
        text_of_steps = open_text(tokenizer, recipe.data, recipe.seed)
        batch = torch.stack(list(islice(text_of_steps, stage.batch_size)))

        def step(signal, start=start, stage=stage, batch=batch):
            student = copy.deepcopy(start).requires_grad_(False)
            ffns = student.kernel_ffns()
            parameters = [p.requires_grad_(True) for ffn in ffns.values() for p in ffn.parameters()]
            made = make_optimizers(student, parameters, stage)
            one_step = Step(stage, signal, student, ffns, batch, torch.Tensor.backward)

            def once():
                accumulate_gradients(logits, one_step)
                for one in made:
                    one.step()
                student.zero_grad(set_to_none=True)

            return once

        with tempfile.TemporaryDirectory() as scratch:
            stages, work = {"teacher": stage}, {"teacher": step(RunningTeacher(teacher))}
            for k in map(int, top_k.split(",")):
                out = Path(scratch, str(k))
                record(recipe, out, k, say=typer.echo)
                found["records"][f"top {k}"] = {
                    "bytes_per_token": token_bytes(k), "bytes": sum(part.stat().st_size for part in out.iterdir()),
                }  # fmt: skip
                stages[f"top {k}"] = stage.model_copy(update={"stored_logits": str(out)})
                work[f"top {k}"] = step(RecordedTeacher(teacher, Record(out)))
            times = interleaved(work, repeats, torch.device("cpu"), clock)
            for name, one in stages.items():
                student = copy.deepcopy(start)
                train(
                    recipe.model_copy(update={"stages": [one]}),
                    tokenizer,
                    teacher,
                    student,
                    progress=True,
                )
                report["KL"][name] = evaluate_student(student, teacher, held_out)["kl"]
        read = stage.batch_size * length
        report["tokens_per_second"] = {
            name: read / seconds["median"] for name, seconds in times.items()
        }
        report["throughput_over_running_teacher"] = {
            name: ratio(times, "teacher", name) for name in times if name != "teacher"
        }
        found["recipes"][file] = report
    typer.echo(json.dumps(found, indent=1))
    if json_file is not None:
        write_text(json_file, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
