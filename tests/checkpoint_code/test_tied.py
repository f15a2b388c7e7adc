"""Readouts with tied rows: the formula, the record, and that blocks of tokens change nothing."""

import math

import pytest
import torch

from hf_kernel_ffn.checkpoint_code.errors import InputError
from hf_kernel_ffn.checkpoint_code.ffn import KernelFFN
from hf_kernel_ffn.checkpoint_code.kernels import get_kernel
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig
from hf_kernel_ffn.checkpoint_code.settings import KernelFFNConfig, resolve_defaults
from hf_kernel_ffn.checkpoint_code.tied import TiedKernelFFN, make_ffn

SIZE, UNITS, PIECES = 8, 12, 3
CASES = [
    (kernel, values, gated)
    for kernel in ("half-yat", "root-half-yat", "yat")
    for values, gated in (("fixed", False), ("fixed", True), ("product", True))
] + [("brownian", "fixed", False), ("brownian", "product", True)]


def make_layer(kernel="root-half-yat", values="product", gated=True, dtype=torch.float64):
    """A layer with random weights and pieces, its log-ratios away from zero."""
    settings = KernelFFNConfig(kernel=kernel, values=values, rows="tied", pieces=PIECES)
    reference = {"epsilon": 2.0, "scale": 1.5, "far": 2.0}
    torch.manual_seed(0)
    layer = TiedKernelFFN(LayerConfig(settings, SIZE, UNITS, reference, gated=gated))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        for parameter in layer.log_ratio.values():
            parameter.mul_(0.1)
    return layer.to(dtype).eval()


def make_inputs(count=7, dtype=torch.float64):
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)


def write_by_loops(layer, x):
    """The formula of the module's docstring, piece by piece, for one token ``x`` (hidden_size,)."""
    kernel = get_kernel(layer.config.settings.kernel)
    parameters = layer.kernel_parameters()
    weights = layer.input_prototypes
    written = layer.output_prototypes.bias.clone()
    for unit in range(UNITS):
        up = None
        if layer.config.gated:
            value_row = layer.value_proj.weight[unit]
            up = value_row @ x + layer.value_proj.bias[unit]
        coefficient = 0
        for piece in range(PIECES):
            amount = layer.pieces["amount"][piece, unit] * layer.positive("scale")
            if kernel.uses_knot:
                score = weights.weight[unit] @ x + weights.bias[unit]
                knot = layer.pieces["knot"][piece, unit]
                meets = torch.sign(score) == torch.sign(knot)
                coefficient = coefficient + amount * meets * min(abs(score), abs(knot))
                continue
            alpha = layer.pieces["alpha"][piece, unit]
            row = alpha * weights.weight[unit]
            score = alpha * (weights.weight[unit] @ x + weights.bias[unit])
            if "beta" in layer.pieces:
                beta = layer.pieces["beta"][piece, unit]
                row = row + beta * value_row
                score = score + beta * up
            score = score + layer.pieces["shift"][piece, unit]
            value = kernel.value(score[None], (x - row).square().sum()[None], **parameters)
            coefficient = coefficient + amount * value
        if layer.config.settings.values == "product":
            far = layer.config.reference["far"] if kernel.uses_knot else float("inf")
            coefficient = coefficient * up.clamp(-far, far)
        written = written + coefficient * layer.output_prototypes.weight[:, unit]
    return written


@pytest.mark.parametrize("kernel, values, gated", CASES)
def test_the_layer_is_its_formula(kernel, values, gated):
    layer, x = make_layer(kernel, values, gated), make_inputs()
    expected = torch.stack([write_by_loops(layer, token) for token in x])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kernel, values, gated", CASES)
def test_the_record_is_conic_and_sums_to_the_output(kernel, values, gated):
    layer, x = make_layer(kernel, values, gated), make_inputs()
    record = layer.readout(x[None])
    torch.testing.assert_close(record.output(), layer(x[None]))
    assert (record.coefficients >= 0).all()
    assert record.coefficients.shape == (1, len(x), 2 * UNITS)
    torch.testing.assert_close(record.shares * record.intensity[..., None], record.coefficients)
    assert record.names[0] == "0+" and record.names[UNITS] == "0-"
    assert torch.equal(record.dictionary[UNITS:], -record.dictionary[:UNITS])


@pytest.mark.parametrize("kernel, values, gated", CASES)
def test_gradients_of_every_parameter(kernel, values, gated):
    layer, x = make_layer(kernel, values, gated), make_inputs(3).requires_grad_(True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize("kernel, values, gated", CASES)
def test_blocks_of_tokens_change_neither_output_nor_gradients(kernel, values, gated):
    whole, x = make_layer(kernel, values, gated), make_inputs(9)
    blocks = make_layer(kernel, values, gated)
    blocks.activation_bytes = 1  # one token at once
    for layer in (whole, blocks):
        layer(x).square().sum().backward()
    for (name, one), (_, other) in zip(
        whole.named_parameters(), blocks.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_no_token_and_any_shape():
    layer = make_layer()
    assert layer(make_inputs(0)).shape == (0, SIZE)
    x = make_inputs(6)
    torch.testing.assert_close(layer(x.view(2, 3, SIZE)), layer(x).view(2, 3, SIZE))


def test_half_precision_keeps_its_dtype_and_is_near():
    layer, x = make_layer(dtype=torch.float32), make_inputs(dtype=torch.float32)
    expected = layer(x)
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 0.05 * expected.norm()


def test_a_compiler_makes_one_graph():
    layer, x = make_layer(dtype=torch.float32), make_inputs(dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_settings_say_which_layer_is_made():
    free = LayerConfig(KernelFFNConfig(init="single"), SIZE, UNITS, {"epsilon": 1.0, "scale": 1.0})
    assert type(make_ffn(free)) is KernelFFN
    assert type(make_ffn(make_layer().config)) is TiedKernelFFN


def test_pieces_cost_few_parameters():
    settings = KernelFFNConfig(kernel="root-half-yat", values="product", rows="tied", pieces=8)
    layer = TiedKernelFFN(
        LayerConfig(settings, 576, 1536, {"epsilon": 1.0, "scale": 1.0}, gated=True)
    )
    count = sum(parameter.numel() for parameter in layer.parameters())
    assert count <= 1.02 * 3 * 576 * 1536


def test_brownian_is_positive_definite_and_its_product_too():
    """In a unit's plane, between points that need not be the layer's own."""
    draw = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel = get_kernel("brownian")
    grams = [kernel.value(side[:, None], None, knot=side) for side in draw.T]
    for gram in (*grams, grams[0] * grams[1]):
        assert (gram >= 0).all()
        assert torch.linalg.eigvalsh(gram).min() > -1e-12
        torch.testing.assert_close(gram, gram.T)


def test_brownian_product_is_the_sum_over_points_of_the_plane():
    """Values are fixed over ±v_i: prototypes stand where g·x is a knot and u·x is ±far."""
    layer, x = make_layer("brownian"), make_inputs()
    kernel = get_kernel("brownian")
    gate, up = layer.input_prototypes(x), layer.value_proj(x)
    far = layer.config.reference["far"]
    written = layer.output_prototypes.bias.expand(len(x), -1)
    for knot, amount in zip(layer.pieces["knot"], layer.pieces["amount"], strict=True):
        along = kernel.value(gate, None, knot=knot) * amount * layer.positive("scale")
        for sign in (1, -1):
            across = kernel.value(up, None, knot=torch.full_like(knot, sign * far))
            written = written + (along * across * sign) @ layer.output_prototypes.weight.T
    torch.testing.assert_close(layer(x), written)


def test_free_rows_have_no_knots():
    with pytest.raises(InputError, match="rows 'free', expected rows 'tied'"):
        KernelFFNConfig(kernel="brownian")
    fixed = KernelFFNConfig(rows="tied", values="fixed")
    with pytest.raises(InputError, match="expected 'product'"):
        resolve_defaults(fixed, gated_teacher=True)


def test_root_half_yat_is_the_root():
    score = torch.linspace(-2, 2, 9, dtype=torch.float64)
    distance2 = torch.linspace(0, 3, 9, dtype=torch.float64)
    epsilon = torch.tensor(0.5, dtype=torch.float64)
    root, half = get_kernel("root-half-yat"), get_kernel("half-yat")
    expected = half.value(score, distance2, epsilon).sqrt()
    torch.testing.assert_close(root.value(score, distance2, epsilon), expected)
    torch.testing.assert_close(root.log(score, distance2, epsilon).exp(), expected)
    assert root.log(score, distance2, epsilon)[0] == -math.inf
