"""What a layer with knots keeps between calls, and every way in which it could be out of date."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from hf_kernel_ffn.checkpoint_code import kept_knots
from hf_kernel_ffn.checkpoint_code.knot_blocks import BLOCKS
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig
from hf_kernel_ffn.checkpoint_code.settings import KernelFFNConfig
from hf_kernel_ffn.checkpoint_code.tied import TiedKernelFFN

SIZE, UNITS, PIECES = 8, 12, 3


def make_layer(gated=True, dtype=torch.float32):
    values = "product" if gated else "fixed"
    settings = KernelFFNConfig(kernel="brownian", values=values, rows="tied", pieces=PIECES)
    config = LayerConfig(settings, SIZE, UNITS, {"scale": 1.5, "far": 1.0}, gated=gated)
    torch.manual_seed(0)
    layer = TiedKernelFFN(config)
    for parameter in layer.pieces.values():
        nn.init.normal_(parameter)
    return layer.to(dtype).eval()


def make_inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def run(layer, x):
    return layer(x)


@torch.no_grad()
def run_formula(layer, x):
    """The layer by the kernel's own values, of which nothing is kept."""
    return layer.output_prototypes(layer.coefficients(x).to(x.dtype))


@pytest.fixture
def counted(monkeypatch):
    """How often numbers were made of weights."""
    calls = []
    make_knots = kept_knots.make_knots
    monkeypatch.setattr(kept_knots, "make_knots", lambda ffn: calls.append(ffn) or make_knots(ffn))
    return calls


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 3), (0,)])
def test_few_tokens_are_those_of_the_formula(shape, dtype, gated):
    layer, x = make_layer(gated, dtype), make_inputs(*shape, dtype=dtype)
    for _ in range(2):
        found = run(layer, x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, run_formula(layer, x))


def test_numbers_are_made_once_for_all_calls(counted):
    layer = make_layer()
    for x in (make_inputs(1), make_inputs(1, 1), make_inputs(5000)):
        run(layer, x)
    with torch.inference_mode():
        layer(make_inputs(1))
    assert len(counted) == 1


def step_an_optimizer(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(make_inputs(4)).square().sum().backward()
    optimizer.step()


def set_gradients_and_step(layer):
    """A step whose gradients come from elsewhere: no call of the layer precedes it."""
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(layer.parameters(), lr=0.5).step()


def load_others(layer, assign=False):
    numbers = {name: tensor + 0.5 for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(numbers, assign=assign)


def write_in_place(layer):
    with torch.no_grad():
        layer.pieces["amount"][0, 0] += 1


def write_past_the_version_counter(layer):
    layer.pieces["knot"].data.mul_(2)


def scale_past_the_version_counter(layer):
    layer.log_ratio["scale"].data.add_(0.5)


def swap_data(layer):
    layer.pieces["amount"].data = layer.pieces["amount"].data + 1


def replace_parameter(layer):
    layer.pieces["knot"] = nn.Parameter(layer.pieces["knot"].detach() + 1)


def move_scale(layer):
    with torch.no_grad():
        layer.log_ratio["scale"].fill_(0.7)


def set_references(layer):
    layer.set_reference("far", 0.1)
    layer.set_reference("scale", 0.3)


def cast(layer):
    layer.double()


def copy_one_over_another(layer):
    other = copy.deepcopy(layer)
    load_others(other)
    with torch.no_grad():
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(other.parameters()), layer.parameters()
        )


CHANGES = [
    step_an_optimizer,
    set_gradients_and_step,
    load_others,
    lambda layer: load_others(layer, assign=True),
    write_in_place,
    write_past_the_version_counter,
    scale_past_the_version_counter,
    swap_data,
    replace_parameter,
    move_scale,
    set_references,
    cast,
    copy_one_over_another,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_is_out_of_date_after_a_change(change):
    layer, x = make_layer(), make_inputs(1)
    before = run(layer, x)
    change(layer)
    x = x.to(layer.pieces["knot"].dtype)
    found = run(layer, x)
    torch.testing.assert_close(found, run_formula(layer, x))
    if change is not cast:
        assert not torch.allclose(found, before)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, "pickle"], ids=str)
def test_a_copy_keeps_nothing_of_the_first(duplicate, change):
    layer, x = make_layer(), make_inputs(1)
    run(layer, x)
    if duplicate == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        other = duplicate(layer)
    if duplicate != copy.copy:
        assert other.kept_knots._kept is None
    change(other)
    for module in (other, layer):
        like = x.to(module.pieces["knot"].dtype)
        torch.testing.assert_close(run(module, like), run_formula(module, like))


def test_weights_freed_and_others_in_their_memory():
    layer, x = make_layer(), make_inputs(1)
    for number in range(20):
        layer.pieces["knot"] = nn.Parameter(torch.full((PIECES, UNITS), 1.0 + number))
        torch.testing.assert_close(run(layer, x), run_formula(layer, x))


def test_train_eval_and_calls_with_gradients_drop_it():
    layer, x = make_layer(), make_inputs(1)
    for drop in (layer.train, layer.eval, lambda: layer(x), lambda: nn.Sequential(layer).eval()):
        layer.eval()
        run(layer, x)
        assert layer.kept_knots._kept is not None
        drop()
        assert layer.kept_knots._kept is None


def test_it_is_not_used_where_gradients_are_wanted():
    layer, x = make_layer(), make_inputs(1)
    run(layer, x)
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    layer.train()
    run(layer, x)
    assert layer.kept_knots._kept is None


def test_it_is_not_saved():
    layer = make_layer()
    names = set(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    empty = file.tell()
    run(layer, make_inputs(1))
    assert set(layer.state_dict()) == names and not list(layer.buffers())
    file = io.BytesIO()
    torch.save(layer, file)
    assert file.tell() == empty


def test_weights_of_inference_mode_are_not_kept():
    with torch.inference_mode():
        layer = make_layer()
        x = make_inputs(1)
        layer(x)
        layer.pieces["knot"].mul_(2)
        torch.testing.assert_close(layer(x), run_formula(layer, x))
    assert layer.kept_knots._kept is None


def test_functional_calls_and_parametrizations_see_their_own_weights():
    layer, x = make_layer(), make_inputs(1)
    run(layer, x)
    others = {name: tensor.detach() + 0.5 for name, tensor in layer.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(layer, others, (x,))
    load_others(layer)
    torch.testing.assert_close(found, run_formula(layer, x))

    class Twice(nn.Module):
        def forward(self, tensor):
            return 2 * tensor

    nn.utils.parametrize.register_parametrization(layer.pieces, "amount", Twice())
    torch.testing.assert_close(run(layer, x), run_formula(layer, x))


def test_compiling_and_exporting_do_without():
    layer, x = make_layer(), make_inputs(1)
    run(layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    exported = torch.export.export(layer, (x,)).module()
    with torch.no_grad():
        for form in (compiled, exported):
            torch.testing.assert_close(form(x), run_formula(layer, x))
        layer.pieces["knot"].mul_(2)
        torch.testing.assert_close(compiled(x), run_formula(layer, x))
    torch._dynamo.reset()


def test_one_token_takes_few_operations():
    layer, x = make_layer(dtype=torch.bfloat16), make_inputs(1, dtype=torch.bfloat16)
    run(layer, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run(layer, x)
    names = [event.name for event in profiler.events()]
    computed = [name for name in names if name.split("::")[1] in ("clamp", "mul_", "mul", "sum")]
    assert len(computed) == 5 and names.count("aten::linear") == 3
    assert not {"aten::exp", "aten::sign"} & set(names)


@torch.no_grad()
def test_numbers_with_and_without_bounds_are_the_same():
    layer, x = make_layer(), make_inputs(1)
    knots = layer.kept_knots.get(layer)
    gate, up = layer.input_prototypes(x), layer.value_proj(x)
    bare = knots._replace(bounds=None)
    assert torch.equal(BLOCKS.forward(gate, up, knots), BLOCKS.forward(gate, up, bare))
