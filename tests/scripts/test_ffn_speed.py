"""The benchmark: what is timed, and what is written about it."""

import json
import sys

import ffn_speed
import ffn_variants
import pytest
import torch
import typer
from tiny_families import tiny

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.cli.app import run_app
from hf_kernel_ffn.gpu import measuring


@pytest.mark.parametrize(
    "family, auto, kinds",
    [("llama", "AutoModelForCausalLM", 1), ("bert", "AutoModel", 1), ("qwen3_moe", "AutoModel", 1)],
)
def test_the_ffns_of_any_checkpoint_are_found(family, auto, kinds, ids):
    model = tiny(family, auto)
    shape, own = ffn_variants.find_checkpoint_ffns(model, "it")
    assert shape == ffn_variants.Shape(32, 48, family != "bert") and len(own) == kinds
    x = torch.randn(1, 5, 32)
    student, _ = convert(
        model, KernelFFNConfig(), layers="0", calibration_ids=ids[:, :8], calibration_tokens=64
    )
    shape, of_student = ffn_variants.find_checkpoint_ffns(student, "it")
    assert shape == ffn_variants.Shape(32, 48, family != "bert") and len(of_student) == kinds + 1
    for ffn in (*own.values(), *of_student.values()):
        assert ffn(x).shape == x.shape and ffn.state_dict()


def test_the_command_writes_ratios(teacher_folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "speed.json"
    arguments = [
        "--model",
        str(teacher_folder("gpt2")),
        "--tokens",
        "8",
        "--repeats",
        "2",
        "--active",
        "4",
    ]
    monkeypatch.setattr(
        sys, "argv", ["ffn_speed.py", *arguments, "--modes", "eager", "--json", str(file)]
    )
    monkeypatch.setattr(measuring.interleaved, "__defaults__", ("wall", 0.0))
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as end:
            run_app(lambda: typer.run(ffn_speed.main))
    finally:
        torch.set_num_threads(threads)
    assert not end.value.code
    found = json.loads(file.read_text())
    assert {row["phase"] for row in found["rows"]} == set(ffn_variants.PHASES)
    names = {row["variant"] for row in found["rows"]}
    assert {
        "stock",
        "single",
        "single, top-k 4",
        "single, top-k 4, norms kept",
        "yat single",
    } <= names
    assert any(name.endswith("h.0.mlp") for name in names)
    assert all(row["ratio"]["median"] > 0 for row in found["rows"])
    assert "medians of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", ["--shapes=gpt5", "--modes=fast", "--modes=fused", "--phases=backward", "--clock=sun"]
)
def test_unknown_names_are_refused(option, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ffn_speed.py", option])
    with pytest.raises(SystemExit) as end:
        run_app(lambda: typer.run(ffn_speed.main))
    assert end.value.code == 2


def test_memory_is_counted():
    x = torch.randn(64, 256)
    assert measuring.peak_memory(lambda: (x * 2) + (x * 3), x.device) == 3 * x.numel() * 4
    assert measuring.bytes_moved(lambda: x * 2) == 2 * x.numel() * 4
    leaf = x.clone().requires_grad_()
    assert measuring.memory_for_backward(lambda: leaf.exp(), x.device) == x.numel() * 4
