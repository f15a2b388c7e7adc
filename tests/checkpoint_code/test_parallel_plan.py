"""Plans of tensor parallelism where some layers are converted, or rows are free; and a forward
and backward pass by two processes against one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from teachers import SUPPORT
from tiny_families import tiny
from transformers import AutoModelForCausalLM

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.checkpoint_code.parallel_plan import keep_valid_entries, name_tied_entries
from hf_kernel_ffn.checkpoint_code.shards import is_split

FFN = "layers.*.mlp."
TIED = {
    f"{FFN}input_prototypes": "colwise",
    f"{FFN}value_proj": "colwise",
    f"{FFN}pieces.knot": "rowwise",
    f"{FFN}pieces.amount": "rowwise",
    f"{FFN}output_prototypes": "rowwise",
}
STOCK = {
    f"{FFN}gate_proj": "colwise",
    f"{FFN}up_proj": "colwise",
    f"{FFN}down_proj": "rowwise",
}


def ffn_plan(student):
    plan = student.base_model.config.base_model_tp_plan
    assert (
        student.tp_plan.items() >= {f"model.{name}": style for name, style in plan.items()}.items()
    )
    return {name: style for name, style in plan.items() if name.startswith(FFN)}


def make(family="llama", config=None, layers=None, **changes):
    teacher = tiny(family, "AutoModelForCausalLM", **changes)
    return convert(teacher, config, layers, calibration_tokens=0)[0]


def test_a_stock_layer_keeps_its_entries_beside_a_converted_one():
    assert ffn_plan(make(layers=[1])) == {**STOCK, **TIED}
    assert ffn_plan(make()) == TIED


def test_free_rows_have_no_entries_nor_layers_of_their_pattern():
    free = KernelFFNConfig()
    assert ffn_plan(make(config=free)) == {}
    assert ffn_plan(make(config={0: free, 1: KernelFFNConfig(rows="tied")})) == {}
    assert ffn_plan(make(config=free, layers=[0])) == STOCK


def test_other_kernels_split_their_own_pieces():
    plan = ffn_plan(make(config=KernelFFNConfig(rows="tied", kernel="root-half-yat")))
    assert {name for name in plan if "pieces" in name} == {
        f"{FFN}pieces.{name}" for name in ("alpha", "shift", "amount")
    }


def test_stock_experts_beside_converted_ones_are_not_split():
    # their entry is around the experts, whatever they are, and would sum outputs twice
    stock = type(tiny("mixtral", "AutoModelForCausalLM").config).base_model_tp_plan
    student = make("mixtral", layers=[0])
    plan = student.base_model.config.base_model_tp_plan
    assert any(name.startswith("layers.*.mlp.experts") for name in stock)
    assert {name for name in plan if name.startswith("layers.*.mlp.experts")} == {
        name.replace("mlp.", "mlp.experts.*.") for name in TIED
    }
    assert not getattr(student, "ep_plan", {})  # transformers 5.17 has no such property


def test_a_plan_that_fits_stays():
    base = make(layers=[1]).base_model
    plan = base.config.base_model_tp_plan
    assert {**keep_valid_entries(base, plan), **name_tied_entries(base)} == plan


def test_nothing_is_split_in_one_process():
    student = make()
    for ffn in student.kernel_ffns().values():
        assert not is_split(ffn.input_prototypes)


def randomise(student):
    """Values that conversion leaves at zero, so that an error in them would be seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "log_ratio" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return student.requires_grad_(True)


def make_cases():
    """Students by name."""
    tied = KernelFFNConfig(rows="tied", kernel="root-half-yat")
    return {
        "tied": make(tie_word_embeddings=False),
        "distances": make(config=tied, tie_word_embeddings=False),
        "partly": make(layers=[1], tie_word_embeddings=False),
        "free": make(config=KernelFFNConfig(), layers=[0], tie_word_embeddings=False),
        "experts": make("mixtral", layers=[0]),
    }


@pytest.mark.distributed
def test_two_processes_compute_what_one_does(tmp_path):
    ids = torch.arange(3, 43).view(2, 20)
    expected = {}
    for name, student in make_cases().items():
        randomise(student).save_pretrained(tmp_path / name)
        one = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        output = one(ids, labels=ids)
        output.loss.backward()
        gradients = {
            path: parameter.grad
            for path, parameter in one.named_parameters()
            if parameter.grad is not None
        }
        expected[name] = output.logits.detach(), gradients

    work = tmp_path / "work.json"
    work.write_text(json.dumps({"folder": str(tmp_path), "names": list(expected)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(SUPPORT / "tensor_parallel.py"), str(work)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    for name, (logits, gradients) in expected.items():
        found = load_file(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(found.pop("logits"), logits, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(found.pop("inference"), logits, rtol=1e-4, atol=2e-5)
        assert found.keys() == gradients.keys(), name
        for path, gradient in gradients.items():
            limit = 1e-4 * float(gradient.abs().max())
            torch.testing.assert_close(
                found[path], gradient, rtol=0, atol=limit, msg=f"{name} {path}"
            )
