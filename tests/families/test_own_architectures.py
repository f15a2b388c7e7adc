"""A user's own architecture, with its own code: by an entry it is like the built-in ones."""

import importlib.util
import json
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_kernel_ffn import InputError, convert, register_architecture, restore
from hf_kernel_ffn.families import registry as registry_module
from hf_kernel_ffn.families.registry import ARCHITECTURES
from hf_kernel_ffn.storage.loading import load_student, load_teacher

EXAMPLE = Path(__file__).parents[2] / "recipes" / "examples" / "architectures" / "causal_mean"


def entry():
    """The example's own."""
    spec = importlib.util.spec_from_file_location(
        "example_architecture", EXAMPLE / "architecture.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CAUSAL_MEAN


@pytest.fixture
def table(monkeypatch):
    """The table of architectures, put back after the test."""
    before = dict(ARCHITECTURES)
    yield ARCHITECTURES
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)


@pytest.fixture(scope="module")
def teacher_at(tmp_path_factory):
    """A saved model that brings its code."""
    folder = tmp_path_factory.mktemp("own") / "causal_mean"
    folder.mkdir()
    for file in EXAMPLE.glob("*_causal_mean.py"):
        shutil.copy(file, folder)
    auto_map = {
        "AutoConfig": "configuration_causal_mean.CausalMeanConfig",
        "AutoModel": "modeling_causal_mean.CausalMeanModel",
        "AutoModelForCausalLM": "modeling_causal_mean.CausalMeanForCausalLM",
    }
    (folder / "config.json").write_text(
        json.dumps({"model_type": "causal_mean", "auto_map": auto_map})
    )
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["auto_map"] = auto_map
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def test_it_converts_saves_and_loads_like_the_built_in_ones(
    table, teacher_at, ids, run_elsewhere, tmp_path
):
    register_architecture(entry())
    teacher = load_teacher(str(teacher_at), trust_remote_code=True)
    student, report = convert(teacher, calibration_ids=ids, calibration_tokens=256)
    assert list(report.layers) == ["blocks.0.expand", "blocks.1.expand"]
    with torch.no_grad():
        expected = student(ids).logits
        assert torch.equal(restore(student, teacher)(ids).logits, teacher(ids).logits)
    assert not torch.equal(expected, teacher(ids).logits)
    folder = tmp_path / "student"
    student.save_pretrained(folder)
    with pytest.raises(InputError, match=r"modeling_kernel_causal_mean\.py, then allow it"):
        load_student(str(folder))
    again = load_student(str(folder), trust_remote_code=True)
    assert type(again).__name__ == "KernelCausalMeanForCausalLM"
    jobs = [
        {"name": "saved", "auto": "AutoModelForCausalLM", "folder": str(folder)},
        {
            "name": "again",
            "auto": "AutoModelForCausalLM",
            "folder": str(folder),
            "resave": str(tmp_path / "again"),
        },
    ]
    results, errors = run_elsewhere(jobs, ids, tmp_path)
    assert not errors
    assert torch.equal(results["saved"], expected) and torch.equal(results["again"], expected)


def test_an_entry_point_of_another_package_is_found(table, monkeypatch):
    point = EntryPoint(
        "causal_mean", "example_architecture:CAUSAL_MEAN", registry_module.ENTRY_POINTS
    )
    monkeypatch.setattr(EntryPoint, "load", lambda self: entry())
    monkeypatch.setattr(
        registry_module,
        "entry_points",
        lambda group, name: [point] if name == "causal_mean" else [],
    )
    assert registry_module.get_architecture("causal_mean").up == "expand"
    with pytest.raises(InputError, match="found model type 'nothing'"):
        registry_module.get_architecture("nothing")
    monkeypatch.setattr(EntryPoint, "load", lambda self: "a string")
    table.pop("causal_mean")
    with pytest.raises(InputError, match="expected an Architecture of that model_type"):
        registry_module.get_architecture("causal_mean")
    with pytest.raises(InputError, match="already registered"):
        register_architecture(ARCHITECTURES["llama"])
