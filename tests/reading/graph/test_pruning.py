"""Influence is that of all paths, and pruning keeps the share that it says."""

import pytest
import torch
from letters import Letters

from hf_kernel_ffn import InputError
from hf_kernel_ffn.reading.graph import attribution_graph, influences, prune, score


@pytest.fixture(scope="module")
def graph(make_teacher, ids):
    model = make_teacher("gpt2").double()
    return attribution_graph(model, Letters(), ids[0, :10], nodes=60)


def dense(graph):
    """The square matrix of shares, a row for what is elsewhere, and the logits' weights."""
    count = len(graph.nodes)
    full = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    full[: len(graph.edges), :count] = graph.edges.double().abs()
    full[: len(graph.edges), count] = graph.elsewhere_size
    full /= full.sum(-1, keepdim=True).clamp_min(1e-300)
    weights = torch.zeros(count + 1, dtype=torch.float64)
    probabilities = torch.tensor(graph.probabilities)
    weights[: graph.logits] = probabilities / probabilities.sum()
    return full, weights


def test_influence_is_that_of_all_paths(graph):
    full, weights = dense(graph)
    identity = torch.eye(len(full), dtype=torch.float64)
    paths = torch.linalg.inv(identity - full) - identity
    assert torch.allclose(influences(graph), (weights @ paths)[:-1], atol=1e-12)


def test_scores_are_those_of_circuit_tracer_with_elsewhere_as_an_error_node(graph):
    full, weights = dense(graph)
    identity = torch.eye(len(full), dtype=torch.float64)
    influence = weights @ (torch.linalg.inv(identity - full) - identity)
    tokens = torch.tensor([node.kind in ("embedding", "position") for node in graph.nodes])
    reached = influence[:-1][tokens].sum()
    found = score(graph)
    assert found.replacement == pytest.approx((reached / (reached + influence[-1])).item())
    output = influence + weights
    completeness = ((1 - full[:, -1]) * output).sum() / output.sum()
    assert found.completeness == pytest.approx(completeness.item())
    assert score(graph, elsewhere=False) == pytest.approx((1.0, 1.0))


def test_pruning_keeps_what_it_says(graph):
    pruned = prune(graph, nodes=0.7, edges=0.95)
    assert len(pruned.nodes) < len(graph.nodes)
    assert pruned.nodes[: graph.logits] == graph.nodes[: graph.logits]
    embeddings = [node for node in pruned.nodes if node.kind == "embedding"]
    assert len(embeddings) == 10
    total = pruned.edges.sum(-1) + pruned.elsewhere + pruned.gaps
    assert torch.allclose(total, pruned.values())
    live = pruned.edges != 0
    for place, node in enumerate(pruned.nodes):
        if node.kind == "unit":
            assert live[place].any() and live[:, place].any()
    by_id = {node.id: place for place, node in enumerate(graph.nodes)}
    for target, source in live.nonzero().tolist()[:50]:
        row, column = by_id[pruned.nodes[target].id], by_id[pruned.nodes[source].id]
        assert pruned.edges[target, source] == graph.edges[row, column]
    influence = influences(graph)
    kept = [by_id[node.id] for node in pruned.nodes]
    assert influence[kept].sum() <= influence.sum()


def test_pruning_nothing_changes_nothing(graph):
    whole = prune(graph, nodes=1.0, edges=1.0)
    assert (whole.edges != 0).sum() > 0.99 * (graph.edges != 0).sum()
    with pytest.raises(InputError, match="found edges 2, expected a share"):
        prune(graph, edges=2)
