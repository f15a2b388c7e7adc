"""Faults from outside: a run killed at any moment, told to stop, out of room, or fed numbers that
are not finite."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from teachers import SUPPORT

from hf_kernel_ffn import InputError
from hf_kernel_ffn.cli.app import main
from hf_kernel_ffn.distillation import Recipe, Terminated, distill
from hf_kernel_ffn.distillation.objectives import OBJECTIVES
from hf_kernel_ffn.distillation.state import find_state
from hf_kernel_ffn.storage.files import write_text

STEPS = 6


@pytest.fixture(scope="module")
def content(teacher_folder, text_file, tmp_path_factory):
    """A recipe of two stages of six steps, without output_dir."""
    text = tmp_path_factory.mktemp("text") / "short.txt"
    text.write_text(text_file.read_text(encoding="utf-8")[:4500], encoding="utf-8")
    stage = {"tokens": 384, "learning_rate": 0.002, "batch_size": 2}
    return {
        "teacher": str(teacher_folder("llama")),
        "kernel_ffn": {"rows": "free"},
        "data": {"train": str(text), "sequence_length": 32, "shuffle_buffer": 16},
        "stages": [
            {"name": "layer-wise", **stage},
            {"name": "logits", **stage, "optimizer": "adamw"},
        ],
        "calibration_tokens": 256,
        "save_every_tokens": 128,  # two steps
    }


def run(content, out, resume=False, **changes):
    return distill(
        Recipe(**{**content, **changes}, output_dir=str(out)), resume=resume, progress=False
    )


@pytest.fixture(scope="module")
def whole(content, tmp_path_factory):
    """The weights of an uninterrupted run."""
    return load_file(run(content, tmp_path_factory.mktemp("whole") / "out") / "model.safetensors")


def same(folder, tensors):
    found = load_file(Path(folder) / "model.safetensors")
    return found.keys() == tensors.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in tensors.items()
    )


@pytest.fixture
def at_call(monkeypatch):
    """Run an action at the given calls of an objective, counted from 0; what it returns, if
    anything, becomes the loss."""

    def set_up(calls, action):
        count = iter(range(10**6))

        def wrap(objective):
            def wrapped(step):
                loss = objective(step)
                made = action(step.ffns) if next(count) in calls else None
                return loss if made is None else made

            return wrapped

        for name, objective in list(OBJECTIVES.items()):
            monkeypatch.setitem(OBJECTIVES, name, wrap(objective))

    return set_up


# killed


@pytest.mark.slow
def test_thirty_kills_at_random_moments_lose_nothing(content, tmp_path):
    work = {
        # A save after every step, so that many kills hit one.
        "recipe": {**content, "save_every_tokens": 1},
        "kills": 32,
        "kills_per_run": 5,
        "conversions": 6,
        "seed": 0,
        "scratch": str(tmp_path),
    }
    file = tmp_path / "work.json"
    file.write_text(json.dumps(work))
    done = subprocess.run(
        [sys.executable, SUPPORT / "killed.py", file],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["kills"] >= 30 and found["mid_save"] >= 5 and len(found["finished"]) >= 6
    assert found["halves"] == 0  # a conversion that was killed left all of a folder, or none of it
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    for folder in found["finished"]:
        assert same(folder, expected), folder
        assert not [
            path for path in Path(folder).iterdir() if path.is_dir() and path.name != "resume.done"
        ]


def test_a_folder_killed_before_its_first_state_can_be_started_again(content, whole, tmp_path):
    (tmp_path / "out" / "resume.new").mkdir(parents=True)
    (tmp_path / "out" / "resume.new" / "trained.safetensors").write_bytes(b"half")
    assert same(run(content, tmp_path / "out"), whole)


def test_a_state_half_removed_is_not_resumed_from(content, at_call, tmp_path, monkeypatch):
    """A finished run is killed while it removes its state: what is there is a finished student."""
    from hf_kernel_ffn.distillation import state as module

    real = module.shutil.rmtree

    def killed(path, **more):
        if Path(path).name == "resume.done" and Path(path).exists():
            (Path(path) / "trained.safetensors").unlink()
            raise KeyboardInterrupt
        real(path, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.shutil, "rmtree", killed)
        run(content, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    with pytest.raises(InputError, match="it is finished"):
        run(content, tmp_path / "out", resume=True)


# told to stop


@pytest.mark.parametrize(
    "number, name, call",
    [
        (signal.SIGTERM, "SIGTERM", 2),
        (signal.SIGTERM, "SIGTERM", STEPS - 1),  # the last step of a stage
        (signal.SIGTERM, "SIGTERM", STEPS + 2),
        (signal.SIGINT, r"Ctrl-C \(SIGINT\)", 3),
    ],
    ids=["layer-wise", "last step of a stage", "logits", "by hand"],
)
def test_a_signal_saves_the_state_and_stops(content, whole, at_call, tmp_path, number, name, call):
    at_call([call], lambda ffns: os.kill(os.getpid(), number))
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Terminated, match=f"stopped by {name} after step .* --resume") as caught:
        run(content, tmp_path / "out")
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
    at_call([], None)
    assert same(run(content, tmp_path / "out", resume=True), whole)


def test_a_second_signal_ends_the_process_as_ever(content, at_call, tmp_path):
    def twice(ffns):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_call([2], twice)
    with pytest.raises(KeyboardInterrupt):
        run(content, tmp_path / "out")


def test_a_signal_that_is_ignored_stays_so(content, whole, at_call, tmp_path):
    """As that of Ctrl-C by a process in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        at_call([2], lambda ffns: os.kill(os.getpid(), signal.SIGINT))
        assert same(run(content, tmp_path / "out"), whole)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_training_says_that_nothing_is_saved(
    content, tmp_path, monkeypatch, number
):
    from hf_kernel_ffn.distillation import run as loop

    def told(*arguments):
        os.kill(os.getpid(), number)
        raise AssertionError("went on")

    monkeypatch.setattr(loop, "load_teacher", told)
    with pytest.raises(Terminated, match="nothing new is saved"):
        run(content, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "number, name, code",
    [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C (SIGINT)", 130)],
)
def test_the_command_line_says_so_too(
    content, at_call, tmp_path, monkeypatch, capsys, number, name, code
):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({**content, "output_dir": str(tmp_path / "out")}))
    at_call([3], lambda ffns: os.kill(os.getpid(), number))
    monkeypatch.setattr(sys, "argv", ["hf-kernel-ffn", "distill", str(file)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    assert f"stopped by {name} after step 3 of stage 'layer-wise'" in capsys.readouterr().err


# no room


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a tmpfs of that many kilobytes."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / f"disk-{kilobytes}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_last_state_whole(content, whole, at_call, small_disk, tmp_path):
    sizes = {}
    at_call(
        [3],
        lambda ffns: sizes.update(
            one=sum(f.stat().st_size for f in (tmp_path / "out" / "resume").iterdir())
        ),
    )
    run(content, tmp_path / "out")
    disk = small_disk(
        int(1.5 * sizes["one"]) // 1024
    )  # room for one state and not for the next beside it
    at_call([], None)
    with pytest.raises(
        InputError, match="could not write the state of the distillation.*make room"
    ) as caught:
        run(content, disk / "out")
    assert "\n" not in str(caught.value)
    assert {path.name for path in (disk / "out").iterdir()} == {"resume", "metrics.jsonl"}
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert same(run(content, disk / "out", resume=True), whole)


def test_a_full_disk_stops_a_conversion_and_a_report(content, small_disk, monkeypatch, capsys):
    disk = small_disk(64)
    out = disk / "student"
    monkeypatch.setattr(
        sys,
        "argv",
        ["hf-kernel-ffn", "convert", content["teacher"], str(out), "--calibration-tokens", "256"],
    )
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert (
        end.value.code == 2
        and error.startswith("error: could not write")
        and error.count("\n") == 1
    )
    assert not list(disk.iterdir())
    write_text(disk / "report.json", "{}")
    with pytest.raises(InputError, match=r"could not write .*report\.json"):
        write_text(disk / "report.json", "x" * 100_000)
    assert (disk / "report.json").read_text() == "{}" and len(list(disk.iterdir())) == 1


# numbers that are not finite


def spoil(ffns):
    """One weight of the last layer becomes infinite."""
    list(ffns.values())[-1].input_prototypes.weight.data[0, 0] = math.inf
    return torch.tensor(math.nan)


@pytest.mark.parametrize("call, stage", [(3, "layer-wise"), (STEPS + 3, "logits")])
def test_a_bad_loss_names_step_layer_and_last_state(content, at_call, tmp_path, call, stage):
    at_call([call], spoil)
    with pytest.raises(FloatingPointError) as caught:
        run(content, tmp_path / "out")
    message = str(caught.value)
    assert f"loss nan at step 3 of stage '{stage}', first in layers.2.mlp" in message
    state, part = find_state(tmp_path / "out"), int(stage == "logits")
    assert f"the last good state is {state}, of step 2 of part {part}" in message
    assert "\n" not in message


def test_without_a_state_the_message_says_so(content, at_call, tmp_path):
    at_call([0], lambda ffns: torch.tensor(math.inf))
    with pytest.raises(
        FloatingPointError,
        match="loss inf at step 0 .*in no FFN's own numbers.*no state was saved before",
    ):
        run(content, tmp_path / "out")


def bad_gradient(ffns):
    next(iter(ffns.values())).output_prototypes.weight.grad.fill_(math.nan)


def test_bad_steps_are_skipped_and_counted_if_the_recipe_says_so(content, at_call, tmp_path):
    bad = {
        1: lambda ffns: torch.tensor(math.nan),
        3: bad_gradient,
        STEPS + 1: lambda ffns: torch.tensor(math.inf),
    }
    count = iter(range(10**6))
    at_call(range(100), lambda ffns: bad.get(next(count), lambda ffns: None)(ffns))
    out = run(content, tmp_path / "out", skip_steps=3)
    assert json.loads((out / "distillation.json").read_text()) == {"skipped_steps": 3}
    assert all(
        torch.isfinite(tensor).all() for tensor in load_file(out / "model.safetensors").values()
    )


def test_one_bad_step_more_than_allowed_stops(content, at_call, tmp_path):
    at_call([1, 4], lambda ffns: torch.tensor(math.nan))
    with pytest.raises(
        FloatingPointError, match="step 4 of stage 'layer-wise' after 1 skipped steps"
    ):
        run(content, tmp_path / "out", skip_steps=1)


def test_the_count_of_skipped_steps_survives_a_resume(content, at_call, tmp_path):
    at_call([1, 4], lambda ffns: torch.tensor(math.nan))
    with pytest.raises(FloatingPointError):
        run(content, tmp_path / "out", skip_steps=1)
    at_call([], None)
    out = run(content, tmp_path / "out", resume=True, skip_steps=1)
    assert json.loads((out / "distillation.json").read_text()) == {"skipped_steps": 1}
