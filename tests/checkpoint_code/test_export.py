"""Students as torch.export programs and ONNX models: outputs equal eager, at other shapes too."""

import pytest
import torch
from tiny_families import tiny
from torch import nn
from torch.export import Dim

from hf_kernel_ffn import KernelFFNConfig, convert

READOUTS = {
    "tied": KernelFFNConfig(rows="tied"),
    "distances": KernelFFNConfig(rows="tied", kernel="root-half-yat"),
    "free": KernelFFNConfig(),
    "top-k": KernelFFNConfig(simplex="top-k", top_k=8),
}
ANY_SIZES = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


class Logits(nn.Module):
    """A model from ids to logits alone, without a cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(scope="module")
def make_student():
    teacher = tiny("llama", "AutoModelForCausalLM")
    return lambda readout: convert(teacher, READOUTS[readout], calibration_tokens=0)[0]


def make_ids(rows, length):
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(3, 300, (rows, length), generator=generator)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def export_ffn(student):
    ffn = next(iter(student.kernel_ffns().values()))
    return ffn, torch.export.export(
        ffn, (torch.randn(2, 9, 32),), dynamic_shapes={"hidden_states": ANY_SIZES}
    )


@pytest.mark.parametrize("readout", READOUTS)
def test_an_exported_readout_takes_any_number_of_tokens(make_student, readout):
    ffn, program = export_ffn(make_student(readout))
    x = torch.randn(3, 14, 32)
    assert_equal(program.module()(x), ffn(x))


@pytest.mark.parametrize("readout", READOUTS)
def test_an_exported_student_takes_any_batch(make_student, readout):
    model = Logits(make_student(readout))
    shapes = {"input_ids": ANY_SIZES}
    program = torch.export.export(model, (make_ids(2, 9),), dynamic_shapes=shapes)
    ids = make_ids(3, 14)
    assert_equal(program.module()(ids), model(ids))


def run_onnx(program, tensor, path):
    """The output of onnxruntime for ``tensor``."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [name] = [model_input.name for model_input in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: tensor.numpy()})[0])


@pytest.mark.slow
@pytest.mark.ecosystem
@pytest.mark.parametrize("readout", READOUTS)
def test_onnx_of_a_readout(make_student, readout, tmp_path):
    ffn, program = export_ffn(make_student(readout))
    x = torch.randn(3, 14, 32)
    assert_equal(run_onnx(program, x, tmp_path / "ffn.onnx"), ffn(x))


@pytest.mark.slow
@pytest.mark.ecosystem
@pytest.mark.parametrize("readout", READOUTS)
def test_onnx_of_a_student(make_student, readout, tmp_path):
    model = Logits(make_student(readout))
    shapes = {"input_ids": ANY_SIZES}
    program = torch.export.export(model, (make_ids(2, 9),), dynamic_shapes=shapes)
    ids = make_ids(3, 14)
    assert_equal(run_onnx(program, ids, tmp_path / "student.onnx"), model(ids))
