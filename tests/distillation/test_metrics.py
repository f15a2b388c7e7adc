"""metrics.jsonl, the loss on held-out text, and steps of several batches."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    LAYER_WISE,
    LOGITS,
    STEPS,
    Interrupted,
    assert_same_files,
    interrupt,
    make_step,
    run,
)

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.distillation import Recipe
from hf_kernel_ffn.distillation.metrics import METRICS, MetricsFile, StepReport
from hf_kernel_ffn.distillation.objectives import OBJECTIVES
from hf_kernel_ffn.distillation.recipe import Stage
from hf_kernel_ffn.distillation.step import accumulate_gradients
from hf_kernel_ffn.distillation.trainer import train
from hf_kernel_ffn.text.packing import read_token_ids

TOKENS_PER_STEP = 64


@pytest.fixture(scope="module")
def recipe(teacher_folder, text_file, tmp_path_factory):
    """A recipe of two stages of six steps, with changes to it and to its data."""
    text = tmp_path_factory.mktemp("text") / "short.txt"
    text.write_text(text_file.read_text(encoding="utf-8")[:4500], encoding="utf-8")

    def make(out, data=(), **changes):
        content = {
            "teacher": str(teacher_folder("llama")),
            "kernel_ffn": {"rows": "free"},
            "data": {
                "train": str(text),
                "sequence_length": 32,
                "shuffle_buffer": 16,
                **dict(data),
            },
            "stages": [LAYER_WISE, LOGITS],
            "output_dir": str(out),
            "calibration_tokens": 256,
            "save_every_tokens": 2 * TOKENS_PER_STEP,
        }
        return Recipe(**{**content, **changes})

    return make


@pytest.fixture(scope="module")
def held_out(text_file):
    """Of a recipe's data: four sequences of held-out text, asked for every second step."""
    return {
        "validation": str(text_file),
        "validation_tokens": 128,
        "validate_every_tokens": 2 * TOKENS_PER_STEP,
    }


@pytest.fixture(scope="module")
def finished(recipe, held_out, tmp_path_factory):
    return run(recipe(tmp_path_factory.mktemp("finished") / "out", held_out))


def lines_of(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def without_times(lines):
    return [
        {key: value for key, value in line.items() if key not in ("time", "tokens_per_second")}
        for line in lines
    ]


# metrics.jsonl


def test_every_step_has_a_line(finished):
    lines = lines_of(finished)
    assert [(line["stage"], line["part"], line["step"]) for line in lines] == [
        (name, part, step)
        for part, name in enumerate(("layer-wise", "logits"))
        for step in range(STEPS)
    ]
    assert [line["tokens"] for line in lines] == [
        TOKENS_PER_STEP * (number + 1) for number in range(2 * STEPS)
    ]
    assert max(line["learning_rate"] for line in lines) == LOGITS["learning_rate"]
    assert all(line["loss"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", line["time"]) for line in lines)
    assert not any("skipped" in line for line in lines)


@pytest.mark.parametrize("at", [3, STEPS, STEPS + 3])
def test_a_resumed_run_has_every_line_once(recipe, held_out, finished, monkeypatch, tmp_path, at):
    same = recipe(tmp_path / "out", held_out)
    interrupt(monkeypatch, same, at)
    made = lines_of(tmp_path / "out")
    assert len(made) == at
    with (tmp_path / "out" / METRICS).open("a") as file:
        file.write('{"tokens": 64, "half')  # as of a run that was killed
    run(same, resume=True)
    assert without_times(lines_of(tmp_path / "out")) == without_times(lines_of(finished))
    kept = at - at % 2  # what the state has
    assert lines_of(tmp_path / "out")[:kept] == made[:kept]  # not written anew
    assert_same_files(tmp_path / "out", finished)


def test_a_run_killed_before_its_first_state_leaves_nothing_in_the_way(
    recipe, finished, held_out, monkeypatch, tmp_path
):
    same = recipe(tmp_path / "out", held_out)
    interrupt(monkeypatch, same, 1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [METRICS]
    run(same)
    assert without_times(lines_of(tmp_path / "out")) == without_times(lines_of(finished))


def test_a_skipped_step_is_said_to_be(recipe, monkeypatch, tmp_path):
    calls, original = iter(range(100)), OBJECTIVES["layer-wise"]

    def spoilt(step):
        loss = original(step)
        return torch.tensor(float("nan")) if next(calls) == 1 else loss

    monkeypatch.setitem(OBJECTIVES, "layer-wise", spoilt)
    out = run(recipe(tmp_path / "out", stages=[LAYER_WISE], skip_steps=1))
    lines = lines_of(out)
    assert [line.get("skipped", False) for line in lines] == [False, True] + [False] * 4
    assert lines[1]["loss"] is None and all(line["loss"] for line in (lines[0], *lines[2:]))


def test_a_line_that_cannot_be_written_is_an_input_error(tmp_path):
    report = StepReport("logits", 0, 0, 64, 1.0, 0.1, 100.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"could not write .*metrics\.jsonl"):
        MetricsFile(tmp_path / "file")(report)


# held-out text


def test_the_held_out_loss_is_measured_now_and_then(finished):
    lines = lines_of(finished)
    measured = [line["step"] for line in lines if "validation_loss" in line]
    assert measured == [1, 3, 5, 1, 3, 5]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert 0 < losses[2] < losses[0] and len(set(losses)) == 6


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 2, "alpha": 4, "dropout": 0.5}}])
def test_held_out_text_changes_no_weight(recipe, held_out, finished, tmp_path, changes):
    """Not by what thresholds see of it either, nor by the random numbers of dropout."""
    sparse = {"kernel_ffn": {"simplex": "threshold", "top_k": 6}, **changes}
    stages = [LOGITS] if changes else [{**LAYER_WISE, "write_mass": 0.02}, LOGITS]
    outs = [
        run(recipe(tmp_path / str(number), data, stages=stages, **sparse))
        for number, data in enumerate(({}, held_out))
    ]
    one, other = (load_file(out / "model.safetensors") for out in outs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_held_out_loss_is_the_stages_own(make_teacher, recipe, held_out, tokenizer, ids):
    """On text of two batches of unlike size, after a step too small to move anything."""
    teacher = make_teacher("llama", vocab_size=4096)
    few = KernelFFNConfig(kernel="brownian", values="product", rows="tied", pieces=2)
    student, _ = convert(teacher, few, calibration_ids=ids, calibration_tokens=256)
    seen = []
    still = {**LOGITS, "tokens": 1, "learning_rate": 1e-12, "batch_size": 3}
    train(
        recipe("unused", held_out, stages=[still]),
        tokenizer,
        teacher,
        student,
        listeners=[seen.append],
    )
    text = read_token_ids(tokenizer, [held_out["validation"]], 32, 128)
    with torch.no_grad():
        p, q = (model(text).logits.double().log_softmax(-1) for model in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert [report.validation_loss for report in seen] == [pytest.approx(expected, rel=1e-4)]


def test_held_out_text_that_is_not_there_is_refused_before_training(recipe, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt unreadable as text"):
        run(recipe(tmp_path / "out", {"validation": "nowhere.txt"}))
    assert not (tmp_path / "out").exists()


# steps of several batches


@pytest.fixture(scope="module")
def pair(make_teacher, ids):
    """In float64, so that roundings are far below everything else."""
    teacher = make_teacher("llama", vocab_size=4096).double()
    settings = KernelFFNConfig(init="single")  # not already at the minimum
    student, _ = convert(teacher, settings, calibration_ids=ids, calibration_tokens=256)
    for model in (teacher, student):
        model.requires_grad_(False)
    for ffn in student.kernel_ffns().values():
        ffn.requires_grad_(True)
    return teacher, student


@pytest.mark.parametrize("name", ["layer-wise", "logits"])
def test_several_batches_make_the_gradients_of_a_large_one(pair, ids, name):
    teacher, student = pair
    stage = Stage(name=name, tokens=1, learning_rate=1, cross_entropy=0.3)
    found = []
    for batches in ([ids], list(ids.split(2))):
        student.zero_grad()
        statistics, losses, count = {}, [], len(batches)
        for batch in batches:
            step = make_step(
                stage,
                teacher,
                student,
                student.kernel_ffns(),
                batch,
                backward=lambda loss, count=count: (loss / count).backward(),
                batches=batches,
                statistics=statistics,
            )
            losses.append(accumulate_gradients(OBJECTIVES[name], step).item())
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in student.named_parameters()
            if parameter.grad is not None
        }
        found.append((sum(losses) / len(losses), gradients))
    (loss, gradients), (other_loss, others) = found
    assert other_loss == pytest.approx(loss, rel=1e-9)
    assert gradients.keys() == others.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-7, atol=1e-12)


def test_a_run_of_several_batches_a_step_is_one_of_large_batches(recipe, tmp_path):
    def stages(**changes):
        return [{**stage, "optimizer": "adamw", **changes} for stage in (LAYER_WISE, LOGITS)]

    large = run(recipe(tmp_path / "large", stages=stages(batch_size=4)))
    small = run(
        recipe(
            tmp_path / "small",
            stages=stages(batch_size=2, gradient_accumulation_steps=2),
        )
    )
    lines, others = lines_of(large), lines_of(small)
    assert [line["tokens"] for line in others] == [line["tokens"] for line in lines]
    assert len(lines) == STEPS  # half of the steps in each stage, each of twice the tokens
    for line, other in zip(lines, others, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
    one, two = (load_file(out / "model.safetensors") for out in (large, small))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("at", [5, 13])
def test_a_run_of_several_batches_a_step_resumes_bit_equal(recipe, monkeypatch, tmp_path, at):
    sparse = {"kernel_ffn": {"simplex": "threshold", "top_k": 6}}
    stages = [
        {**stage, "batch_size": 1, "gradient_accumulation_steps": 2, "write_mass": 0.01}
        for stage in (LAYER_WISE, LOGITS)
    ]
    whole = run(recipe(tmp_path / "whole", stages=stages, **sparse))
    same = recipe(tmp_path / "out", stages=stages, **sparse)
    assert interrupt(monkeypatch, same, at).__class__ is Interrupted
    run(same, resume=True)
    assert_same_files(tmp_path / "out", whole)
