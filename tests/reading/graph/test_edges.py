"""Edges are exact: those into a node add up to it, and each is what a loop by hand finds."""

import pytest
import torch
from letters import Letters
from tiny_families import tiny

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.reading import trace
from hf_kernel_ffn.reading.attribution import logit_split
from hf_kernel_ffn.reading.graph import attribution_graph
from hf_kernel_ffn.reading.graph.attributor import Attributor, Target

FAMILIES = (
    *("llama", "mistral", "gpt2", "qwen2", "qwen3", "gemma", "gemma3_text", "starcoder2", "olmo"),
    *("olmo2", "olmo3", "granite", "cohere", "cohere2", "smollm3", "exaone4", "ministral"),
    "nemotron",
)
STUDENTS = {
    "default": {"rows": "tied", "kernel": "brownian", "values": "product"},
    "tied, half-yat, fixed": {"rows": "tied", "kernel": "half-yat"},
    "tied, yat, product": {"rows": "tied", "kernel": "yat", "values": "product"},
    "tied, threshold": {"rows": "tied", "simplex": "threshold", "top_k": 6},
    "tied, top-k, linear map": {"rows": "tied", "simplex": "top-k", "top_k": 6, "skip": True},
    "exponential": {"kernel": "exponential"},
    "gaussian": {"kernel": "gaussian"},
    "half-yat": {},
    "yat without intensity": {"kernel": "yat", "intensity": "none"},
    "gate": {"intensity": "gate"},
    "sparsemax": {"simplex": "sparsemax"},
    "entmax": {"simplex": "entmax-1.5", "intensity": "none"},
    "top-k": {"simplex": "top-k", "top_k": 6},
    "threshold": {"simplex": "threshold", "top_k": 6},
    "gated values": {"values": "gated", "simplex": "top-k", "top_k": 6},
    "temperature": {"temperature": 0.7},
}
ROUNDING = 1e-6
"""RMSNorms of transformers compute in float32 even in a float64 model."""


def assert_exact(graph):
    """The law: all edges add up to the value."""
    values = graph.values()
    total = graph.edges.double().sum(-1) + graph.elsewhere + graph.gaps
    assert torch.allclose(total, values, rtol=1e-9, atol=1e-12)
    assert graph.rounding() < ROUNDING
    assert (graph.gaps.abs() <= ROUNDING * (values.abs() + 1e-6)).all()


@pytest.mark.parametrize("heads", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_edges_into_a_node_add_up_to_it(family, heads, ids):
    model = tiny(family, "AutoModelForCausalLM").double()
    graph = attribution_graph(model, Letters(), ids[0, :10], nodes=24, heads=heads)
    assert_exact(graph)
    assert graph.remainder_share() == 0
    assert {node.kind for node in graph.nodes} >= {"logit", "unit", "embedding"}
    assert heads == any(node.kind == "head" for node in graph.nodes)


class LettersAfterStart(Letters):
    """Letters behind a start token."""

    bos_token_id = 1


@pytest.mark.parametrize("heads", (False, True))
@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma3_text"))
def test_what_the_start_token_has_written_is_one_node_a_layer(family, heads, ids):
    model = tiny(family, "AutoModelForCausalLM").double()
    prompt = ids[0, :8].clone()
    prompt[0] = LettersAfterStart.bos_token_id
    few = attribution_graph(model, LettersAfterStart(), prompt, nodes=24, heads=heads)
    assert_exact(few)

    options = {"nodes": 10_000, "heads": heads}
    graph = attribution_graph(model, LettersAfterStart(), prompt, **options)
    whole = attribution_graph(model, LettersAfterStart(), prompt, start_units=True, **options)
    inner = ("unit", "head")
    assert all(node.position > 0 for node in graph.nodes if node.kind in inner)
    layers = [node.layer for node in graph.nodes if node.kind == "start"]
    assert layers and len(set(layers)) == len(layers)
    folded = sum_of_start(graph, ("start",))
    unfolded = sum_of_start(whole, inner)
    assert max(map(abs, folded.values())) > 0
    assert folded == pytest.approx({name: unfolded[name] for name in folded}, rel=1e-5, abs=1e-9)


def sum_of_start(graph, kinds):
    """What sources of these kinds at the first token add to each node."""
    chosen = [node.kind in kinds and node.position == 0 for node in graph.nodes]
    sums = graph.edges[:, torch.tensor(chosen)].double().sum(-1).tolist()
    return {node.id: each for node, each in zip(graph.nodes, sums, strict=False)}


@pytest.mark.parametrize("name", STUDENTS)
def test_students_of_every_kind_have_no_remainder(name, make_teacher, ids):
    settings = KernelFFNConfig(**STUDENTS[name])
    student, _ = convert(make_teacher("llama").double(), settings, calibration_ids=ids, copy=True)
    graph = attribution_graph(student.double(), Letters(), ids[0, :10], nodes=24)
    assert_exact(graph)
    assert graph.remainder_share() == 0


def test_a_student_that_is_converted_in_part(make_teacher, ids):
    teacher = make_teacher("gpt2").double()
    student, _ = convert(teacher, calibration_ids=ids, layers="1", copy=True)
    graph = attribution_graph(student.double(), Letters(), ids[0, :10], nodes=60)
    assert_exact(graph)
    assert graph.remainder_share() == 0
    names = {node.layer: node.name for node in graph.nodes if node.kind == "unit"}
    assert names[1][-1] in "+-" and names[0].isdigit()


def test_the_derivative_leaves_a_named_rest(make_teacher, ids):
    model = make_teacher("llama").double()
    graph = attribution_graph(model, Letters(), ids[0, :10], nodes=24, rule="derivative")
    assert_exact(graph)
    assert graph.remainder_share() > 0.01
    assert any(node.name == "curvature" for node in graph.nodes)


def test_an_ffn_of_no_known_form_is_a_remainder(make_teacher, ids):
    from hf_kernel_ffn.evaluation.baselines import TeacherFFN
    from hf_kernel_ffn.families.lookup import find_stock_ffn
    from hf_kernel_ffn.families.weights import read_stock_weights

    model = make_teacher("llama").double()
    weights = read_stock_weights(model, find_stock_ffn(model, "layers.1.mlp"))
    student, _ = convert(model, calibration_ids=ids, copy=True)
    student = student.double()
    student.model.layers[1].mlp = TeacherFFN(weights).double()
    graph = attribution_graph(student, Letters(), ids[0, :10], nodes=60)
    assert_exact(graph)
    rows = [
        place for place, node in enumerate(graph.nodes) if (node.kind, node.layer) == ("unit", 1)
    ]
    assert rows
    for place in rows:
        (source,) = graph.edges[place].nonzero()[:, 0].tolist()
        assert graph.nodes[source].kind == "remainder" and graph.nodes[source].layer == 1
    assert 0 < graph.remainder_share() < 1


def test_capped_logits_leave_a_named_remainder(ids):
    model = tiny("gemma2", "AutoModelForCausalLM").double()
    graph = attribution_graph(model, Letters(), ids[0, :10], nodes=24)
    assert_exact(graph)
    last = [node for node in graph.nodes if node.kind == "remainder"]
    assert [(node.layer, node.position) for node in last] == [(graph.layers, 9)]


def test_edges_of_the_last_layer_are_the_parts_of_the_logit(make_teacher, ids):
    model = make_teacher("mistral").double()
    graph = attribution_graph(model, Letters(), ids[0, :10], target=5, against=7, nodes=200)
    split = logit_split(trace(model, Letters(), ids[0, :10]), 5, 7)
    assert graph.values()[0].item() == pytest.approx(split.value, rel=1e-9)
    amounts = {part.name: part.amount for part in split.parts if part.layer == 2}
    found = 0
    for place, node in enumerate(graph.nodes):
        if node.kind == "unit" and node.layer == 2:
            assert graph.edges[0, place].item() == pytest.approx(amounts[node.name], rel=1e-5)
            found += 1
    assert found > 5


def push_through(model, states, block, given):
    """What is left of ``given`` (T, d) written before ``block`` after its attention, by hand."""
    layer = model.model.layers[block]
    before, pattern = states
    scale = (before.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    normed = given / scale * layer.input_layernorm.weight
    values = normed @ layer.self_attn.v_proj.weight.T
    heads = pattern.shape[0]
    size = values.shape[1] // model.config.num_key_value_heads
    written = torch.zeros_like(given)
    for head in range(heads):
        group = head * model.config.num_key_value_heads // heads
        value = values[:, group * size : (group + 1) * size]
        out = layer.self_attn.o_proj.weight[:, head * size : (head + 1) * size]
        written += pattern[head] @ value @ out.T
    return given + written


def test_an_edge_is_what_a_loop_by_hand_finds(make_teacher, ids):
    """From units of block 0 at every token to one unit of block 2, through two attentions."""
    model = make_teacher("llama").double()
    prompt = ids[0, :8]
    passed = trace(model, Letters(), prompt)
    attributor = Attributor(
        model, prompt, heads=False, rule="half", against=None, folds_start=False
    )
    position, unit = 6, 17
    rows = attributor.read_rows([Target("unit", 2, position, unit)])
    edges = rows.edges[0, attributor.table.place("unit", 0)].view(8, -1)

    mlp = model.model.layers[2].mlp
    inputs = passed.ffn_inputs["layers.2.mlp"][position]
    gate = mlp.gate_proj.weight[unit] @ inputs
    up = mlp.up_proj.weight[unit] @ inputs
    reads = mlp.gate_proj.weight[unit] * gate.sigmoid() * up / 2
    reads = reads + mlp.up_proj.weight[unit] * torch.nn.functional.silu(gate) / 2
    assert rows.values[0].item() == pytest.approx((reads @ inputs).item(), rel=1e-6)

    record = passed.ffn("layers.0.mlp")
    for token, source in ((2, 3), (6, 40), (0, 11)):
        given = torch.zeros(8, 32, dtype=torch.float64)
        given[token] = record.coefficients[token, source] * record.dictionary[source]
        for block in (1, 2):
            states = passed.states[block - 1], passed.attention[block]
            given = push_through(model, states, block, given)
        block = model.model.layers[2]
        with torch.no_grad():
            hidden = block.self_attn(
                block.input_layernorm(passed.states[1][None]),
                position_embeddings=model.model.rotary_emb(
                    passed.states[1][None], torch.arange(8)[None]
                ),
                attention_mask=torch.full((8, 8), -torch.inf, dtype=torch.float64).triu(1)[
                    None, None
                ],
            )[0][0]
        state = passed.states[1][position] + hidden[position]
        scale = (state.square().mean() + model.config.rms_norm_eps).sqrt()
        read = reads * block.post_attention_layernorm.weight / scale
        expected = (read @ given[position]).item()
        assert edges[token, source].item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert not edges[7].any()


def test_what_is_refused(make_teacher, ids):
    model = make_teacher("llama")
    with pytest.raises(InputError, match="found nodes 0, expected at least 1"):
        attribution_graph(model, Letters(), ids[0], nodes=0)
    with pytest.raises(InputError, match="found rule 'other', expected one of half"):
        attribution_graph(model, Letters(), ids[0], rule="other")
    with pytest.raises(InputError, match="a prompt without a token"):
        attribution_graph(model, Letters(), ids[0, :0])
    with pytest.raises(InputError, match="which is 2 tokens .* expected one token"):
        attribution_graph(model, Letters(), ids[0], target="ab")
    with pytest.raises(InputError, match="expected an id from 0 to 299"):
        attribution_graph(model, Letters(), ids[0], target=300)
    with pytest.raises(InputError, match="found nothing on attention in the entry for 'bloom'"):
        attribution_graph(tiny("bloom", "AutoModelForCausalLM"), Letters(), ids[0])
    with pytest.raises(InputError, match="found a model in torch.bfloat16, expected float32"):
        attribution_graph(make_teacher("llama").bfloat16(), Letters(), ids[0])
    with pytest.raises(InputError, match="which has no unembedding"):
        attribution_graph(tiny("bert", "AutoModel"), Letters(), ids[0])


def test_the_model_is_left_as_it_was(make_teacher, ids):
    model = make_teacher("gpt2")
    before = model.config._attn_implementation
    with torch.no_grad():
        logits = model(input_ids=ids[:1]).logits
    attribution_graph(model, Letters(), ids[0], nodes=4)
    assert model.config._attn_implementation == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids[:1]).logits, logits)


def test_remembered_edges_are_the_largest(make_teacher, ids, monkeypatch):
    """A graph that remembers few edges of a node has the same sums."""
    from hf_kernel_ffn.reading.graph import expansion

    model = make_teacher("llama").double()
    whole = attribution_graph(model, Letters(), ids[0, :10], nodes=40)
    monkeypatch.setattr(expansion, "EDGES_KEPT", 64)
    some = attribution_graph(model, Letters(), ids[0, :10], nodes=40)
    assert_exact(some)
    is_unit = torch.tensor([node.kind == "unit" for node in some.nodes])
    assert (some.edges[:, is_unit] != 0).sum() < (whole.edges != 0).sum()
    assert [node.id for node in some.nodes[:20]] == [node.id for node in whole.nodes[:20]]
