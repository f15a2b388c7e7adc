"""Triton kernels registered by the convention of the ``kernels`` package, without the hub."""

import sys

import pytest
import torch
from tiny_families import tiny

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.checkpoint_code.ffn import KernelFFN
from hf_kernel_ffn.checkpoint_code.knot_blocks import BLOCKS
from hf_kernel_ffn.checkpoint_code.knot_readout import mix_knots
from hf_kernel_ffn.checkpoint_code.tied import TiedKernelFFN
from hf_kernel_ffn.gpu import kernelize as module
from hf_kernel_ffn.gpu.tied_kernels import TRITON_STEP

IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture
def registered():
    """The kernels package, with the layers registered for a CPU until the test ends."""
    kernels = pytest.importorskip("kernels")
    with kernels.use_kernel_mapping({}):
        module.register_kernel_layers("cpu")
        yield kernels
    for module_class in (KernelFFN, TiedKernelFFN):
        del module_class.kernel_layer_name, module_class.kernel_condition


@pytest.mark.ecosystem
@pytest.mark.parametrize(
    ("config", "layer"), [(None, "FusedTiedLayer"), (KernelFFNConfig(), "FusedDenseLayer")]
)
def test_kernelize_replaces_the_forward_of_every_readout(registered, config, layer):
    student, _ = convert(tiny("llama", "AutoModelForCausalLM"), config, calibration_tokens=0)
    before = student(IDS).logits
    registered.kernelize(student, mode=registered.Mode.INFERENCE, device="cpu")
    for ffn in student.kernel_ffns().values():
        assert ffn.forward.__func__ is getattr(module, layer).forward
    assert torch.equal(student(IDS).logits, before)  # a CPU has no Triton: the stock forward


@pytest.mark.ecosystem
def test_a_call_that_triton_can_serve_goes_to_its_step(registered, monkeypatch):
    student, _ = convert(tiny("llama", "AutoModelForCausalLM"), calibration_tokens=0)
    before = student(IDS).logits
    steps = []

    def mix(ffn, hidden_states, step):
        steps.append(step)
        return mix_knots(ffn, hidden_states, BLOCKS)

    monkeypatch.setattr(module, "reason_against_fused_tied", lambda ffn, x: None)
    monkeypatch.setattr(module, "mix_knots", mix)
    registered.kernelize(student, mode=registered.Mode.INFERENCE, device="cpu")
    assert torch.equal(student(IDS).logits, before)
    assert steps == [TRITON_STEP] * len(student.kernel_ffns())


def test_without_the_package_a_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(InputError, match="pip install kernels"):
        module.register_kernel_layers()
