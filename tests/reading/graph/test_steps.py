"""A step writes a coefficient as a linear function of its scores, by the formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import inputs, make_layer

from hf_kernel_ffn.reading.graph.forms import Form, make_free_form
from hf_kernel_ffn.reading.graph.steps import take_step

numbers = st.floats(-6, 6).map(lambda number: 0.0 if abs(number) < 1e-6 else number)


def one(number):
    return torch.tensor([[number]], dtype=torch.float64)


def silu_product(gate, up):
    return torch.nn.functional.silu(gate) * up


@given(numbers, numbers)
def test_a_product_is_halved(gate, up):
    scores = [one(gate), one(up)]
    value = silu_product(*scores)
    step = take_step(Form(silu_product, ()), scores, value)
    explained = step.slopes[0] * gate + step.slopes[1] * up + step.constant + step.rest
    assert torch.allclose(explained, value)
    if gate:
        assert step.slopes[0].item() == pytest.approx(scores[0].sigmoid().item() * up / 2)
    if up:
        assert step.slopes[1].item() == pytest.approx(
            torch.nn.functional.silu(scores[0]).item() / 2
        )


@given(numbers)
def test_one_score_has_the_secant_from_zero(score):
    value = one(score).exp()
    step = take_step(Form(torch.exp, ()), [one(score)], value)
    assert step.constant.item() == 1 and step.rest.item() == 0
    assert step.slopes[0].item() * score == pytest.approx(value.item() - 1)


@given(numbers, numbers)
def test_two_scores_share_what_neither_does_alone(first, second):
    """A function with a baseline and effects of each alone, against the formula."""

    def mix(a, b):
        return (a + 2 * b).exp() + a

    value = mix(one(first), one(second))
    step = take_step(Form(mix, ()), [one(first), one(second)], value)
    none = mix(one(0.0), one(0.0))
    alone = mix(one(first), one(0.0)) - none
    other = mix(one(0.0), one(second)) - none
    together = value - none - alone - other
    if first:
        assert (step.slopes[0] * first).item() == pytest.approx((alone + together / 2).item())
    if second:
        assert (step.slopes[1] * second).item() == pytest.approx((other + together / 2).item())
    assert step.constant.item() == pytest.approx(none.item())


def test_the_derivative_and_its_curvature():
    scores = [one(1.5), one(-2.0)]
    value = silu_product(*scores)
    step = take_step(Form(silu_product, ()), scores, value, rule="derivative")
    sigmoid = scores[0].sigmoid()
    slope = (sigmoid + 1.5 * sigmoid * (1 - sigmoid)) * -2.0
    assert torch.allclose(step.slopes[0], slope)
    assert torch.allclose(step.rest, value - slope * 1.5 - step.slopes[1] * -2.0)


def test_coefficients_without_a_form_are_the_rest():
    step = take_step(Form(None, ()), [one(1.0)], one(3.0))
    assert step.rest.item() == 3 and not step.slopes[0].any()


MAPS = [
    {"simplex": "softmax"},
    {"simplex": "softmax", "temperature": 0.7},
    {"simplex": "softmax", "intensity": "gate"},
    {"simplex": "sparsemax"},
    {"simplex": "entmax-1.5", "intensity": "none"},
    {"simplex": "top-k"},
    {"simplex": "threshold", "temperature": 1.3},
    {"simplex": "top-k", "values": "gated"},
]


@pytest.mark.parametrize("kernel", ("half-yat", "exponential", "gaussian", "exponential-yat"))
@pytest.mark.parametrize("settings", MAPS, ids=str)
def test_a_form_is_the_layer_itself_at_its_own_scores(kernel, settings):
    ffn = make_layer(kernel=kernel, **settings)
    x = inputs()
    form, rows = make_free_form(ffn, x, ffn.readout(x))
    scores = [row.scores(x) for row in rows]
    with torch.no_grad():
        assert torch.allclose(form.evaluate(*scores), ffn.coefficients(x), rtol=1e-9, atol=1e-14)
        moved = form.evaluate(*(score * 0.9 for score in scores))
    assert moved.isfinite().all()
