"""Run by test_faults.py in a process of its own: kill distillations and conversions at random moments.

argv: a JSON file of what to do. Everything is imported once; each attempt is a fork, killed by SIGKILL after a random time. Prints
one JSON line: how many kills, how many of them in a save, and the folders of the finished runs.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

from hf_kernel_ffn.cli import main
from hf_kernel_ffn.distillation import Recipe, distill
from hf_kernel_ffn.distillation.state import find_state

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()


def attempt(job, delay):
    """Fork, run ``job``, and kill it after ``delay`` seconds (None: wait): whether it ended by itself, well."""
    child = os.fork()
    if child == 0:
        try:
            job()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    until = None if delay is None else time.monotonic() + delay
    while until is None or time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG if until is not None else 0)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "an attempt that was not killed failed"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def distillation(content, out):
    def job():
        distill(Recipe(**content, output_dir=str(out)), resume=find_state(out) is not None, progress=False)

    return job


def run(work):
    rng, scratch, content = random.Random(work["seed"]), Path(work["scratch"]), work["recipe"]
    began = time.monotonic()
    attempt(distillation(content, scratch / "whole"), None)
    whole = time.monotonic() - began
    kills, mid_save, finished = 0, 0, []
    while kills < work["kills"]:
        out = scratch / f"killed-{len(finished)}"
        while not attempt(distillation(content, out), rng.uniform(0, 0.6 * whole)):
            kills += 1
            mid_save += any((out / name).exists() for name in ("resume.new", "resume.old", "finished.new"))
            if kills >= work["kills"]:
                attempt(distillation(content, out), None)
                break
        finished.append(str(out))
    argv = ["hf-kernel-ffn", "convert", content["teacher"], "", "--calibration-tokens", "256"]
    halves = 0
    for number in range(work["conversions"]):
        sys.argv = [*argv[:3], str(scratch / f"converted-{number}"), *argv[4:]]
        if not attempt(lambda: _well(main), rng.uniform(0, 0.5 * whole)):
            halves += (scratch / f"converted-{number}").exists()
    print(json.dumps({"kills": kills, "mid_save": mid_save, "finished": finished, "halves": halves, "seconds": whole}))


def _well(command):
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        command()
    except SystemExit as end:
        assert not end.code


run(json.loads(Path(sys.argv[1]).read_text()))
