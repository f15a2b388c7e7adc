"""Tied rows with knots by Triton kernels against float64, run by test_fused.py: on a GPU where
there is one, otherwise by Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch

from hf_kernel_ffn import InputError
from hf_kernel_ffn.checkpoint_code.knot_blocks import BLOCKS
from hf_kernel_ffn.checkpoint_code.knots import Knots
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig
from hf_kernel_ffn.checkpoint_code.plan import Form, choose_tied_form
from hf_kernel_ffn.checkpoint_code.settings import MOST_PIECES, KernelFFNConfig
from hf_kernel_ffn.checkpoint_code.tied import TiedKernelFFN
from hf_kernel_ffn.gpu import fused, optional_triton, trial
from hf_kernel_ffn.gpu.fused import Fused, fuse
from hf_kernel_ffn.gpu.tied_kernels import TRITON_STEP

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
assert CUDA or optional_triton.INTERPRETED
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
gating = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def draw(tokens, units, pieces, gated, dtype):
    """∂c, g, u and knots, in float64 the same numbers."""
    generator = torch.Generator().manual_seed(tokens + units)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    numbers = Knots(normal(pieces, units), normal(pieces, units), 1.0 if gated else None)
    matrices = [normal(tokens, units).to(dtype) for _ in range(3 if gated else 2)]
    if tokens > 1:
        matrices[1][1] = 0
    numbers.knot[0, 0] = 0
    return matrices, numbers


def run_in_float64(matrices, numbers):
    """c and all gradients by torch in float64."""
    gradient, gate, *up = (matrix.double() for matrix in matrices)
    exact = Knots(numbers.knot.double(), numbers.amount.double(), numbers.far)
    up = up[0] if up else None
    return BLOCKS.forward(gate, up, exact), BLOCKS.backward(
        gradient, gate, up, exact, of_gate=torch.empty_like(gate), of_pieces=True
    )


def run_backward(gradient, gate, up, numbers, of_pieces=True):
    """By the kernels, the gradient of g in place of that of c."""
    gradient = gradient.clone()
    return TRITON_STEP.backward(gradient, gate, up, numbers, of_gate=gradient, of_pieces=of_pieces)


def compare(tokens, units, pieces, gated, dtype):
    """Every number of the kernels with float64, to the rounding of the dtype."""
    matrices, numbers = draw(tokens, units, pieces, gated, dtype)
    expected, of_expected = run_in_float64(matrices, numbers)
    gradient, gate, *up = matrices
    up = up[0] if up else None
    room = {"rtol": torch.finfo(dtype).eps, "atol": 2e-6 * pieces}
    sums = {"rtol": 1e-5, "atol": 2e-6 * max(tokens, 1)}

    written = TRITON_STEP.forward(gate, up, numbers)
    assert written.dtype == dtype
    torch.testing.assert_close(written.double(), expected, **room)
    for of_pieces in (True, False):
        found = run_backward(gradient, gate, up, numbers, of_pieces)
        torch.testing.assert_close(found.coefficients.double(), expected, **room)
        torch.testing.assert_close(found.gate.double(), of_expected.gate, **room)
        if gated:
            torch.testing.assert_close(found.up.double(), of_expected.up, **room)
        if not of_pieces:
            assert found.knot is None and found.amount is None
            continue
        torch.testing.assert_close(found.knot.double(), of_expected.knot, **sums)
        torch.testing.assert_close(found.amount.double(), of_expected.amount, **sums)


@gating
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, units", [(1, 1), (70, 130), (64, 128), (3, 300), (0, 5)])
def test_any_shape_and_dtype(tokens, units, dtype, gated):
    compare(tokens, units, 3, gated, dtype)


@gating
@pytest.mark.parametrize("pieces", [1, 8, MOST_PIECES])
def test_any_number_of_pieces(pieces, gated):
    compare(9, 20, pieces, gated, torch.float32)


@gating
def test_a_bad_number_is_not_hidden(gated):
    (_, gate, *up), numbers = draw(5, 20, 3, gated, torch.float32)
    gate[2, 3] = torch.nan
    found = TRITON_STEP.forward(gate, up[0] if up else None, numbers).isnan()
    assert found[2, 3] and found.sum() == 1


def test_sums_are_the_same_every_time():
    (gradient, gate, up), numbers = draw(300, 40, 3, True, torch.bfloat16)
    first, second = (run_backward(gradient, gate, up, numbers) for _ in range(2))
    assert torch.equal(first.knot, second.knot) and torch.equal(first.amount, second.amount)


def make_layer(gated=True, dtype=torch.float32, pieces=4, kernel="brownian"):
    values = "product" if gated else "fixed"
    settings = KernelFFNConfig(kernel=kernel, values=values, rows="tied", pieces=pieces)
    torch.manual_seed(0)
    reference = {"scale": 1.5, "far": 1.0, "epsilon": 1.0}
    layer = TiedKernelFFN(LayerConfig(settings, 10, 20, reference, gated=gated))
    for parameter in layer.pieces.values():
        torch.nn.init.normal_(parameter)
    return layer.to(DEVICE, dtype).eval()


def make_inputs(dtype=torch.float32):
    return torch.randn(2, 9, 10, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def find_gradients(layer, x):
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    output = layer(leaf)
    output.backward(torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output).to(output))
    return [output.detach(), leaf.grad, *(parameter.grad for parameter in layer.parameters())]


@gating
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_layer_is_what_it_is_by_torch(dtype, gated):
    layer, x = make_layer(gated, dtype), make_inputs(dtype)
    expected = find_gradients(layer, x)
    layer.fused = Fused(required=True)
    assert choose_tied_form(layer, x).form is Form.FUSED
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    )
    for found, other in zip(find_gradients(layer, x), expected, strict=True):
        torch.testing.assert_close(found, other, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected[0], **tolerance)


def test_autocast():
    layer, x = make_layer(), make_inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = find_gradients(layer, x)
        layer.fused = Fused(required=True)
        found = find_gradients(layer, x)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_a_model_is_fused_as_a_whole_and_a_trial_lets_kernels_in(monkeypatch):
    layer = make_layer()
    model = SimpleNamespace(kernel_ffns=lambda: {"mlp": layer})
    fuse(model, required=True)
    assert layer.fused == Fused(required=True)
    layer.fused = None

    def interleaved(work, *rest):
        for once in work.values():
            once()
        return {"plain": {"median": 1.0}, "fused": {"median": 0.5}}

    monkeypatch.setattr(trial, "interleaved", interleaved)
    assert trial.fuse_where_it_pays(model, tokens=5) == {} and layer.fused == Fused()
    other = SimpleNamespace(kernel_ffns=lambda: {"mlp": make_layer(kernel="half-yat")})
    assert "expected 'brownian'" in trial.fuse_where_it_pays(other)["mlp"]


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"kernel": "yat"}, "kernel 'yat', expected 'brownian' for the fused step"),
        ({"dtype": torch.float64}, "float64, expected one of float32"),
    ],
)
def test_what_it_cannot_serve_it_says(settings, reason):
    layer = make_layer(**settings)
    x = make_inputs(settings.get("dtype", torch.float32))
    assert reason in fused.reason_against_fused_tied(layer, x)
    layer.fused = Fused(required=True)
    with pytest.raises(InputError, match=reason):
        layer(x)
    layer.fused = Fused()
    assert torch.isfinite(layer(x)).all()


@gating
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")
def test_a_compiler_calls_them_for_the_backward_pass(gated):
    layer, x = make_layer(gated), make_inputs()
    expected = find_gradients(layer, x)
    layer.fused = Fused(required=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for found, other in zip(find_gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
