"""Readings are right whatever norm a family has: gains of 1 + weight, none, means subtracted."""

import pytest
import torch
from letters import Letters
from tiny_families import tiny
from torch import nn

from hf_kernel_ffn import InputError
from hf_kernel_ffn.reading import trace, tracing
from hf_kernel_ffn.reading.attribution import logit_split
from hf_kernel_ffn.reading.lens import fit_lens, lens_kl
from hf_kernel_ffn.reading.model_parts import (
    get_blocks,
    get_final_norm,
    get_qkv_weights,
    get_unembedding,
)
from hf_kernel_ffn.reading.naming import feeds, written
from hf_kernel_ffn.reading.norms import find_attention_norms, linearise_norm, measure_norm
from hf_kernel_ffn.reading.steering import _find_direction
from hf_kernel_ffn.reading.summary import summary

SPLIT = (
    "llama",
    "gpt2",
    "mistral",
    "gemma",
    "nemotron",
    "olmo",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
    "ministral",
)
"""Families whose parts add up to the residual stream."""
POST_NORM = ("gemma2", "gemma3_text", "olmo2", "olmo3", "granite", "cohere", "cohere2", "exaone4")
"""Families whose parts do not: norms or factors on what is written, scaled or capped logits."""


@pytest.fixture(scope="module", params=SPLIT)
def model(request):
    return tiny(request.param, "AutoModelForCausalLM")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_logit_is_the_sum_of_its_parts(model, ids, dtype):
    model = model.to(dtype)
    passed = trace(model, Letters(), ids[0])
    for token, against, position in ((None, None, -1), (5, 7, 9), (11, None, 0)):
        split = logit_split(passed, token, against, position)
        limit = 1e-4 if dtype == torch.float32 else 0.1
        assert abs(split.remainder) < limit and len(split.parts) > 50
    model.float()


@pytest.mark.parametrize("family", POST_NORM)
def test_what_cannot_be_split_is_refused(family, ids):
    model = tiny(family, "AutoModelForCausalLM")
    passed = trace(model, Letters(), ids[0])
    with pytest.raises(InputError, match=f"expected rounding: a '{family}' has norms"):
        logit_split(passed)
    found = summary(passed, Letters(), -1)["logit"]
    assert found["parts"] == [] and found["remainder"] == found["value"] and "reason" in found


@pytest.mark.parametrize(
    "family, scale",
    [
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("gemma2", {"final_logit_softcapping": 1.0}),
    ],
)
def test_a_lens_refuses_scaled_logits(family, scale, ids):
    model = tiny(family, "AutoModelForCausalLM", **scale)
    for function in (lambda: lens_kl(model, None, ids), lambda: fit_lens(model, ids)):
        with pytest.raises(InputError, match="scales or caps its logits"):
            function()


def test_the_logit_lens_ends_at_the_model(model, ids):
    assert lens_kl(model, None, ids[:2])[-1] == pytest.approx(0, abs=1e-6)


def test_a_norm_is_measured(model):
    norm, size = get_final_norm(model), model.config.hidden_size
    response = measure_norm(norm, torch.zeros(1, size))
    states = torch.randn(5, size, generator=torch.Generator().manual_seed(0))
    numerator = response.numerator(states)
    written_there = norm(states) - response.shift.float()
    ratio = (written_there * numerator).sum(-1) / numerator.square().sum(-1)
    assert torch.allclose(ratio[:, None] * numerator, written_there, atol=1e-5)
    direction = torch.randn(size, generator=torch.Generator().manual_seed(1))
    pulled = response.pull_back(direction) @ states[0]
    assert pulled.item() == pytest.approx((direction @ numerator[0]).item(), rel=1e-4)


@pytest.mark.parametrize("size", [7, 32])
def test_the_parameters_of_known_norms(size):
    norm = nn.LayerNorm(size)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    response = measure_norm(norm, torch.zeros(size))
    assert response.centred and torch.allclose(response.gain.float(), norm.weight, atol=1e-6)
    assert torch.allclose(response.shift.float(), norm.bias, atol=1e-5)
    norm = nn.RMSNorm(size, eps=1e-3)
    nn.init.normal_(norm.weight)
    response = measure_norm(norm, torch.zeros(size))
    assert not response.centred and torch.allclose(response.gain.float(), norm.weight, atol=1e-6)
    assert response.shift.abs().max() == 0


def test_what_is_no_norm_is_refused():
    state = torch.randn(8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="found a Tanh as the norm"):
        linearise_norm(nn.Tanh(), state, torch.ones(8))


def test_the_direction_that_raises_a_token_does(model, ids):
    passed = trace(model, Letters(), ids[0])
    direction, state = _find_direction(passed, 17).double(), passed.states[-1][-1].double()
    head, norm = get_unembedding(model).double(), get_final_norm(model)

    def logit(state):
        return (head[17] @ norm(state.float()).double()).item()

    def slope_along(way):
        return (logit(state + 1e-2 * way) - logit(state - 1e-2 * way)) / 2e-2

    slope = slope_along(direction)
    for seed in range(5):
        other = torch.randn(len(state), generator=torch.Generator().manual_seed(seed)).double()
        other = other - other @ state / state.square().sum() * state
        assert slope_along(other / other.norm()) < slope + 1e-3


def test_what_a_direction_writes_is_what_it_adds(model):
    """A large state in a direction has the logits that are said of it, over the norm's scale."""
    norm, size = get_final_norm(model), model.config.hidden_size
    direction = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far = 1e6 * direction
    logits = get_unembedding(model) @ (norm(far.float()) - norm(-far.float())) / 2
    found = written(model, Letters(), direction[None], top=3)[0]
    best = logits.topk(3)
    assert [text for text, _ in found.promoted] == [f"<{i}>" for i in best.indices.tolist()]
    centred = measure_norm(norm, direction).centred
    scale = (direction - direction.mean() if centred else direction).square().mean().sqrt().item()
    amounts = [value / scale for _, value in found.promoted]
    assert amounts == pytest.approx(best.values.tolist(), rel=1e-3)


def test_the_norm_before_attention_is_found_by_what_it_hands_on(model):
    name = "ln_1" if model.config.model_type == "gpt2" else "input_layernorm"
    expected = [getattr(block, name) for block in get_blocks(model)]
    assert find_attention_norms(model) == expected


def test_attention_that_reads_the_stream_itself():
    assert find_attention_norms(tiny("olmo2", "AutoModelForCausalLM")) == [None, None]


def test_heads_are_fed_through_the_gain(model):
    size = model.config.hidden_size
    directions = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    norm = find_attention_norms(model)[1]
    found = feeds(model, 0, directions, ("a", "b", "c"), top=2)
    handed = torch.nn.functional.normalize(norm(1e6 * directions) - norm(-1e6 * directions), dim=-1)
    assert len(found) == 6
    weights = dict(zip(("query", "key", "value"), get_qkv_weights(model, 1), strict=True))
    for row in found:
        part = weights[row.role].split(8)[row.head]  # head_dim
        expected = (part @ handed["abc".index(row.prototype)]).norm() / part.norm() * size**0.5
        assert row.gain == pytest.approx(expected.item(), rel=1e-3)


def test_an_untouched_trace_and_summary_compute_each_record_once(ids, monkeypatch):
    model, asked = tiny("llama", "AutoModelForCausalLM", num_hidden_layers=4), []
    original = tracing.ffn_readout

    def count(model, path, inputs):
        asked.append(path)
        return original(model, path, inputs)

    monkeypatch.setattr(tracing, "ffn_readout", count)
    passed = trace(model, Letters(), ids[0])
    summary(passed, Letters())
    assert asked == list(passed.ffn_inputs) and len(asked) == 4
