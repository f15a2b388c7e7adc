"""A user's own architecture, with its own code: by an entry it is like the built-in ones."""

import importlib.util
from importlib.metadata import EntryPoint

import pytest
import torch
from own_code import EXAMPLE, save_causal_mean

from hf_kernel_ffn import InputError, KernelFFNConfig, convert, register_architecture, restore
from hf_kernel_ffn.families import registry as registry_module
from hf_kernel_ffn.families.registry import ARCHITECTURES
from hf_kernel_ffn.storage.loading import load_student, load_teacher


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
    return save_causal_mean(tmp_path_factory.mktemp("own") / "causal_mean")


def test_it_converts_saves_and_loads_like_the_built_in_ones(
    table, teacher_at, ids, run_elsewhere, tmp_path
):
    register_architecture(entry())
    teacher = load_teacher(str(teacher_at), trust_remote_code=True)
    student, report = convert(
        teacher, KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256
    )
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
