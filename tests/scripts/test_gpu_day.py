"""The measurements on a GPU, at toy sizes without one; and a model packed and put together."""

import json
import os
import subprocess
import sys

import pack_model
import pytest
import torch
from safetensors.torch import load_file, save_file
from teachers import RECIPES
from typer.testing import CliRunner

ROOT = RECIPES.parent


def run(tmp_path, model):
    """What a dry run with ``model`` finds, by part, and the table that it prints."""
    done = subprocess.run(
        ["bash", "scripts/gpu_day.sh", tmp_path / "out", "--dry-run"]
        + ["--model", model, "--work", tmp_path / "work"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "out" / "gpu_day.json").read_text())["parts"], done.stdout


@pytest.mark.slow
def test_every_part_has_a_result(tmp_path):
    parts, table = run(tmp_path, "recipes/teachers/llama")
    assert {name: part.get("error") for name, part in parts.items()} == dict.fromkeys(parts)
    assert len(parts) == 13 and all(part["result"] for part in parts.values())
    assert "tied product" in table and "FAILED" not in table


@pytest.mark.slow
def test_parts_that_fail_leave_the_others_theirs(tmp_path):
    parts, table = run(tmp_path, tmp_path / "nowhere")
    failed = {name for name, part in parts.items() if "error" in part}
    speeds = {"speed fused", "speed compiled", "speed others"}
    whole = {"machine", "accuracy", "tests", *speeds}
    assert failed == set(parts) - whole and all(parts[name]["result"] for name in whole)
    assert "nowhere" in parts["convert"]["error"] and "FAILED" in table


def test_a_packed_model_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    step = (torch.rand(48, 1) / 100).half().float()
    four = step * torch.randint(0, 16, (48, 32)) - (7 * step).half().float()
    four[:, 0], four[:, 1] = four.amin(1), four.amax(1)
    eight = step * torch.randint(-127, 128, (48, 32))
    eight[:, 0] = 127 * step[:, 0]
    tensors = {
        "four": four.bfloat16().reshape(24, 64),
        "eight": eight.bfloat16().reshape(24, 64),
        "any": torch.randn(5, 7).bfloat16(),
        "float": torch.randn(64, 32),
    }
    model = tmp_path / "model"
    model.mkdir()
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    parts, again = tmp_path / "parts", tmp_path / "again"
    for arguments in (["pack", model, parts, "--bytes", "9000"], ["join", parts, again]):
        done = CliRunner().invoke(pack_model.app, list(map(str, arguments)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert len(list(parts.glob("*/part"))) > 1 and (again / "config.json").read_text() == "{}"
    found = load_file(again / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert pack_model.encode(tensors["eight"])[0] == "8-bit"
    (parts / "a" / "part").write_bytes(b"")
    done = CliRunner().invoke(pack_model.app, ["join", str(parts), str(again)])
    assert done.exit_code == 2 and "expected all of" in done.output
