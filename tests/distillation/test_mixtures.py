"""Mixtures of experts: an expert may get no token in a batch, in one process or in all of them."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from teachers import SUPPORT
from tiny_families import tiny
from training_runs import load, make_step, move_away, run

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.cli.tables import print_report
from hf_kernel_ffn.distillation import Recipe
from hf_kernel_ffn.distillation import trainer as trainer_module
from hf_kernel_ffn.distillation.metrics import METRICS
from hf_kernel_ffn.distillation.objectives import OBJECTIVES, layer_wise
from hf_kernel_ffn.distillation.recipe import Stage
from hf_kernel_ffn.distillation.teacher_signal import RunningTeacher
from hf_kernel_ffn.evaluation.accumulators import FFNAccumulator
from hf_kernel_ffn.evaluation.report import evaluate_student

EXPERTS = 6
LENGTH = 6  # tokens of a sequence, few enough for an expert to be given none
STEPS = 3


@pytest.fixture(scope="module")
def teacher():
    """Two layers of six experts, of which a token goes to one."""
    shape = {"num_local_experts": EXPERTS, "num_experts_per_tok": 1}
    vocabulary = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return tiny("mixtral", "AutoModelForCausalLM", **shape, **vocabulary)


@pytest.fixture(scope="module", params=["free", "tied"])
def content(request, teacher, tokenizer, text_file, tmp_path_factory):
    """A recipe for it, without output_dir, batch sizes and shard."""
    folder = tmp_path_factory.mktemp("mixture")
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    free = request.param == "free"
    settings = KernelFFNConfig(init="single") if free else KernelFFNConfig(rows="tied")
    student, _ = convert(teacher, settings, calibration_tokens=0)
    if not free:
        move_away(student)
    student.save_pretrained(folder / "student")
    stage = {"tokens": STEPS * 2 * LENGTH, "learning_rate": 0.002, "optimizer": "adamw"}
    return {
        "teacher": str(folder / "teacher"),
        "student": str(folder / "student"),
        "data": {"train": str(text_file), "sequence_length": LENGTH, "shuffle_buffer": 16},
        "stages": [
            {**stage, "name": "layer-wise", "write_mass": 0.01},
            {**stage, "name": "logits", "write_mass": 0.01, "cross_entropy": 0.5},
        ],
        "save_every_tokens": 2 * LENGTH,
    }


def with_batches_of(content, size):
    stages = [{**stage, "batch_size": size} for stage in content["stages"]]
    return {**content, "stages": stages}


def test_a_mixture_is_distilled_by_both_stages(content, tmp_path):
    idle, original = [], RunningTeacher.watch_ffns

    def noted(self, batch, paths, see):
        def seen(path, inputs, outputs):
            idle.append(len(inputs) == 0)
            see(path, inputs, outputs)

        original(self, batch, paths, seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningTeacher, "watch_ffns", noted)
        out = run(Recipe(**with_batches_of(content, 2), output_dir=str(tmp_path / "out")))
    assert len(idle) == STEPS * 2 * EXPERTS and any(idle) and not all(idle)
    losses = [json.loads(line)["loss"] for line in (out / METRICS).read_text().splitlines()]
    assert len(losses) == 2 * STEPS and all(loss > 0 for loss in losses)
    assert len(load(out).kernel_ffns()) == 2 * EXPERTS


def test_an_expert_without_tokens_is_left_alone(teacher):
    student, _ = convert(teacher, calibration_tokens=0, copy=True)
    ffns = student.kernel_ffns()
    stage = Stage(name="layer-wise", tokens=1, learning_rate=1)
    batch = torch.randint(3, 300, (1, 4), generator=torch.Generator().manual_seed(0))
    loss = layer_wise(
        make_step(stage, teacher, student, ffns, batch, backward=torch.Tensor.backward)
    )
    has_gradient = [
        any(parameter.grad is not None for parameter in ffn.parameters()) for ffn in ffns.values()
    ]
    assert torch.isfinite(loss) and 2 <= sum(has_gradient) <= 8  # four tokens in two layers


def test_thresholds_of_experts_follow_their_tokens(content, tmp_path):
    sparse = {"simplex": "threshold", "top_k": 6, "init": "single"}
    changed = {**with_batches_of(content, 2), "student": None, "kernel_ffn": sparse}
    changed["calibration_tokens"] = 2048  # every expert has to get some
    out = run(Recipe(**changed, output_dir=str(tmp_path / "out")))
    moved = [ffn.threshold_log_ratio != 0 for ffn in load(out).kernel_ffns().values()]
    assert any(moved)


def test_a_bad_loss_of_a_mixture_names_the_expert(content, monkeypatch, tmp_path):
    original = layer_wise

    def spoil(step):
        loss = original(step)
        list(step.ffns.values())[3].input_prototypes.weight.data[0, 0] = float("inf")
        return loss * float("nan")

    monkeypatch.setitem(OBJECTIVES, "layer-wise", spoil)
    with pytest.raises(FloatingPointError, match=r"first in layers\.0\.mlp\.experts\.3"):
        run(Recipe(**with_batches_of(content, 2), output_dir=str(tmp_path / "out")))


def test_several_batches_count_experts_by_their_tokens(teacher, ids):
    teacher = copy.deepcopy(teacher).double()
    teacher.set_experts_implementation("eager")  # the only one in float64
    student, _ = convert(teacher, calibration_tokens=0, copy=True)
    ffns = student.kernel_ffns()
    stage = Stage(name="layer-wise", tokens=1, learning_rate=1)
    batch, found = ids[:4, :LENGTH], []
    for batches in ([batch], list(batch.split(1))):
        student.zero_grad()
        statistics, count = {}, len(batches)
        for part in batches:
            layer_wise(
                make_step(
                    stage,
                    teacher,
                    student,
                    ffns,
                    part,
                    backward=lambda loss, count=count: (loss / count).backward(),
                    batches=batches,
                    statistics=statistics,
                )
            )
        found.append(
            {
                name: parameter.grad.clone()
                for name, parameter in student.named_parameters()
                if parameter.grad is not None
            }
        )
    one, other = found
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-7, atol=1e-12)


def test_sharding_a_mixture_is_refused(content, monkeypatch, tmp_path):
    monkeypatch.setattr(
        trainer_module.Accelerator, "num_processes", property(lambda self: 2), raising=False
    )
    changed = with_batches_of(content, 1)
    with pytest.raises(InputError, match="shard: true for a mixture of experts"):
        run(Recipe(**changed, output_dir=str(tmp_path / "out"), shard=True))


def losses_on(processes, content, scratch):
    """Losses on that many ``processes``, and the folder of the trained student."""
    scratch.mkdir()
    size = 2 // processes
    job = {**with_batches_of(content, size), "output_dir": str(scratch / "out")}
    work = {
        "jobs": [{"name": "whole", "dtype": "float32", "content": job}],
        "calibrates": False,
        "out": str(scratch / "losses.json"),
    }
    (scratch / "work.json").write_text(json.dumps(work))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = dict(os.environ, ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [*command, SUPPORT / "processes.py", scratch / "work.json"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((scratch / "losses.json").read_text()), scratch / "out" / "done"


@pytest.mark.distributed
def test_two_processes_train_a_mixture_as_one_does(content, tmp_path):
    """Each of them has experts without tokens that the other gives some to."""
    one, alone = losses_on(1, content, tmp_path / "one")
    two, together = losses_on(2, content, tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["whole"] == pytest.approx(one["whole"], rel=1e-4)
    begun, mine, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (Path(content["student"]), alone, together)
    )
    for name, tensor in mine.items():
        if name.endswith("prototypes.weight"):
            way = (tensor - begun[name]).norm()
            assert (theirs[name] - tensor).norm() <= 0.05 * way, name


@pytest.mark.parametrize("rows", ["free", "tied"])
def test_experts_without_tokens_are_calibrated_and_evaluated_with_the_others(teacher, rows):
    """Of eight tokens in two rows, few come to each of twelve experts, to some none or one."""
    settings = KernelFFNConfig(init="single") if rows == "free" else KernelFFNConfig(rows="tied")
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(3, 300, (2, 4), generator=generator)
    student, _ = convert(teacher, settings, calibration_tokens=0, copy=True)
    report = evaluate_student(student, teacher, few, batch_tokens=4)
    json.dumps(report, allow_nan=False)  # without NaN or infinity
    layers = report["layers"]
    assert [layer["path"] for layer in layers] == list(student.kernel_ffns())
    idle = [layer for layer in layers if layer["coherence"] is None]
    assert 0 < len(idle) < len(layers)
    for layer in idle:
        assert layer["fvu"] is None and layer["teacher"]["coherence"] is None
    print_report(report)

    text = torch.randint(3, 40, (16, 16), generator=generator)  # few words, for few experts
    _, report = convert(teacher, settings, calibration_ids=text, calibration_tokens=256, copy=True)
    figures = [layer["fvu"] for layer in report.layers.values()]
    assert any(figure is None for figure in figures) and not all(
        figure is None for figure in figures
    )


def test_a_mixture_of_which_no_expert_reads_is_refused(teacher, monkeypatch):
    student, _ = convert(teacher, calibration_tokens=0, copy=True)
    monkeypatch.setattr(FFNAccumulator, "is_empty", lambda self: True)
    with pytest.raises(InputError, match="no token of the text that comes to"):
        evaluate_student(student, teacher, torch.ones(2, 4, dtype=torch.int64))
