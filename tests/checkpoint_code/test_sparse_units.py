"""Tied rows of which few units are kept, and the linear map beside them."""

from dataclasses import replace

import pytest
import torch

from hf_kernel_ffn import KernelFFNConfig
from hf_kernel_ffn.checkpoint_code.errors import InputError
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig
from hf_kernel_ffn.checkpoint_code.plan import Form, choose_tied_form
from hf_kernel_ffn.checkpoint_code.tied import TiedKernelFFN

SIZE, UNITS, KEPT = 8, 12, 4
CASES = [("brownian", "product"), ("half-yat", "product"), ("half-yat", "fixed")]


def make_layer(simplex="threshold", kernel="brownian", values="product", skip=False):
    settings = KernelFFNConfig(
        kernel=kernel, values=values, rows="tied", pieces=3, simplex=simplex, top_k=KEPT, skip=skip
    )
    reference = {"epsilon": 2.0, "scale": 1.5, "far": 2.0, "threshold": 0.7}
    torch.manual_seed(0)
    layer = TiedKernelFFN(LayerConfig(settings, SIZE, UNITS, reference, gated=True))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        for parameter in layer.log_ratio.values():
            parameter.mul_(0.1)
    return layer.double().eval()


def make_inputs(count=50):
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(1)).double()


def make_dense(layer):
    """The same weights with all units kept, and without a linear map."""
    settings = replace(layer.config.settings, simplex="softmax", top_k=None, skip=False)
    dense = TiedKernelFFN(replace(layer.config, settings=settings)).double().eval()
    left_out = ("skip", "threshold")
    weights = {k: v for k, v in layer.state_dict().items() if not k.startswith(left_out)}
    dense.load_state_dict(weights)
    return dense


@pytest.mark.parametrize("skip", (False, True))
@pytest.mark.parametrize("kernel, values", CASES)
@pytest.mark.parametrize("simplex", ("threshold", "top-k"))
def test_the_loudest_units_of_the_dense_layer_are_kept_and_no_others(simplex, kernel, values, skip):
    layer, x = make_layer(simplex, kernel, values, skip), make_inputs()
    every = make_dense(layer).coefficients(x)
    loudness = every.abs() * layer.output_prototypes.weight.norm(dim=0)
    if simplex == "threshold":
        kept = loudness >= 0.7
        assert 0 < kept.sum() < kept.numel()
    else:
        kept = loudness >= loudness.sort(-1).values[:, -KEPT, None]
    torch.testing.assert_close(layer.coefficients(x), every * kept)
    expected = layer.output_prototypes(every * kept)
    if skip:
        expected = expected + x @ layer.skip.weight.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("skip", (False, True))
@pytest.mark.parametrize("kernel, values", CASES)
def test_the_record_says_one_prototype_for_each_unit_that_is_kept(kernel, values, skip):
    layer, x = make_layer("top-k", kernel, values, skip), make_inputs()
    record = layer.readout(x)
    assert (record.coefficients >= 0).all()
    assert ((record.coefficients > 0).sum(-1) <= KEPT).all()
    torch.testing.assert_close(record.output(), layer(x))
    assert (record.skip is not None) == skip


@pytest.mark.parametrize("simplex", ("threshold", "top-k"))
def test_gradients_of_the_quick_form_are_those_of_the_formula(simplex, monkeypatch):
    layer, x = make_layer(simplex, skip=True), make_inputs().requires_grad_()
    assert choose_tied_form(layer, x).form is Form.ONE_PASS
    parameters = [x, *layer.parameters()]
    direction = torch.randn_like(x)
    quick = torch.autograd.grad(layer(x), parameters, direction)
    plain = layer.output_prototypes(layer.coefficients(x)) + layer.skip(x)
    expected = torch.autograd.grad(plain, parameters, direction)
    for one, other in zip(quick, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kernel, values", CASES)
def test_a_fitted_threshold_keeps_the_asked_for_number_on_average(kernel, values):
    layer, x = make_layer("threshold", kernel, values), make_inputs(400)
    layer.fit_threshold(x)
    assert (layer.coefficients(x) != 0).sum(-1).double().mean() == pytest.approx(KEPT, abs=0.05)
    before = layer.threshold_log_ratio.clone()
    layer.set_top_k(KEPT // 2)
    layer.fit_threshold(x, rate=0.5)
    moved = layer.threshold_log_ratio - before
    layer.fit_threshold(x)
    assert 0 < moved < layer.threshold_log_ratio - before


def test_what_is_refused():
    with pytest.raises(InputError, match="skip with rows 'free'"):
        KernelFFNConfig(skip=True)
    with pytest.raises(InputError, match="skip='yes'"):
        KernelFFNConfig(rows="tied", skip="yes")
    with pytest.raises(InputError, match="sparsemax"):
        KernelFFNConfig(rows="tied", simplex="sparsemax")


def test_the_regime_names_the_linear_map():
    assert KernelFFNConfig(rows="tied").regime == "conic"
    assert KernelFFNConfig(rows="tied", skip=True).regime == "conic + linear"


@pytest.mark.parametrize("simplex", ("threshold", "top-k"))
@torch.no_grad()
def test_one_token_is_read_as_many_are_and_norms_follow_the_weights(simplex):
    layer, x = make_layer(simplex, skip=True), make_inputs()
    one_by_one = torch.cat([layer(token[None]) for token in x])
    torch.testing.assert_close(one_by_one, layer(x))
    layer.output_prototypes.weight.mul_(torch.linspace(0.1, 3, UNITS))
    fresh = make_layer(simplex, skip=True)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x[:1]), fresh(x[:1]))
    torch.testing.assert_close(layer(x), fresh(x))
