"""Which form serves a call, and what is said against the others."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from layers import D, inputs, make_layer

from hf_kernel_ffn.checkpoint_code import decode, plan
from hf_kernel_ffn.checkpoint_code.plan import Form, choose_form

DENSE = dict(kernel="half-yat", simplex="softmax", intensity="mass")
SPARSE = dict(kernel="half-yat", simplex="top-k", intensity="mass")


def form_and_reason(ffn, x, form):
    chosen = choose_form(ffn, x)
    return chosen.form, chosen.reasons.get(form)


@pytest.mark.parametrize(
    "settings, count, grad, form",
    [
        (DENSE, 6, True, Form.ONE_PASS),
        (DENSE, 1, True, Form.ONE_PASS),
        (DENSE, 1, False, Form.PLAIN),
        (SPARSE, 6, False, Form.PLAIN),
        (SPARSE, 1, True, Form.PLAIN),
        (SPARSE, 1, False, Form.ONE_TOKEN),
        ({**SPARSE, "simplex": "entmax-1.5"}, 1, False, Form.ONE_TOKEN),
        ({**SPARSE, "simplex": "threshold", "intensity": "gate"}, 1, False, Form.ONE_TOKEN),
        ({**DENSE, "kernel": "gaussian"}, 6, True, Form.PLAIN),
    ],
)
def test_the_form_of_a_call(settings, count, grad, form):
    ffn = make_layer(**settings).eval()
    with torch.set_grad_enabled(grad):
        chosen = choose_form(ffn, inputs(count))
    forms = list(Form)
    assert chosen.form is form
    assert list(chosen.reasons) == forms[: forms.index(form)]  # each of those before it, and why
    assert all(chosen.reasons.values())


def hook(ffn):
    ffn.input_prototypes.register_forward_hook(lambda *_: None)


def drop_out(ffn):
    ffn.train()
    ffn.config = replace(ffn.config, hidden_dropout=0.5)


@pytest.mark.parametrize(
    "settings, change, reason",
    [
        ({"kernel": "gaussian"}, None, "kernel 'gaussian', expected 'yat' or 'half-yat'"),
        ({"temperature": 0.6}, None, "intensity 'mass' at temperature 0.6, expected temperature 1"),
        ({"simplex": "sparsemax"}, None, "simplex 'sparsemax', expected 'softmax'"),
        ({}, hook, "hook or missing bias, expected plain linear modules"),
        ({}, drop_out, "dropout of hidden units, expected none or evaluation"),
        ({}, lambda ffn: ffn.float(), "weights of another dtype, expected that of the input"),
    ],
)
def test_what_is_against_one_pass(settings, change, reason):
    ffn = make_layer(**{**DENSE, **settings})
    if change is not None:
        change(ffn)
    form, said = form_and_reason(ffn, inputs(), Form.ONE_PASS)
    assert form is Form.PLAIN and reason in said


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda ffn: ffn.train(), "training, expected evaluation"),
        (lambda ffn: ffn.output_prototypes.register_forward_hook(lambda *_: None), "hook"),
        (lambda ffn: ffn.float(), "another dtype"),
    ],
)
def test_what_is_against_one_token(change, reason):
    ffn = make_layer(**SPARSE).eval()
    change(ffn)
    with torch.no_grad():
        form, said = form_and_reason(ffn, inputs(1), Form.ONE_TOKEN)
    assert form is Form.PLAIN and reason in said


def test_shapes_that_depend_on_the_data_are_for_a_cpu(monkeypatch):
    monkeypatch.setattr(plan, "has_fixed_shapes", lambda tensor: True)
    monkeypatch.setattr(decode, "has_fixed_shapes", lambda tensor: True)
    x = inputs(1)
    with torch.no_grad():
        assert choose_form(make_layer(**SPARSE).eval(), x).form is Form.ONE_TOKEN
        varying = make_layer(**{**SPARSE, "simplex": "threshold"}).eval()
        form, said = form_and_reason(varying, x, Form.ONE_TOKEN)
    assert form is Form.PLAIN and "expected a CPU" in said


class StandIn:
    """Triton kernels that serve what they are told to."""

    def __init__(self, readout, total):
        self.against = SimpleNamespace(readout=readout, total=total)

    def reason_against_readout(self, ffn, hidden_states):
        return self.against.readout

    def reason_against_sum(self, ffn, hidden_states):
        return self.against.total

    def readout(self, ffn, hidden_states):
        return hidden_states + 1

    def mixture(self, ffn, coefficients):
        return coefficients.new_full((*coefficients.shape[:-1], D), 2.0)


def test_triton_kernels_come_first_and_step_aside():
    dense, sparse = make_layer(**DENSE).eval(), make_layer(**SPARSE).eval()
    x = inputs(1)
    with torch.no_grad():
        dense.fused = StandIn(None, "no")
        assert choose_form(dense, x).form is Form.FUSED
        assert torch.equal(dense(x), x + 1)
        sparse.fused = StandIn("no", None)
        assert choose_form(sparse, x).form is Form.FUSED_SUM
        assert (sparse(x) == 2).all()
        expected = sparse.output_prototypes(sparse.coefficients(x))
        sparse.fused = StandIn("no", "no")
        assert choose_form(sparse, x).form is Form.ONE_TOKEN  # no slower form for being fused
        torch.testing.assert_close(sparse(x), expected)
