"""Tied rows with knots in one step: the formula and its gradients, what is kept, and when."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_kernel_ffn.checkpoint_code import knot_blocks
from hf_kernel_ffn.checkpoint_code.knot_blocks import BLOCKS
from hf_kernel_ffn.checkpoint_code.knot_readout import mix_knots
from hf_kernel_ffn.checkpoint_code.knots import Knots, sum_knots
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig
from hf_kernel_ffn.checkpoint_code.plan import Form, choose_tied_form
from hf_kernel_ffn.checkpoint_code.settings import KernelFFNConfig
from hf_kernel_ffn.checkpoint_code.tied import TiedKernelFFN

SIZE, UNITS, PIECES, FAR = 8, 12, 3, 1.0
gating = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def make_layer(gated=True, dtype=torch.float64, size=SIZE, units=UNITS, pieces=PIECES, **config):
    """A layer with random weights and pieces, a knot of zero among them."""
    settings = KernelFFNConfig(
        kernel="brownian", values="product" if gated else "fixed", rows="tied", pieces=pieces
    )
    reference = {"scale": 1.5, "far": FAR}
    torch.manual_seed(0)
    layer = TiedKernelFFN(LayerConfig(settings, size, units, reference, gated=gated, **config))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=1.0 if size == SIZE else 0.02)
        for parameter in layer.pieces.values():
            parameter.normal_()
        layer.pieces["knot"][0, 0] = 0
        layer.log_ratio["scale"].fill_(0.1)
    return layer.to(dtype)


def make_inputs(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, SIZE, generator=generator, dtype=torch.float64).to(dtype)


def run_formula(layer, x):
    """The layer by the kernel's own values, piece by piece."""
    return layer.output_prototypes(layer.coefficients(x).to(x.dtype))


def find_gradients(layer, x, run):
    """Output and gradients of the input and of every parameter, by name."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    output = run(leaf)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape))
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "x": leaf.grad, **found}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


@gating
@pytest.mark.parametrize("few", [0, 10**6], ids=["piece by piece", "all at once"])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 1, 5), (0,), (2, 0)])
def test_output_and_gradients_are_those_of_the_formula(gated, shape, few, monkeypatch):
    monkeypatch.setattr(knot_blocks, "FEW_NUMBERS", few)
    layer, x = make_layer(gated), make_inputs(*shape)
    assert choose_tied_form(layer, x).form is Form.ONE_PASS
    expected = find_gradients(layer, x, lambda x: run_formula(layer, x))
    assert_same(find_gradients(layer, x, layer), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected["output"])


@gating
def test_at_zero_and_at_a_knot_of_zero_nothing_has_a_gradient(gated):
    layer = make_layer(gated)
    with torch.no_grad():
        layer.input_prototypes.bias.zero_()
        layer.pieces["knot"][1].zero_()
    x = make_inputs(4)
    x[1] = 0  # as padding is: every g is zero
    expected = find_gradients(layer, x, lambda x: run_formula(layer, x))
    found = find_gradients(layer, x, layer)
    assert_same(found, expected)
    assert not found["pieces.knot"][1].any() and not found["pieces.amount"][1].any()


@gating
def test_blocks_change_nothing(gated, monkeypatch):
    layer, x = make_layer(gated), make_inputs(11)
    monkeypatch.setattr(knot_blocks, "FEW_NUMBERS", 0)
    whole = find_gradients(layer, x, layer)
    for name in ("FORWARD_NUMBERS", "BACKWARD_NUMBERS"):
        monkeypatch.setattr(knot_blocks, name, 3 * UNITS)
    assert_same(find_gradients(layer, x, layer), whole)


@gating
def test_derivatives_of_first_and_second_order(gated):
    layer, x = make_layer(gated), make_inputs(3).requires_grad_()
    with torch.no_grad():
        layer.pieces["knot"][0, 0] = 0.7  # at zero there is no derivative
    parameters = [x, *layer.parameters()]

    def run(*parameters):
        x, *others = parameters
        weights = dict(zip((name for name, _ in layer.named_parameters()), others, strict=True))
        return torch.func.functional_call(layer, weights, (x,))

    assert torch.autograd.gradcheck(run, parameters)
    assert torch.autograd.gradgradcheck(run, parameters)


@pytest.mark.parametrize("trained", ["x", "input_prototypes", "value_proj", "output_prototypes"])
def test_only_what_is_trained_has_a_gradient(trained):
    layer, x = make_layer(), make_inputs(5)
    layer.requires_grad_(False)
    expected = find_gradients(layer, x, lambda x: run_formula(layer, x))
    if trained != "x":
        getattr(layer, trained).requires_grad_(True)
        expected = find_gradients(layer, x, lambda x: run_formula(layer, x))
    assert_same(
        {
            name: tensor
            for name, tensor in find_gradients(layer, x, layer).items()
            if tensor is not None
        },
        {name: tensor for name, tensor in expected.items() if tensor is not None},
    )


def test_output_prototypes_that_are_not_plain_are_called():
    layer, x = make_layer(), make_inputs(5)
    expected = find_gradients(layer, x, lambda x: 2 * run_formula(layer, x))
    layer.output_prototypes.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert_same(find_gradients(layer, x, layer), expected)


def test_half_precision_is_near_and_pieces_are_summed_in_float32():
    exact, x = make_layer(), make_inputs(64)
    expected = find_gradients(exact, x, exact)
    layer = make_layer(dtype=torch.bfloat16)
    found = find_gradients(layer, x.bfloat16(), layer)
    plain = find_gradients(layer, x.bfloat16(), lambda x: run_formula(layer, x))
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        error = (tensor - expected[name]).norm()
        assert error <= 1.2 * (plain[name] - expected[name]).norm() + 1e-3 * expected[name].norm()


def test_autocast():
    layer, x = make_layer(dtype=torch.float32), make_inputs(64, dtype=torch.float32)
    expected = find_gradients(layer, x, layer)
    runs = []
    for run in (layer, lambda x: run_formula(layer, x)):
        with torch.autocast("cpu", torch.bfloat16):
            runs.append(find_gradients(layer, x, run))

    for name, tensor in runs[0].items():
        plain = runs[1][name]
        assert tensor.dtype == plain.dtype
        error = (tensor - expected[name]).norm()
        assert error <= 1.2 * (plain - expected[name]).norm() + 1e-3 * expected[name].norm(), name


def count_saved_bytes(module, x):
    """Bytes that the backward pass of ``module`` keeps beside its parameters, each once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x)
    del output
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("size, units", [(576, 1536), (2048, 8192)])
def test_the_backward_pass_keeps_less_than_that_of_swiglu(size, units):
    config = SimpleNamespace(
        hidden_size=size, intermediate_size=units, mlp_bias=False, hidden_act="silu"
    )
    with torch.device("meta"):
        stock = LlamaMLP(config)
    stock = stock.to_empty(device="cpu").bfloat16()
    layer = make_layer(dtype=torch.bfloat16, size=size, units=units, pieces=8)
    x = torch.randn(1, 1024, size).bfloat16().requires_grad_()
    assert count_saved_bytes(layer, x) <= 0.65 * count_saved_bytes(stock, x)


@gating
def test_a_compiler_makes_one_graph_for_any_number_of_tokens(gated):
    layer = make_layer(gated)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for tokens in (7, 5, 12):
        x = make_inputs(2, tokens)
        assert_same(find_gradients(layer, x, compiled), find_gradients(layer, x, layer))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1
    torch._dynamo.reset()


def test_reasons_against_one_pass():
    x = make_inputs(2)
    layer = make_layer()
    assert choose_tied_form(layer, x).reasons == {Form.FUSED: "no Triton kernels asked for"}
    dropping = make_layer(hidden_dropout=0.5).train()
    plan = choose_tied_form(dropping, x)
    assert plan.form is Form.PLAIN and "dropout of hidden units" in plan.reasons[Form.ONE_PASS]
    assert choose_tied_form(dropping.eval(), x).form is Form.ONE_PASS
    torch.func.vmap(lambda x: layer(x[None]))(x)


def test_the_sum_and_its_steps_agree():
    gate = make_inputs(9)
    knot, amount = torch.randn(2, 4, SIZE, dtype=torch.float64)
    expected = sum_knots(gate, knot, amount)
    torch.testing.assert_close(BLOCKS.forward(gate, None, Knots(knot, amount, None)), expected)


def test_mix_is_what_the_layer_writes():
    layer, x = make_layer(), make_inputs(3)
    torch.testing.assert_close(mix_knots(layer, x, BLOCKS), layer(x))
    assert isinstance(layer.output_prototypes, nn.Linear)
