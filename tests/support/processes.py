"""Run by test_processes.py, by itself or under ``accelerate launch``: the same distillation on one
or more processes.

argv: a JSON file of what to do. The main process writes the loss of every step to the file that it
names.
"""

import json
import sys
from pathlib import Path

import torch

from hf_kernel_ffn import KernelFFNConfig
from hf_kernel_ffn.conversion.convert import convert
from hf_kernel_ffn.distillation import Recipe, Terminated
from hf_kernel_ffn.distillation.accelerator import make_accelerator
from hf_kernel_ffn.distillation.models import Models
from hf_kernel_ffn.distillation.state import find_state
from hf_kernel_ffn.distillation.stopping import Stop
from hf_kernel_ffn.distillation.teacher_signal import make_signals
from hf_kernel_ffn.distillation.trainer import Trainer
from hf_kernel_ffn.storage.loading import load_student, load_teacher, load_tokenizer


def train(content, dtype, until=None):
    """Losses of the steps taken, in ``dtype`` throughout; goes on from a state if there is one, and
    keeps states."""
    recipe = Recipe(**content)
    accelerator = make_accelerator(recipe)
    torch.manual_seed(recipe.seed)
    teacher = load_teacher(recipe.teacher).to(getattr(torch, dtype)).requires_grad_(False)
    student = load_student(recipe.student).to(getattr(torch, dtype)).requires_grad_(False)
    for ffn in student.kernel_ffns().values():
        ffn.requires_grad_(True)
    losses, stop = [], Stop()

    def note(report):
        losses.append(report.loss)
        if until is not None and len(losses) == until - 1:
            stop.asked = True  # the next step is the last one

    tokenizer = load_tokenizer(recipe.teacher)
    models = Models(tokenizer, make_signals(recipe, teacher), student, student)
    trainer = Trainer(recipe, accelerator, models, stop=stop, listeners=[note])
    state = find_state(Path(recipe.output_dir))
    accelerator.wait_for_everyone()
    try:
        trainer.run({"recipe": content, "kernel_ffn": student.config.kernel_ffn}, state)
    except Terminated:
        accelerator.wait_for_everyone()
        return losses
    accelerator.wait_for_everyone()
    done = trainer.gather_models().student
    if accelerator.is_main_process:
        done.save_pretrained(Path(recipe.output_dir) / "done")
    accelerator.wait_for_everyone()
    return losses


def calibrated(content):
    """The FVU of every layer of fresh conversions, whose statistics are of all processes: free
    rows, tied ones, and tied ones with a single row held out, so that only one process has any."""
    accelerator = make_accelerator(Recipe(**content))
    teacher = load_teacher(content["teacher"])
    ids = torch.randint(3, 300, (16, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for config, rows in ((KernelFFNConfig(), 16), (None, 16), (None, 4)):
        _, report = convert(teacher, config, calibration_ids=ids[:rows])
        found += [layer["fvu"] for layer in report.layers.values()]
    accelerator.wait_for_everyone()
    return found


def main(work):
    out = {}
    if work.get("calibrates", True):
        out["calibrated"] = calibrated(work["jobs"][0]["content"])
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
