"""Run by test_processes.py, by itself or under ``accelerate launch``: the same distillation on one or more processes.

argv: a JSON file of what to do. The main process writes the loss of every step to the file that it names.
"""

import json
import sys
from pathlib import Path

import torch

from hf_kernel_ffn import KernelFFNConfig
from hf_kernel_ffn.conversion.convert import convert
from hf_kernel_ffn.distillation import Recipe, Terminated
from hf_kernel_ffn.distillation.sharding import unsharded
from hf_kernel_ffn.distillation.state import find_state, load_rng, load_trained
from hf_kernel_ffn.distillation.trainer import Run, make_accelerator
from hf_kernel_ffn.storage.loading import load_student, load_teacher, load_tokenizer


class Noted(Run):
    """Notes the mean loss of every step; is told to stop after ``until`` of them."""

    losses: list
    until: int | None = None

    def _agreed(self, loss):
        value, stopping = super()._agreed(loss)
        self.losses.append(value)
        return value, stopping or len(self.losses) == self.until


def train(content, dtype, until=None):
    """Losses of the steps taken, in ``dtype`` throughout; goes on from a state if there is one, and keeps states."""
    recipe = Recipe(**content)
    accelerator = make_accelerator(recipe)
    torch.manual_seed(recipe.seed)
    teacher = load_teacher(recipe.teacher).to(getattr(torch, dtype)).requires_grad_(False)
    student = load_student(recipe.student).to(getattr(torch, dtype)).requires_grad_(False)
    for ffn in student.kernel_ffns().values():
        ffn.requires_grad_(True)
    run = Noted(
        recipe, accelerator, load_tokenizer(recipe.teacher), teacher, student, student, False
    )
    run.losses, run.until = [], until
    state = find_state(Path(recipe.output_dir))
    accelerator.wait_for_everyone()
    if state is not None:
        load_trained(state, run.kept)
        load_rng(state)
    try:
        run.stages({"recipe": content, "kernel_ffn": student.config.kernel_ffn}, state)
    except Terminated:
        accelerator.wait_for_everyone()
        return run.losses
    accelerator.wait_for_everyone()
    done = unsharded(student, teacher) if run.sharded else student
    if accelerator.is_main_process:
        done.save_pretrained(Path(recipe.output_dir) / "done")
    accelerator.wait_for_everyone()
    return run.losses


def calibrated(content):
    """The FVU of every layer of a fresh conversion, whose statistics are of all processes."""
    accelerator = make_accelerator(Recipe(**content))
    teacher = load_teacher(content["teacher"])
    ids = torch.randint(3, 300, (16, 32), generator=torch.Generator().manual_seed(0))
    _, report = convert(teacher, KernelFFNConfig(), calibration_ids=ids)
    accelerator.wait_for_everyone()
    return [layer["fvu"] for layer in report.layers.values()]


def main(work):
    out = {"calibrated": calibrated(work["jobs"][0]["content"])}
    for job in work["jobs"]:
        out[job["name"]] = train(job["content"], job["dtype"], job.get("until"))
    accelerator = make_accelerator(Recipe(**work["jobs"][0]["content"]))
    out["processes"] = accelerator.num_processes
    if accelerator.is_main_process:
        Path(work["out"]).write_text(json.dumps(out))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
