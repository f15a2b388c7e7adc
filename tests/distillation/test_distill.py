"""Distillation: what is minimised, what is left alone, and that a run may be interrupted."""

import copy
import dataclasses
import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from teachers import RECIPES
from training_runs import (
    LAYER_WISE,
    LOGITS,
    STEPS,
    Interrupted,
    assert_same_files,
    interrupt,
    load,
    make_step,
    run,
)
from transformers import AutoModelForCausalLM

from hf_kernel_ffn import InputError, KernelFFNConfig, convert, evaluate_student
from hf_kernel_ffn.distillation import Recipe
from hf_kernel_ffn.distillation import run as loop_module
from hf_kernel_ffn.distillation import state as state_module
from hf_kernel_ffn.distillation.objectives import OBJECTIVES, layer_wise, logits
from hf_kernel_ffn.distillation.recipe import Stage
from hf_kernel_ffn.distillation.step import accumulate_gradients
from hf_kernel_ffn.text.packing import read_token_ids

LORA = {"rank": 2, "alpha": 4, "dropout": 0.5}


VARIANTS = {
    "plain": {},
    "adamw": {"stages": [{**LAYER_WISE, "optimizer": "adamw"}, {**LOGITS, "optimizer": "adamw"}]},
    "groups": {"stages": [{**LAYER_WISE, "layers_at_once": 2}]},  # of three layers: two groups
    "lora": {"lora": LORA, "stages": [LOGITS, LOGITS]},
    "bfloat16": {"dtype": "bfloat16"},
    "gated": {
        "kernel_ffn": {
            "values": "gated",
            "simplex": "entmax-1.5",
            "intensity": "gate",
            "layers": "0,2",
        }
    },
    "student": {},
}


@pytest.fixture(scope="module")
def short_text(text_file, tmp_path_factory):
    """About forty sequences of 32 tokens: a run reads it more than once when it is long."""
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text(text_file.read_text(encoding="utf-8")[:4500], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def student_folder(teacher_folder, ids, tmp_path_factory):
    """A converted tiny Llama, saved."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder("llama"), dtype=torch.float32)
    folder = tmp_path_factory.mktemp("student")
    convert(teacher, KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256)[
        0
    ].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(teacher_folder, short_text, student_folder):
    """A recipe for a tiny teacher, with changes."""

    def make(out, variant="plain", family="llama", **changes):
        content = {
            "teacher": str(teacher_folder(family)),
            "student": str(student_folder) if variant == "student" else None,
            "kernel_ffn": {"rows": "free"},
            "data": {"train": str(short_text), "sequence_length": 32, "shuffle_buffer": 16},
            "stages": [LAYER_WISE, LOGITS],
            "output_dir": str(out),
            "calibration_tokens": 256,
            "save_every_tokens": 128,  # two steps
        }
        return Recipe(**{**content, **VARIANTS[variant], **changes})

    return make


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """The folder of an uninterrupted run of a variant; each is run once."""
    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = run(recipe(tmp_path_factory.mktemp(variant) / "out", variant))
        return made[variant]

    return get


@pytest.fixture
def objectives(monkeypatch):
    """Have every call of an objective go through ``wrap(number from 0, objective, step)``."""

    def through(wrap):
        count = iter(range(10**6))
        for name, objective in list(OBJECTIVES.items()):
            monkeypatch.setitem(
                OBJECTIVES,
                name,
                lambda step, objective=objective: wrap(next(count), objective, step),
            )

    yield through


# the objectives


def stage(**changes):
    return Stage(**{**LOGITS, **changes})


@pytest.fixture
def pair(teacher, ids):
    """A teacher and a student, everything in both trainable."""
    student, _ = convert(
        teacher,
        KernelFFNConfig(),
        layers="0,2",
        calibration_ids=ids,
        calibration_tokens=256,
        copy=True,
    )
    own = copy.deepcopy(teacher).requires_grad_(True)
    return own, student.requires_grad_(True)


def gradients(model):
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }


def fvu_of(ffn, stock, x):
    """Fraction of variance unexplained at ``x``, by its definition."""
    truth, estimate = stock(x).detach().flatten(0, -2), ffn(x).flatten(0, -2)
    return (estimate - truth).square().sum() / (truth - truth.mean(0)).square().sum()


def test_the_layer_wise_loss_is_the_unexplained_variance(pair, ids):
    teacher, student = pair
    ffns = student.kernel_ffns()
    found = layer_wise(
        make_step(
            stage(name="layer-wise"), teacher, student, ffns, ids, backward=torch.Tensor.backward
        )
    )
    assert not found.requires_grad
    mine, trained = gradients(student), {f"{path}." for path in ffns}
    assert not gradients(teacher)
    assert mine and all(any(path in name for path in trained) for name in mine)
    student.zero_grad()
    losses = []
    for path, ffn in ffns.items():
        seen = []
        stock = teacher.base_model.get_submodule(path)
        hook = stock.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].detach())
        )
        with torch.no_grad():
            teacher(ids)
        hook.remove()
        losses.append(fvu_of(ffn, stock, seen[0]))
        losses[-1].backward()
    assert found.item() == pytest.approx(
        sum(loss.item() for loss in losses) / len(losses), rel=1e-4
    )
    assert found.item() > 0.001
    expected = gradients(student)
    assert mine.keys() == expected.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


class OneTarget:
    """A teacher of one FFN that reads ``inputs`` and writes ``outputs``."""

    def __init__(self, inputs, outputs):
        self.seen = inputs, outputs

    def watch_ffns(self, batch, paths, see):
        see(paths[0], *self.seen)


def test_the_layer_wise_loss_is_not_that_of_a_spike(pair, ids):
    """What the ordinary tokens are off by weighs as much beside a spike that is met."""
    _, student = pair
    path, ffn = next(iter(student.kernel_ffns().items()))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, ffn.config.hidden_size, generator=generator)
    written = ffn(inputs).detach()
    targets = written + 0.3 * written.norm(dim=-1).median() / 8 * torch.randn(
        written.shape, generator=generator
    )
    spiky = targets.clone()
    spiky[0] = 1000 * targets[0]

    def measure(outputs, first=1.0):
        predicted = ffn.forward
        ffn.forward = lambda x: torch.cat([first * outputs[:1], predicted(x)[1:]])
        try:
            step = make_step(stage(name="layer-wise"), student, student, {path: ffn}, ids)
            signal = OneTarget(inputs, outputs)
            return layer_wise(dataclasses.replace(step, signal=signal, backward=None)).item()
        finally:
            del ffn.forward

    plain = measure(targets)
    assert plain > 0.01
    assert plain / 6 < measure(spiky) < plain  # a spike counts as a token ten times as long
    assert measure(spiky, first=0.9) < plain + 0.05  # and what it is off by is scaled down with it


def test_the_layer_wise_loss_trains_only_the_layers_it_is_given(pair, ids):
    teacher, student = pair
    [first, *_] = student.kernel_ffns()
    only = {first: student.kernel_ffns()[first]}
    layer_wise(
        make_step(
            stage(name="layer-wise"), teacher, student, only, ids, backward=torch.Tensor.backward
        )
    )
    assert gradients(student) and all(first in name for name in gradients(student))


@pytest.mark.parametrize("temperature, weight", [(1.0, 0.0), (2.0, 0.0), (1.0, 0.5), (3.0, 0.25)])
def test_the_logits_loss_is_divergence_and_cross_entropy(pair, ids, temperature, weight):
    teacher, student = pair
    settings = stage(temperature=temperature, cross_entropy=weight)
    ffns, backward = student.kernel_ffns(), torch.Tensor.backward
    found = accumulate_gradients(
        logits, make_step(settings, teacher, student, ffns, ids, backward=backward)
    )
    with torch.no_grad():
        p, q = (
            (model(ids).logits.double() / temperature).log_softmax(-1)
            for model in (teacher, student)
        )
        own_loss = student(ids, labels=ids).loss.item()
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    assert found.item() == pytest.approx(temperature**2 * divergence + weight * own_loss, rel=1e-4)
    assert not gradients(teacher) and gradients(student)


# a run


@pytest.mark.parametrize("variant", ["plain", "adamw", "gated", "bfloat16"])
def test_each_stage_lowers_its_loss(recipe, objectives, tmp_path, variant):
    losses = {"layer-wise": [], "logits": []}

    def note(number, objective, step):
        loss = objective(step)
        losses[step.stage.name].append(loss.detach())
        return loss

    objectives(note)
    stages = VARIANTS[variant].get("stages", [LAYER_WISE, LOGITS])
    run(
        recipe(
            tmp_path / "out",
            variant,
            stages=[{**stage, "tokens": 2560} for stage in stages],
            save_every_tokens=10**6,
        )
    )
    for name, values in losses.items():
        assert len(values) == 40
        assert sum(values[-10:]) < 0.95 * sum(values[:10]), name


def test_a_trained_teacher_is_approached_on_every_layer(tmp_path, tokenizer, ids, run_elsewhere):
    shipped, text = RECIPES / "teachers" / "llama", RECIPES / "text"
    common = {
        "teacher": str(shipped),
        "kernel_ffn": {"rows": "free"},
        "data": {
            "train": str(text / "books-distil.txt"),
            "sequence_length": 128,
            "shuffle_buffer": 32,
        },
        "calibration_tokens": 512,
    }
    one, layer_wise, logits = (
        {**stage, "learning_rate": rate, "batch_size": 4, "tokens": tokens}
        for stage, rate, tokens in (
            (LAYER_WISE, 1e-12, 1),
            (LAYER_WISE, 0.002, 4096),
            (LOGITS, 0.002, 2048),
        )
    )
    before = {path.name: path.read_bytes() for path in shipped.iterdir()}
    start, middle, end = tmp_path / "start", tmp_path / "middle", tmp_path / "end"
    run(Recipe(**common, stages=[one], output_dir=str(start)))
    run(Recipe(**common, stages=[layer_wise], student=str(start), output_dir=str(middle)))
    run(Recipe(**common, stages=[logits], student=str(middle), output_dir=str(end)))
    assert {path.name: path.read_bytes() for path in shipped.iterdir()} == before
    held_out = read_token_ids(tokenizer, [str(text / "books-test.txt")], 128, 1024)
    teacher = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
    reports = [evaluate_student(load(folder), teacher, held_out) for folder in (start, middle, end)]
    for earlier, later in zip(reports[0]["layers"], reports[1]["layers"]):
        assert later["fvu"] < earlier["fvu"]
    assert reports[2]["kl"] < reports[1]["kl"] < reports[0]["kl"]
    expected = load(end, dtype=torch.bfloat16)  # as it is stored
    results, errors = run_elsewhere(
        [{"name": "distilled", "auto": "AutoModelForCausalLM", "folder": str(end)}], ids, tmp_path
    )
    assert not errors
    with torch.no_grad():
        assert torch.equal(results["distilled"], expected(ids).logits)


@pytest.mark.parametrize("tokens, steps", [(1, 1), (64, 1), (65, 2), (384, 6)])
def test_the_budget_is_rounded_up_to_whole_steps(recipe, objectives, tmp_path, tokens, steps):
    shapes = []

    def note(number, objective, step):
        shapes.append(tuple(step.batch.shape))
        return objective(step)

    objectives(note)
    run(recipe(tmp_path / "out", stages=[{**LOGITS, "tokens": tokens}]))
    assert shapes == [(2, 32)] * steps


def test_one_group_of_layers_after_the_other(recipe, objectives, tmp_path):
    seen, states = [], []

    def note(number, objective, step):
        seen.append(tuple(step.ffns))
        states.append({name: p.detach().clone() for name, p in step.student.named_parameters()})
        return objective(step)

    objectives(note)
    run(recipe(tmp_path / "out", "groups"))
    first, second = ("layers.0.mlp", "layers.1.mlp"), ("layers.2.mlp",)
    assert seen == [first] * STEPS + [second] * STEPS  # each with the whole budget

    def changed(before, after):
        return {
            name.removeprefix("model.").rpartition(".mlp.")[0] + ".mlp"
            for name, value in after.items()
            if not torch.equal(value, before[name])
        }

    assert changed(states[0], states[STEPS]) == set(first)
    assert changed(states[STEPS], states[-1]) == set(second)


@pytest.mark.parametrize(
    "variant, family", [("plain", "llama"), ("plain", "gpt2"), ("lora", "llama"), ("lora", "gpt2")]
)
def test_the_teachers_memory_is_left_alone(recipe, monkeypatch, tmp_path, variant, family):
    kept = []

    def load_teacher(*arguments):
        model = original(*arguments)
        kept.append((model, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        return model

    original = loop_module.load_teacher
    monkeypatch.setattr(loop_module, "load_teacher", load_teacher)
    run(recipe(tmp_path / "out", variant, family))
    [(teacher, before)] = kept
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.fixture
def two_processes(tmp_path):
    """Run a recipe on two processes, as `accelerate launch` and torchrun do."""

    def launch(recipe):
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe.model_dump_json())  # JSON is YAML
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
        ]
        script = RECIPES.parent / "scripts" / "distill.py"
        environment = dict(os.environ, ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1")
        done = subprocess.run(
            [*launcher, script, file],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return loop_module.Path(recipe.output_dir)

    return launch


def test_two_processes_share_the_work_of_one(
    recipe, finished, two_processes, student_folder, tmp_path
):
    halves = [{**stage, "batch_size": 1} for stage in (LAYER_WISE, LOGITS)]
    one, two = (
        finished("student"),
        two_processes(recipe(tmp_path / "two", "student", stages=halves)),
    )
    start, one, two = (
        load_file(folder / "model.safetensors") for folder in (student_folder, one, two)
    )
    for name in start:
        if name.endswith("prototypes.weight"):
            way = (one[name] - start[name]).norm()
            assert (
                0 < (two[name] - one[name]).norm() < 0.3 * way
            )  # the variance in a loss is that of one process's sequences


def test_only_the_ffns_are_trained(finished, teacher_folder):
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (teacher_folder("llama"), finished("plain"))
    )
    shared = [name for name in before if ".mlp." not in name]
    assert shared and all(torch.equal(after[name], before[name]) for name in shared)


def test_what_is_trained_shares_memory_and_is_float32(recipe, objectives, tmp_path):
    def look(number, objective, step):
        theirs = {p.data_ptr() for p in step.signal.teacher.parameters()}
        for name, parameter in step.student.named_parameters():
            if ".mlp." in name:
                assert parameter.dtype == torch.float32
            else:
                assert parameter.dtype == torch.bfloat16 and parameter.data_ptr() in theirs
        return objective(step)

    objectives(look)
    run(recipe(tmp_path / "out", "bfloat16"))


def test_the_finished_folder(finished, recipe):
    out = finished("plain")
    assert not [path for path in out.iterdir() if path.is_dir()]
    assert json.loads((out / "recipe.json").read_text()) == json.loads(
        recipe(out).model_dump_json()
    )
    assert (out / "tokenizer.json").is_file()
    converted = load(out)
    assert len(converted.kernel_ffns()) == 3
    for ffn in converted.kernel_ffns().values():  # the prototypes still know their units
        assert Counter(ffn.units.tolist()) == Counter([*range(1, 49), *range(-48, 0)])


def test_the_same_recipe_gives_the_same_weights(finished, recipe, tmp_path):
    random.seed(0)
    torch.manual_seed(0)
    assert_same_files(run(recipe(tmp_path / "out")), finished("plain"))
    other = load_file(run(recipe(tmp_path / "other", seed=1)) / "model.safetensors")
    one = load_file(finished("plain") / "model.safetensors")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_student_goes_on_from_its_folder(
    recipe, student_folder, teacher_folder, tmp_path, text_file, tokenizer
):
    longer = {**LAYER_WISE, "tokens": 2560}
    out = run(recipe(tmp_path / "out", "student", stages=[longer]))
    text = read_token_ids(tokenizer, [str(text_file)], 32, 1024)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder("llama"), dtype=torch.float32)
    before, after = (
        evaluate_student(load(folder), teacher, text) for folder in (student_folder, out)
    )
    for earlier, later in zip(before["layers"], after["layers"]):
        assert later["fvu"] < earlier["fvu"]
    still = run(
        recipe(
            tmp_path / "still",
            "student",
            stages=[{**LAYER_WISE, "tokens": 1, "learning_rate": 1e-12}],
        )
    )
    one, other = (load_file(folder / "model.safetensors") for folder in (student_folder, still))
    assert all(
        torch.allclose(one[name], other[name]) for name in one
    )  # from there, not from a conversion of its own


def test_bfloat16_is_the_computations_not_the_weights(finished):
    out, exact = finished("bfloat16"), finished("plain")
    one, other = (load_file(folder / "model.safetensors") for folder in (out, exact))
    assert {tensor.dtype for name, tensor in one.items() if not name.endswith("units")} == {
        torch.float32
    }  # the teacher's
    name = "model.layers.1.mlp.output_prototypes.weight"
    assert not torch.equal(one[name], one[name].bfloat16().float())
    assert (one[name] - other[name]).norm() < 0.2 * other[name].norm()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_trains_the_rest_and_is_merged(recipe, teacher_folder, tmp_path, family, ids):
    out = run(recipe(tmp_path / "out", "lora", family))
    before, after = (
        load_file(folder / "model.safetensors") for folder in (teacher_folder(family), out)
    )
    attention = [name for name in before if "attn" in name and name.endswith("weight")]
    assert attention and all(not torch.equal(after[name], before[name]) for name in attention)
    for name in attention:
        assert 1 <= torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) <= 2
    rest = [name for name in before if ".mlp." not in name and name not in attention]
    assert all(torch.equal(after[name], before[name]) for name in rest)
    assert not [name for name in after if "lora" in name or "base_layer" in name]
    with torch.no_grad():
        assert torch.isfinite(load(out)(ids).logits).all()


def test_gradient_checkpointing_recomputes_and_changes_nothing(recipe, objectives, tmp_path):
    calls, outs, hooks = [], [], []

    def forward(module, arguments):
        calls[-1] += 1

    def count(number, objective, step):
        if number % STEPS == 0:  # another run, of other layers
            hooks.extend(ffn.register_forward_pre_hook(forward) for ffn in step.ffns.values())
        calls.append(0)  # until the next call: the backward pass comes after this one
        return objective(step)

    objectives(count)
    for name, checkpointing in (("a", False), ("b", True)):
        outs.append(
            run(recipe(tmp_path / name, stages=[LOGITS], gradient_checkpointing=checkpointing))
        )
    assert (
        calls == [3] * STEPS + [6] * STEPS
    )  # each of the three FFNs once more, in the backward pass
    tensors, others = (load_file(out / "model.safetensors") for out in outs)
    assert all(
        torch.allclose(tensors[name], others[name], rtol=1e-3, atol=1e-5) for name in tensors
    )


# interruptions: two steps between saves, six steps to a stage


@pytest.mark.parametrize(
    "variant, at",
    [
        ("plain", 2),  # a state has just been saved
        ("plain", 3),  # a step is lost
        ("plain", STEPS),  # between the stages
        ("plain", STEPS + 3),
        ("plain", 2 * STEPS - 1),
        ("adamw", 3),
        ("adamw", STEPS + 3),
        ("groups", 3),
        ("groups", STEPS),
        ("groups", STEPS + 5),
        ("lora", 3),
        ("lora", STEPS),
        ("lora", STEPS + 3),
        ("bfloat16", 3),
        ("bfloat16", STEPS + 3),
        ("gated", 5),
        ("gated", STEPS + 2),
        ("student", 3),
        ("student", STEPS + 3),
    ],
)
def test_a_resumed_run_ends_bit_equal(recipe, finished, monkeypatch, tmp_path, variant, at):
    same = recipe(tmp_path / "out", variant)
    interrupt(monkeypatch, same, at)
    run(same, resume=True)
    assert_same_files(tmp_path / "out", finished(variant))


def test_a_run_may_be_interrupted_twice(recipe, finished, monkeypatch, tmp_path, objectives):
    same, calls = recipe(tmp_path / "out"), []
    interrupt(monkeypatch, same, 3)

    def stop(number, objective, step):
        calls.append(number)
        if number == 5:
            raise Interrupted
        return objective(step)

    objectives(stop)
    with pytest.raises(Interrupted):
        run(same, resume=True)
    run(same, resume=True)
    assert (
        len(calls) == 6 + 2 * STEPS - 6
    )  # resumed at steps 2 and 6: nothing is done again but what was lost
    assert_same_files(tmp_path / "out", finished("plain"))


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_other_families_resume_too(recipe, monkeypatch, tmp_path, family):
    whole = run(recipe(tmp_path / "whole", family=family))
    same = recipe(tmp_path / "out", family=family)
    interrupt(monkeypatch, same, STEPS + 3)
    run(same, resume=True)
    assert_same_files(tmp_path / "out", whole)


@pytest.mark.parametrize("rename", [1, 2, 3, 4])
def test_killed_while_saving(recipe, finished, monkeypatch, tmp_path, rename):
    """The state is replaced by renaming: the first one by one rename, the next by two."""
    same, count, original = recipe(tmp_path / "out"), iter(range(1, 10**6)), state_module.os.rename

    def killed(*arguments):
        if next(count) == rename:
            raise Interrupted
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(state_module.os, "rename", killed)
        with pytest.raises(Interrupted):
            run(same)
    if rename == 1:
        with pytest.raises(InputError, match="no state to resume from"):
            run(same, resume=True)
    else:
        run(same, resume=True)
        assert_same_files(tmp_path / "out", finished("plain"))


@pytest.mark.parametrize("move", [0, 3])
def test_killed_while_finishing(recipe, finished, monkeypatch, tmp_path, move):
    same, original, moved = recipe(tmp_path / "out"), loop_module.os.replace, []

    def killed(source, target):
        if loop_module.Path(target).parent == tmp_path / "out":
            if len(moved) == move:
                raise Interrupted
            moved.append(target)
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.os, "replace", killed)
        with pytest.raises(Interrupted):
            run(same)
    assert (
        len(moved) == move and not (tmp_path / "out" / "config.json").exists()
    )  # nothing that would load
    run(same, resume=True)
    assert_same_files(tmp_path / "out", finished("plain"))


def test_an_interrupted_folder_is_not_started_anew(recipe, monkeypatch, tmp_path):
    same = recipe(tmp_path / "out")
    interrupt(monkeypatch, same, 3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(InputError, match="--resume"):
        run(same)
    for changes in (
        {"seed": 1},
        {"stages": [LAYER_WISE]},
        {"lora": LORA},
        {"kernel_ffn": {"kernel": "yat"}},
    ):
        [key] = changes
        with pytest.raises(InputError, match=f"found {key} = .*same recipe"):
            run(recipe(tmp_path / "out", **changes), resume=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_there_has_to_be_something_to_resume_from(recipe, finished, tmp_path):
    with pytest.raises(InputError, match="no state to resume from"):
        run(recipe(tmp_path / "out"), resume=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no state to resume from"):
        run(recipe(finished("plain")), resume=True)
    with pytest.raises(InputError, match="not empty"):
        run(recipe(finished("plain")))


@pytest.mark.parametrize("at, name, step", [(3, "layer-wise", 3), (STEPS + 2, "logits", 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(
    recipe, finished, monkeypatch, tmp_path, at, name, step, value
):
    same = recipe(tmp_path / "out")
    message = str(interrupt(monkeypatch, same, at, value))
    assert str(value) in message and f"step {step} of stage {name!r}" in message
    run(same, resume=True)  # the state is from before
    assert_same_files(tmp_path / "out", finished("plain"))


def test_what_the_message_advises_can_be_done(recipe, tmp_path):
    wild = {**LAYER_WISE, "learning_rate": 1e30}
    with pytest.raises(FloatingPointError, match="lower its learning_rate") as caught:
        run(recipe(tmp_path / "out", stages=[wild]))
    assert "--resume" not in str(caught.value)  # that is refused with another learning_rate


def test_weights_that_are_not_finite_are_never_saved(recipe, objectives, tmp_path):
    def spoil(number, objective, step):
        loss = objective(step)
        if (
            number == STEPS - 1
        ):  # a finite loss with a gradient that is not, at the last step of all
            next(iter(step.ffns.values())).output_prototypes.weight.grad.fill_(float("nan"))
        return loss

    objectives(spoil)
    with pytest.raises(FloatingPointError):
        run(recipe(tmp_path / "out", stages=[LAYER_WISE]))
    assert not (tmp_path / "out" / "config.json").exists()


def test_kernel_settings_are_the_recipes(recipe, tmp_path):
    settings = {
        "kernel": "gaussian",
        "simplex": "sparsemax",
        "intensity": "none",
        "init": "single",
        "layers": [1],
    }
    out = run(recipe(tmp_path / "out", kernel_ffn=settings, stages=[{**LAYER_WISE, "tokens": 64}]))
    [(path, layer)] = load(out).config.kernel_ffn_layers().items()
    assert path == "layers.1.mlp"
    assert {key: getattr(layer.settings, key) for key in settings if key != "layers"} == {
        key: value for key, value in settings.items() if key != "layers"
    }
