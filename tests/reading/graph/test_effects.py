"""Effects are what the model does when a unit writes a little less."""

import math

import pytest
import torch
from letters import Letters
from tiny_families import tiny

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.reading.graph import attribution_graph, measure_effects, prune

STEP = 0.01
"""Norms compute in float32 even in a float64 model: less would be lost in their rounding."""
STUDENTS = {
    "tied": {"rows": "tied"},
    "tied, fixed": {"rows": "tied", "kernel": "half-yat"},
    "tied, sparse, linear map": {"rows": "tied", "simplex": "threshold", "top_k": 6, "skip": True},
    "free": {"kernel": "half-yat"},
}


def find_gap(model, graph):
    with torch.no_grad():
        logits = model(torch.tensor([graph.ids])).logits[0, -1].double()
    other = logits.mean() if graph.against is None else logits[graph.against]
    return (logits[graph.nodes[0].number] - other).item()


def write_less(model, path, token, vector):
    """The gap's hook: the FFN at ``path`` writes ``vector`` less at ``token``."""

    def subtract(module, args, output):
        changed = output.clone()
        changed[0, token] -= vector.to(output)
        return changed

    return model.base_model.get_submodule(path).register_forward_hook(subtract)


@pytest.mark.parametrize("against", (None, 5))
@pytest.mark.parametrize("name", ["teacher", *STUDENTS])
def test_an_effect_is_the_slope_of_the_gap(name, against, make_teacher, ids):
    model = make_teacher("llama").double()
    if name != "teacher":
        model, _ = convert(model, KernelFFNConfig(**STUDENTS[name]), calibration_ids=ids)
    graph = attribution_graph(model, Letters(), ids[0, :9], nodes=16, against=against)
    found = measure_effects(graph, model)
    assert len(found.effects) == len(graph.nodes)

    largest = max(abs(effect) for effect in found.effects if not math.isnan(effect))
    tried = 0
    for node, effect in zip(graph.nodes, found.effects, strict=True):
        if node.kind != "unit":
            assert math.isnan(effect)
            continue
        path = f"layers.{node.layer}.mlp"
        ffn = model.base_model.get_submodule(path)
        if name == "teacher":
            row = ffn.down_proj.weight[:, node.number]
        elif name.startswith("tied"):
            row = ffn.output_prototypes.weight[:, node.number]
        else:
            row = ffn.readout(torch.zeros(1, model.config.hidden_size).double()).dictionary
            row = row[node.number]
        gaps = []
        for step in (STEP, -STEP):
            handle = write_less(model, path, node.position, step * node.value * row.detach())
            gaps.append(find_gap(model, graph))
            handle.remove()
        slope = (gaps[0] - gaps[1]) / (2 * STEP)
        # Students have kinks and thresholds, which a difference may lie across.
        allowed = 2e-5 if name == "teacher" else 0.02 * largest
        assert effect == pytest.approx(slope, rel=1e-3, abs=allowed)
        tried += 1
    assert tried > 5


def test_effects_stay_with_their_nodes(make_teacher, ids):
    model = make_teacher("gpt2")
    graph = measure_effects(attribution_graph(model, Letters(), ids[0, :9], nodes=24), model)
    pruned = prune(graph, 0.6)
    assert len(pruned.nodes) < len(graph.nodes)
    of = {node.id: effect for node, effect in zip(graph.nodes, graph.effects, strict=True)}
    for node, effect in zip(pruned.nodes, pruned.effects, strict=True):
        assert effect == of[node.id] or math.isnan(effect)


def test_it_leaves_the_model_as_it_was(make_teacher, ids):
    model = tiny("llama", "AutoModelForCausalLM")
    graph = attribution_graph(model, Letters(), ids[0, :6], nodes=4)
    measure_effects(graph, model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())
