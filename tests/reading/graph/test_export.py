"""What is written for other packages is what they read, and says the same."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from letters import Letters
from safetensors.torch import load_file
from tiny_families import tiny

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.reading.graph import (
    attribution_graph,
    export_transcoders,
    graph_data,
    group,
    group_similar,
    label,
    prune,
    write_graph,
)
from hf_kernel_ffn.reading.graph.transcoders import make_transcoder

# What apps/webapp/app/api/graph/graph-schema.json of Neuronpedia (github.com/hijohnnylin/neuronpedia)
# requires, and what circuit_tracer/frontend/graph_models.py of circuit-tracer
# (github.com/safety-research/circuit-tracer) does beyond it, put down by hand.
TEXT, NUMBER, WHOLE = (str,), (int, float), (int,)
REQUIRED = {
    "metadata": {"slug": TEXT, "scan": TEXT, "prompt_tokens": (list,), "prompt": TEXT},
    "qParams": {},
    "nodes": {
        "node_id": TEXT,
        "feature": WHOLE,
        "layer": TEXT,
        "ctx_idx": WHOLE,
        "feature_type": TEXT,
        "jsNodeId": TEXT,
        "clerp": TEXT,
    },
    "links": {"source": TEXT, "target": TEXT, "weight": NUMBER},
}
REQUIRED_BY_CIRCUIT_TRACER = {
    "metadata": {"transcoder_list": (list,)},
    "qParams": {
        "pinnedIds": (list,),
        "supernodes": (list,),
        "linkType": TEXT,
        "clickedId": TEXT,
        "sg_pos": TEXT,
    },
}


def assert_fits(data, required):
    for part, fields in required.items():
        for entry in data[part] if isinstance(data[part], list) else [data[part]]:
            for name, types in fields.items():
                assert type(entry[name]) in types, (part, name, entry)


@pytest.fixture(scope="module")
def model(make_teacher, ids):
    student, _ = convert(make_teacher("gpt2"), calibration_ids=ids, layers="0,1", copy=True)
    return student


@pytest.fixture(scope="module")
def graph(model, ids):
    whole = attribution_graph(model, Letters(), ids[0, :10], nodes=60, heads=True)
    pruned = label(prune(whole, 0.9), model, Letters())
    units = [node.id for node in pruned.nodes if node.kind == "unit"]
    return group_similar(group(pruned, "two", units[:2]), model, 0.3)


@pytest.mark.parametrize("biases", (False, True))
def test_the_json_has_what_the_viewers_require(graph, biases, tmp_path):
    write_graph(tmp_path / "My graph.json", graph, biases)
    data = json.loads((tmp_path / "My graph.json").read_text())
    assert_fits(data, REQUIRED)
    assert_fits(data, REQUIRED_BY_CIRCUIT_TRACER)
    assert data["metadata"]["slug"] == "my-graph"
    identities = [node["node_id"] for node in data["nodes"]]
    assert len(set(identities)) == len(identities)
    assert len({node["jsNodeId"] + str(node["ctx_idx"]) for node in data["nodes"]}) == len(
        identities
    )
    for link in data["links"]:
        assert link["source"] in identities and link["target"] in identities
    kinds = {node["feature_type"] for node in data["nodes"]}
    assert ("bias" in kinds) == biases
    pinned = [name for _, *members in data["qParams"]["supernodes"] for name in members]
    assert pinned == data["qParams"]["pinnedIds"] and set(pinned) <= set(identities)
    logit = next(node for node in data["nodes"] if node["feature_type"] == "logit")
    assert logit["clerp"].endswith(f"(p={logit['token_prob']:.3f})") and logit["is_target_logit"]


def test_the_json_adds_up_too(graph):
    """Links of a node, biases among them, what is left out and rounding are its value."""
    data = graph_data(graph, biases=True)
    added = dict.fromkeys((node["node_id"] for node in data["nodes"]), 0.0)
    for link in data["links"]:
        added[link["target"]] += link["weight"]
    for identity, row in data["hf_kernel_ffn"]["nodes"].items():
        total = added[identity] + row["elsewhere"] + row["rounding"]
        assert total == pytest.approx(row["value"], rel=1e-4, abs=1e-5)


def test_circuit_tracers_own_models_read_the_json(graph):
    spec = importlib.util.find_spec("circuit_tracer")
    if spec is None:
        pytest.skip("circuit-tracer is not installed")
    file = Path(spec.submodule_search_locations[0], "frontend", "graph_models.py")
    spec = importlib.util.spec_from_file_location("graph_models", file)
    graph_models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(graph_models)
    data = graph_data(graph)
    read = graph_models.Model(**data)
    assert len(read.nodes) == len(data["nodes"])


def test_supernodes(graph, model, ids):
    first, *similar = graph.supernodes
    assert first.name == "two" and len(first.nodes) == 2
    members = [place for supernode in graph.supernodes for place in supernode.nodes]
    assert len(set(members)) == len(members)
    assert all(graph.nodes[place].kind == "unit" for place in members)
    for supernode in similar:
        assert len(supernode.nodes) > 1
    alike = group_similar(prune(graph, 1.0, 1.0), model, 1.0)
    for supernode in alike.supernodes[len(graph.supernodes) :]:
        assert len({graph.nodes[place].name for place in supernode.nodes}) == 1
    with pytest.raises(InputError, match="in a supernode already"):
        group(graph, "again", [graph.nodes[first.nodes[0]].id])
    with pytest.raises(InputError, match="found node 'unit_9_9_9', expected the id of a node"):
        group(graph, "none", ["unit_9_9_9"])
    with pytest.raises(InputError, match="found similarity 0, expected a number above 0"):
        group_similar(graph, model, 0)


def test_labels_are_on_the_side_of_the_coefficient(make_teacher, ids):
    model = make_teacher("llama")
    graph = label(attribution_graph(model, Letters(), ids[0, :6], nodes=40), model, Letters())
    norm, head = model.model.norm.weight, model.lm_head.weight
    for place, node in enumerate(graph.nodes):
        if node.kind == "unit":
            column = model.model.layers[node.layer].mlp.down_proj.weight[:, node.number]
            sign = 1 if node.value > 0 else -1
            best = int((head @ (norm * column * sign)).argmax())
            assert graph.labels[place].startswith(repr(f"<{best}>"))


@pytest.fixture(scope="module")
def plain(make_teacher, ids):
    student, _ = convert(make_teacher("gpt2"), calibration_ids=ids, copy=True)
    return student


def run_transcoder(tensors, x):
    features = torch.relu(x @ tensors["W_enc"].T + tensors["b_enc"])
    return features @ tensors["W_dec"] + tensors["b_dec"]


def test_a_plain_layer_is_exactly_a_transcoder(plain, tmp_path):
    export_transcoders(tmp_path / "out", plain)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)) * 2
    for layer in range(3):
        ffn = plain.transformer.h[layer].mlp
        tensors = load_file(tmp_path / "out" / f"layer_{layer}.safetensors")
        with torch.no_grad():
            expected = ffn(x)
        found = run_transcoder(tensors, x)
        assert tensors["W_enc"].shape == (48 * 9, 32)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert "model_kind: transcoder_set" in config and "layer_2.safetensors" in config


def test_an_untouched_relu_layer_is_one(make_teacher):
    model = make_teacher("gpt2", activation_function="relu")
    tensors = make_transcoder(model, "h.1.mlp")
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(run_transcoder(tensors, x), model.transformer.h[1].mlp(x), atol=1e-5)


def test_layers_that_are_no_transcoders(make_teacher, ids, tmp_path):
    llama = make_teacher("llama")
    cases = {
        "an untouched FFN with a gate at layers.0.mlp": llama,
        "tied rows of a gated FFN with values 'product' at layers.0.mlp": convert(
            llama, calibration_ids=ids, copy=True
        )[0],
        "free rows with the kernel 'half-yat' at layers.0.mlp": convert(
            llama, KernelFFNConfig(), calibration_ids=ids, copy=True
        )[0],
        "an untouched FFN with .* at layers.0.mlp": tiny("starcoder2", "AutoModelForCausalLM"),
    }
    for found, model in cases.items():
        with pytest.raises(InputError, match=f"found {found}, expected units that are sums"):
            export_transcoders(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
