"""One pass as records: what it keeps adds up to the model, and is said as far as it allows."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from letters import Letters

from hf_kernel_ffn import InputError, KernelFFNConfig, Readout, convert
from hf_kernel_ffn.reading import model_parts, trace, tracing
from hf_kernel_ffn.reading.attribution import logit_split
from hf_kernel_ffn.reading.contexts import BEFORE, SKIP, contexts
from hf_kernel_ffn.reading.lens import TunedLens, fit_lens, lens_kl
from hf_kernel_ffn.reading.naming import aligned, feeds, nearest_tokens, written
from hf_kernel_ffn.reading.regimes import contributions, mixtures, nonlinearities, regime, shares
from hf_kernel_ffn.reading.rules import export_contexts, rules


@pytest.fixture(scope="module", params=("llama", "gpt2", "mistral"))
def pair(request, make_teacher, ids):
    """A teacher and a student of it, in float64."""
    teacher = make_teacher(request.param).double()
    student, _ = convert(teacher, KernelFFNConfig(), calibration_ids=ids, layers="0,2", copy=True)
    return teacher, student.double()


@pytest.fixture(scope="module", params=("teacher", "student"))
def model(request, pair):
    return pair[request.param == "student"]


def test_a_pass_is_the_models_own(model, ids):
    with torch.no_grad():
        logits = model(input_ids=ids[:1]).logits[0]
    before = model.config._attn_implementation
    found = trace(model, Letters(), ids[0])
    assert (
        torch.allclose(found.logits, logits, atol=1e-5)
        and model.config._attn_implementation == before
    )
    assert found.positions == list(range(32)) and found.tokens[0] == f"<{ids[0, 0]}>"


def test_chunks_and_positions_change_nothing(model, ids, monkeypatch):
    whole = trace(model, Letters(), ids[0])
    monkeypatch.setattr(tracing, "CHUNK", 5)
    some = trace(model, Letters(), ids[0], [-1, 3, 20])
    assert some.positions == [3, 20, 31]
    for a, b in zip(
        (whole.embedding, whole.logits, *whole.states), (some.embedding, some.logits, *some.states)
    ):
        assert torch.allclose(a[some.positions], b, atol=1e-5)
    for a, b in zip(whole.attention, some.attention):
        assert torch.allclose(a[:, some.positions], b, atol=1e-5)
    for a, b in zip(whole.values, some.values):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_residual_stream_is_the_sum_of_what_was_written(model, ids):
    found = trace(model, Letters(), ids[0])
    for layer, path in enumerate(found.ffn_inputs):
        if layer == 0:
            continue
        for position in (0, 9, 31):
            state = found.states[layer - 1][position] + found.ffn(path).output()[position]
            state = state + sum(found.head(layer, head, position).output()[0] for head in range(4))
            bias = getattr(
                model_parts.get_attention(model, layer), model_parts.get_family(model).attention_out
            ).bias
            state = state if bias is None else state + bias
            assert torch.allclose(state, found.states[layer][position], atol=1e-9)
            assert regime(found.head(layer, 0, position)).name == "convex"


def test_positions_that_are_not_there(model, ids):
    with pytest.raises(InputError, match="found a prompt without a token"):
        trace(model, Letters(), ids[0, :0])
    with pytest.raises(InputError, match="expected numbers from -32 to 31"):
        trace(model, Letters(), ids[0], [32])
    found = trace(model, Letters(), ids[0], [4, 5, 9])
    with pytest.raises(InputError, match="one of those kept: 4-5, 9"):
        found.at(-1)
    with pytest.raises(InputError, match="found no FFN"):
        found.ffn("layers.9.mlp")


def test_a_logit_is_the_sum_of_its_parts(model, ids):
    found = trace(model, Letters(), ids[0])
    for token, against, position in ((5, 7, 9), (None, None, -1), (11, None, 0)):
        split = logit_split(found, token, against, position)
        place = found.at(position)
        token = int(found.logits[place].argmax()) if token is None else token
        value = found.logits[place, token] - (
            0 if against is None else found.logits[place, against]
        )
        assert split.value == pytest.approx(value.item(), abs=1e-12) and abs(split.remainder) < 1e-5
        assert sum(part.amount for part in split.parts) + split.remainder == pytest.approx(
            split.value
        )
        assert sum(split.kinds().values()) == pytest.approx(split.value - split.remainder)
        sizes = [abs(part.amount) for part in split.parts]
        assert sizes == sorted(sizes, reverse=True)
        assert split.parts.to_pandas().shape == (len(split.parts), 4)


def record(coefficients, dictionary=None, bias=None):
    c = torch.tensor(coefficients, dtype=torch.float64)
    v = (
        torch.eye(c.shape[-1], dtype=torch.float64)
        if dictionary is None
        else torch.tensor(dictionary, dtype=torch.float64)
    )
    return Readout(c, v, bias, None, None, tuple(map(str, range(c.shape[-1]))))


@pytest.mark.parametrize(
    "coefficients, name",
    [
        ([[0.5, 0.5], [1.0, 0.0]], "convex"),
        ([[0.5, 0.6], [1.0, 0.0]], "conic"),
        ([[1.5, -0.5], [1.0, 0.0]], "affine"),
        ([[1.5, -0.6], [1.0, 0.0]], "linear"),
    ],
)
def test_the_four_regimes(coefficients, name):
    found = regime(record(coefficients))
    assert found.name == name and found.has_shares == (name in ("convex", "conic"))
    if found.has_shares:
        assert torch.allclose(
            shares(record(coefficients)).sum(-1), torch.ones(2, dtype=torch.float64)
        )
    else:
        with pytest.raises(InputError, match=f"negative coefficients in a {name} readout"):
            shares(record(coefficients))


def test_students_have_shares_and_teachers_have_not(pair, ids):
    teacher, student = (trace(model, Letters(), ids[0]) for model in pair)
    path = list(teacher.ffn_inputs)[0]
    assert regime(teacher.ffn(path)).name == "linear" and regime(student.ffn(path)).name == "conic"
    assert contributions(teacher.ffn(path))[0].share is None
    assert sum(part.share for part in contributions(student.ffn(path))) == pytest.approx(1)


@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6), st.integers(0, 10))
def test_contributions_are_an_exact_split(numbers, seed):
    c = torch.tensor(numbers, dtype=torch.float64)[None]
    v = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    parts = contributions(Readout(c, v, None, None, None, tuple("abcdef")))
    total = sum(
        (part.coefficient * v[part.prototype] for part in parts),
        torch.zeros(4, dtype=torch.float64),
    )
    assert torch.allclose(total, (c @ v)[0])
    assert sum(part.along for part in parts) == pytest.approx(total.norm().item(), abs=1e-9)
    assert [part.norm for part in parts] == sorted((part.norm for part in parts), reverse=True)


def test_a_small_output_is_diagnosed():
    loud, silent, opposed = [3.0, 0.1, 0.0], [0.01, 0.0, 0.0], [3.0, 0.0, 2.99]
    dictionary = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    found = mixtures(record([loud, loud, loud, loud, silent, opposed, [0.0] * 3], dictionary))
    assert [m.diagnosis for m in found[3:]] == [
        "written",
        "nothing fired",
        "strong messages cancelled",
        "nothing fired",
    ]
    assert found[-1].entropy == 0 and found[-1].effective == 0 and found[-1].active == 0
    even = mixtures(record([[1.0, 1.0, 1.0, 1.0]]))[0]
    assert even.effective == pytest.approx(4) and even.entropy == pytest.approx(
        torch.tensor(4.0).log().item()
    )
    assert even.coherence == pytest.approx(0.5) and (even.positive_mass, even.negative_mass) == (
        4,
        0,
    )


def test_the_same_scores_in_every_regime(pair, ids):
    found = trace(pair[1], Letters(), ids[0])
    path = list(found.ffn_inputs)[0]
    where = {
        n.nonlinearity: n.regime
        for n in nonlinearities(pair[1].kernel_ffns()[path], found.ffn_inputs[path])
    }
    assert where == {
        "ReLU": "conic",
        "GELU": "linear",
        "tanh": "linear",
        "scores over their sum": "affine",
        "softmax": "convex",
        "half-yat × mass": "conic",
        "half-yat / mass": "convex",
    }


def test_what_a_direction_writes(model):
    weight = model_parts.get_unembedding(model)
    found = written(model, Letters(), torch.stack([weight[17] * 50, -weight[17] * 50]), top=3)
    norm = model.base_model.get_submodule(model_parts.get_family(model).final_norm)
    direction = weight[17] * 50
    direction = direction - direction.mean() if isinstance(norm, torch.nn.LayerNorm) else direction
    logits = weight @ (direction * norm.weight)
    best = logits.topk(3)
    assert [text for text, _ in found[0].promoted] == [f"<{i}>" for i in best.indices.tolist()]
    assert [value for _, value in found[0].promoted] == pytest.approx(
        best.values.tolist(), rel=1e-4
    )
    assert found[1].suppressed[0][0] == found[0].promoted[0][0]


def test_alignment_with_a_basis():
    basis = torch.eye(4)
    found = aligned(
        torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, -2.0, 0.0]]), ("a", "b"), basis, list("wxyz")
    )
    assert [(entry.prototype, entry.feature) for entry in found] == [("a", "x"), ("b", "y")]
    assert found[1].cosine == pytest.approx(-2 / 5**0.5)


def test_which_later_heads_listen(model):
    layer, heads = 2, model_parts.get_attention(model, 2)
    family = model_parts.get_family(model)
    queries = model_parts.get_projection_weight(getattr(heads, family.qkv[0]))
    weight = queries[:8]  # of head 0
    block = model.base_model.get_submodule(f"{family.layers}.{layer}")
    gain = next(
        module for name, module in block.named_children() if "norm" in name or name.startswith("ln")
    ).weight
    loudest = torch.linalg.svd(weight).Vh[0] / gain
    found = feeds(model, 1, loudest[None], ("p",), top=1)[0]
    assert (found.layer, found.head, found.role) == (2, 0, "query") and found.gain > 1.5
    assert feeds(model, 2, loudest[None], ("p",)) == []


def test_the_nearest_tokens_fire_most(model):
    path = model_parts.list_ffn_paths(model)[0]
    found = nearest_tokens(model, Letters(), path, top=2)
    norm = model.base_model.get_submodule(
        f"{path.rsplit('.', 1)[0]}.{model_parts.get_family(model).ffn_norm}"
    )
    c = model_parts.ffn_readout(model, path, norm(model.get_input_embeddings().weight)).coefficients
    for prototype in (0, 5):
        best = c[:, prototype].abs().topk(2).indices
        assert found[prototype] == [
            (f"<{i}>", pytest.approx(c[i, prototype].item(), rel=1e-4)) for i in best.tolist()
        ]


def test_contexts_are_the_same_in_any_batches(model, ids, tmp_path):
    whole, parts = contexts(model, [ids], top=5), contexts(model, ids.split(3), top=5)
    path = list(whole)[0]
    a, b = whole[path], parts[path]
    assert (
        torch.allclose(a.values, b.values)
        and torch.equal(a.fired, b.fired)
        and a.tokens == b.tokens == 8 * (32 - SKIP)
    )
    assert torch.allclose(a.mass, b.mass) and torch.equal(a.windows[:, 0], b.windows[:, 0])
    firing = a.activations[:, :, BEFORE].abs()
    assert torch.allclose(firing.where(a.values > 0, 0.0), a.values)
    seen = set(map(tuple, ids.unfold(1, 11, 1).flatten(0, 1).tolist()))
    for window in a.windows[:, 0].tolist():
        assert -1 in window or tuple(window) in seen
    found = rules(model, Letters(), path, a, a.most_used(4))
    assert len(found) == 4 and all(rule.when_context.count("»") == 1 for rule in found)
    lines = export_contexts(model, Letters(), whole, tmp_path / "contexts.jsonl")
    read = [json.loads(line) for line in (tmp_path / "contexts.jsonl").read_text().splitlines()]
    assert len(read) == lines == sum(int((entry.fired > 0).sum()) for entry in whole.values())
    assert all(len(c["tokens"]) == len(c["activations"]) for line in read for c in line["contexts"])


def test_usage_and_purity(llama, ids):
    student, _ = convert(llama, KernelFFNConfig(simplex="top-k", top_k=4), calibration_ids=ids)
    found = contexts(student, [ids], top=5)
    for entry in found.values():
        usage = entry.usage()
        assert [u == "dead" for u in usage] == (entry.fired == 0).tolist()
        purity = entry.purity()
        full = entry.values[:, -1] > 0
        assert (
            torch.equal(purity.isnan(), ~full)
            and ((purity[full] >= 0.2) & (purity[full] <= 1)).all()
        )
    with pytest.raises(InputError, match="expected rows longer than 8"):
        contexts(student, [ids[:, :8]])


def test_the_tuned_lens_reads_better_than_the_logit_lens(model, ids, tmp_path):
    text = torch.cat([ids, ids.roll(1, 1), ids.roll(5, 0).roll(3, 1)])
    lens = fit_lens(model, text, batch_rows=5)
    plain, tuned = lens_kl(model, None, ids), lens_kl(model, lens, ids)
    assert plain[-1] == pytest.approx(0, abs=1e-6) and tuned[-1] == pytest.approx(0, abs=1e-3)
    assert all(b < a for a, b in zip(plain[:-1], tuned[:-1]))
    lens.save(tmp_path / "lens.safetensors")
    again = TunedLens.load(tmp_path / "lens.safetensors")
    assert torch.equal(again.maps, lens.maps) and torch.equal(again.biases, lens.biases)
    v = torch.randn(2, 32)
    assert torch.allclose(lens.directions(0, v), v @ lens.maps[0].T)
    assert written(model, Letters(), v, lens=lens, layer=0) != written(model, Letters(), v)
    (tmp_path / "not.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="found no tuned lens"):
        TunedLens.load(tmp_path / "not.safetensors")
