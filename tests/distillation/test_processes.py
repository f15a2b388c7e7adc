"""More than one process: the same losses as one, states and models that load anywhere, and what
ships for larger machines."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from teachers import RECIPES, SUPPORT
from training_runs import move_away
from transformers import AutoModelForCausalLM

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.distillation import load_recipe

SCRIPT = SUPPORT / "processes.py"
STAGE = {"tokens": 512, "learning_rate": 0.002, "optimizer": "adamw", "weight_decay": 0.01}
STEPS = 4  # of each stage: 512 tokens, four sequences of 32 in a step


@pytest.fixture(scope="module", params=["free", "tied"])
def content(request, teacher_folder, text_file, tmp_path_factory, ids):
    """A recipe for a dense student with every term in its losses, without batch size and
    output_dir. (A threshold is fitted to a sample of each process's tokens and averaged: nearly,
    not exactly, that of one process.)"""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder("llama"), dtype=torch.float32)
    folder = tmp_path_factory.mktemp("student")
    settings = KernelFFNConfig() if request.param == "free" else KernelFFNConfig(rows="tied")
    student, _ = convert(teacher, settings, calibration_ids=ids, calibration_tokens=256)
    if request.param == "tied":
        move_away(student)
    student.save_pretrained(folder)
    stages = [
        {"name": "layer-wise", **STAGE, "write_mass": 0.01},
        {"name": "logits", **STAGE, "cross_entropy": 0.5},
    ]
    return {
        "teacher": str(teacher_folder("llama")),
        "student": str(folder),
        "data": {"train": str(text_file), "sequence_length": 32, "shuffle_buffer": 16},
        "stages": stages,
        "save_every_tokens": 128,
    }


def of(content, out, processes=1, optimizer="adamw", stage_changes=(), **changes):
    stages = [
        {
            **stage,
            "batch_size": 4 // processes,
            "optimizer": optimizer,
            **dict(stage_changes),
        }
        for stage in content["stages"]
    ]
    return {**content, "stages": stages, "output_dir": str(out), **changes}


def start(work, processes, scratch):
    """Losses by job name, from a fresh interpreter on that many processes."""
    file = scratch / "work.json"
    file.write_text(json.dumps({**work, "out": str(scratch / "losses.json")}))
    command = [sys.executable, SCRIPT, file]
    if processes > 1:
        # "--cpu" alone would start one process; "multi_gpu" means torchrun, and
        # ACCELERATE_USE_CPU gloo
        launch = [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
        ]
        command = [
            sys.executable,
            *launch,
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            SCRIPT,
            file,
        ]
    environment = dict(os.environ, ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1")
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((scratch / "losses.json").read_text())


def jobs(content, scratch, processes, shard):
    """The same runs for every layout: to the end, in parts, and in float32 with Muon."""

    def job(name, dtype="float64", out=None, until=None, **changes):
        made = of(content, scratch / (out or name), processes, shard=shard, **changes)
        return {"name": name, "dtype": dtype, "until": until, "content": made}

    accumulating = {
        "batch_size": 2 // processes,
        "gradient_accumulation_steps": 2,
        "write_mass": 0.0,  # its price is of each batch by itself
    }
    every = [
        job("whole"),
        job("float32", "float32"),
        job("muon", "float32", optimizer="muon"),
        job("part", out="parts", until=STEPS + 2),
        job("rest", out="parts"),
        job("left", out="left", until=2),  # to be gone on with by another number of processes
        job("accumulated", stage_changes=accumulating),
    ]
    return {"jobs": every}


@pytest.fixture(scope="module")
def one(content, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("one")
    return start(jobs(content, scratch, 1, False), 1, scratch), scratch


@pytest.fixture(scope="module", params=[False, True], ids=["DDP", "FSDP2"])
def two(request, content, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("two")
    return start(jobs(content, scratch, 2, request.param), 2, scratch), scratch, request.param


def apart(losses, others):
    assert len(losses) == len(others)
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others))


@pytest.mark.slow
def test_two_processes_lose_as_one_does(one, two, content, tmp_path):
    (single, alone), (double, together, shard) = one, two
    assert (single["processes"], double["processes"]) == (1, 2)
    for name, room in (("whole", 1e-9), ("float32", 1e-4), ("muon", 2e-2), ("accumulated", 1e-9)):
        assert len(single[name]) == 2 * STEPS
        assert apart(double[name], single[name]) < room, name
    assert single["whole"][STEPS - 1] < single["whole"][0]
    assert apart(double["calibrated"], single["calibrated"]) < 1e-4
    # resumed on as many processes
    assert len(double["part"]) == STEPS + 2
    assert apart(double["part"] + double["rest"], double["whole"]) < 1e-12
    # resumed on one
    here = of(content, together / "left", 1, shard=shard)
    (tmp_path / "one").mkdir()
    rest = start(
        {"jobs": [{"name": "rest", "dtype": "float64", "content": here}]}, 1, tmp_path / "one"
    )["rest"]
    assert apart(double["left"] + rest, single["whole"]) < 1e-9
    # the finished model loads on one process, and is the same
    mine, theirs = (
        load_file(folder / "whole" / "done" / "model.safetensors") for folder in (alone, together)
    )
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-9, atol=1e-12)
    loaded = AutoModelForCausalLM.from_pretrained(
        together / "whole" / "done", trust_remote_code=True
    )
    assert torch.isfinite(loaded(torch.arange(3, 20)[None]).logits).all()


def test_sharding_and_adapters_are_refused_together(content, tmp_path):
    made = of(content, tmp_path / "out", shard=True) | {"lora": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    with pytest.raises(InputError, match="shard with lora"):
        load_recipe(tmp_path / "recipe.yaml")


# what ships for larger machines


@pytest.mark.slow
def test_the_multi_node_line_runs_with_two_machines_on_one(content, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(of(content, tmp_path / "out", 2)))
    environment = dict(
        os.environ,
        CPU="1",
        ACCELERATE_USE_CPU="1",
        MACHINES="2",
        PROCESSES="2",
        PORT="29571",
        PYTHON=sys.executable,
    )
    command = ["bash", RECIPES / "examples" / "launch" / "multi-node.sh"]
    running = [
        subprocess.Popen(
            [*command, str(rank), "127.0.0.1", file, "shard=true"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in running:
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error[-3000:]
    assert torch.isfinite(
        torch.cat(
            [
                t.flatten().float()
                for t in load_file(tmp_path / "out" / "model.safetensors").values()
            ]
        )
    ).all()


def test_the_launch_line_is_one_that_accelerate_takes():
    from accelerate.commands.launch import launch_command_parser

    text = (RECIPES / "examples" / "launch" / "multi-node.sh").read_text()
    line = text[text.index("accelerate.commands.launch") :].split()[2:]
    words = [word.strip('"') for word in line if word != "\\"]
    values = {
        "${MACHINES:-2}": "2",
        "${PROCESSES:-16}": "16",
        "$rank": "1",
        "$main": "10.0.0.1",
        "${PORT:-29500}": "29500",
    }
    read = launch_command_parser().parse_args([values.get(word, word) for word in words])
    assert (read.num_machines, read.num_processes, read.machine_rank, read.main_process_ip) == (
        2,
        16,
        1,
        "10.0.0.1",
    )
    assert (
        read.training_script == "scripts/distill.py"
        and (RECIPES.parent / read.training_script).is_file()
    )


def test_the_deepspeed_configuration_is_valid():
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    file = RECIPES / "examples" / "launch" / "zero2.json"
    read = HfDeepSpeedConfig(str(file))
    assert read.is_zero2() and read.is_offload() and not read.is_zero3()
    deepspeed = pytest.importorskip(
        "deepspeed", reason="deepspeed is not installed: its own check of the file does not run"
    )
    content = {k: v for k, v in json.loads(file.read_text()).items() if v != "auto" and k != "bf16"}
    deepspeed.DeepSpeedConfig({**content, "train_batch_size": 2, "gradient_clipping": 1.0})


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_a_launch_whose_gradients_would_go_unshared_is_refused(
    content, tmp_path, monkeypatch, kind
):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    from hf_kernel_ffn.distillation import Recipe
    from hf_kernel_ffn.distillation.accelerator import make_accelerator

    monkeypatch.setattr(
        Accelerator, "distributed_type", property(lambda self: DistributedType[kind])
    )
    with pytest.raises(InputError, match="shard: true"):
        make_accelerator(Recipe(**of(content, tmp_path / "out")))
