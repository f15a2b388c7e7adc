"""Run by test_faults.py in a process of its own: kill distillations and conversions at random
moments.

argv: a JSON file of what to do. Everything is imported once; each attempt is a fork, killed by
SIGKILL after a random time. Prints one JSON line: how many kills, how many of them in a save, and
the folders of the finished runs.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

from hf_kernel_ffn.cli.app import main
from hf_kernel_ffn.distillation import Recipe, distill
from hf_kernel_ffn.distillation import trainer as training
from hf_kernel_ffn.distillation.state import find_state

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()


def attempt(job, when=None):
    """Fork, run ``job(tell)``, and kill it once ``when(told)`` says so: whether it ended by itself,
    well.

    ``told`` is the time since the job has called ``tell``, or None before that."""
    told, tell = os.pipe()
    os.set_blocking(told, False)
    child = os.fork()
    if child == 0:
        try:
            job(lambda: os.write(tell, b"."))
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    since = None
    try:
        while True:
            done, status = os.waitpid(child, os.WNOHANG if when else 0)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0, (
                    "an attempt that was not killed failed"
                )
                return True
            if since is None:
                with contextlib.suppress(BlockingIOError):
                    since = time.monotonic() if os.read(told, 1) else None
            if when(None if since is None else time.monotonic() - since):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return False
            time.sleep(0.0005)
    finally:
        os.close(told)
        os.close(tell)


def after(seconds):
    """Kill so long after the start."""
    start = time.monotonic()
    return lambda told: time.monotonic() - start > seconds


def in_training(seconds):
    """Kill so long after the first step was begun."""
    return lambda told: told is not None and told > seconds


def in_a_save(out, skip, seconds):
    """Kill so long after a save was begun, the ``skip``-th that is seen."""
    seen = {"count": -1, "before": False, "since": None}

    def when(told):
        now = any((out / name).exists() for name in ("resume.new", "finished.new"))
        if now and not seen["before"]:
            seen["count"] += 1
            if seen["count"] == skip:
                seen["since"] = time.monotonic()
        seen["before"] = now
        return seen["since"] is not None and time.monotonic() - seen["since"] > seconds

    return when


def distillation(content, out):
    def job(tell):
        original = training.Trainer.run

        def told(self, *arguments):
            tell()
            original(self, *arguments)

        training.Trainer.run = told  # in the fork alone
        distill(
            Recipe(**content, output_dir=str(out)),
            resume=find_state(out) is not None,
            progress=False,
        )

    return job


def conversion(teacher, out):
    def job(tell):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.argv = ["hf-kernel-ffn", "convert", teacher, str(out), "--calibration-tokens", "256"]
        try:
            main()
        except SystemExit as end:
            assert not end.code

    return job


def run(work):
    rng, scratch, content = random.Random(work["seed"]), Path(work["scratch"]), work["recipe"]
    times = {"start": time.monotonic()}
    attempt(
        distillation(content, scratch / "whole"),
        lambda told: times.update(told=told) if told else None,
    )
    trained = times["told"]
    loaded = time.monotonic() - times["start"] - trained
    kills, mid_save, finished = 0, 0, []
    while kills < work["kills"]:
        out = scratch / f"killed-{len(finished)}"
        for _ in range(work["kills_per_run"]):
            way = rng.random()
            if way < 0.2:
                when = after(rng.uniform(0, loaded))
            elif way < 0.6:
                when = in_training(rng.uniform(0, 0.5 * trained))
            else:
                when = in_a_save(out, rng.randrange(4), rng.uniform(0, 0.003))
            if attempt(distillation(content, out), when):
                break
            kills += 1
            if (out / "config.json").exists() and find_state(
                out
            ) is None:  # killed while it cleared up: it is finished
                break
            mid_save += any(
                (out / name).exists()
                for name in ("resume.new", "resume.old", "resume.done", "finished.new")
            )
        else:
            attempt(distillation(content, out))
        finished.append(str(out))
    halves, survived = 0, 0
    for number in range(work["conversions"]):
        out = scratch / f"converted-{number}"
        if attempt(conversion(content["teacher"], out), after(rng.uniform(0.2, 1.2) * loaded)):
            survived += 1
        elif out.exists():  # the rename was done
            halves += not {"config.json", "model.safetensors", "conversion.json"} <= {
                path.name for path in out.iterdir()
            }
    report = {
        "kills": kills,
        "mid_save": mid_save,
        "finished": finished,
        "conversions_killed": work["conversions"] - survived,
        "halves": halves,
    }
    print(json.dumps(report))


run(json.loads(Path(sys.argv[1]).read_text()))
