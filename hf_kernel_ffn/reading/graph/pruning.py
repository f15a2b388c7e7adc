"""How much each node matters to the logits, and the graph with what matters least left out.

All by absolute values: an edge counts by its share of all that is added to its node, and a node by
all paths from it to the logits, (I − A)⁻¹ with A the matrix of those shares. So do Ameisen et al.
2025, "Circuit Tracing", and the circuit-tracer package, whose two scores are here too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint_code.errors import InputError
from .graph import Graph

TINY = 1e-300
"""Keeps a division by the size of no edges defined."""


class Scores(NamedTuple):
    """How much of a model's answer a graph accounts for, from 0 to 1."""

    replacement: float
    """Of the influence that reaches the logits from tokens and from what is unexplained, the share
    of tokens."""
    completeness: float
    """The share of nodes' inputs that is explained, nodes weighted by their influence."""


def influences(graph: Graph) -> Tensor:
    """(N,) float64: how much each node matters to the logits, over all paths."""
    return _spread(graph, _shares(graph))


def score(graph: Graph, elsewhere: bool = True) -> Scores:
    """Replacement and completeness of ``graph``.

    Unexplained is what remainders add, and what comes from elsewhere. Biases count as explained in
    the completeness, and not at all in the replacement. What layers write at the start token reads
    that token alone, and counts as it.

    Args:
        elsewhere: False: sources that the graph leaves out are dropped from all sums first, as
            circuit-tracer does with the units that it did not select.
    """
    if not elsewhere:
        graph = replace(graph, elsewhere_size=torch.zeros_like(graph.elsewhere_size))
    shares = _shares(graph)
    influence = _spread(graph, shares)
    weights = torch.zeros_like(influence)
    weights[: graph.logits] = graph.weights
    kinds = [node.kind for node in graph.nodes]
    is_token = torch.tensor([kind in ("embedding", "position", "start") for kind in kinds])
    is_remainder = torch.tensor([kind == "remainder" for kind in kinds])

    count = len(graph.edges)
    output = influence + weights
    unexplained = shares[:, is_remainder].sum(-1) + _elsewhere_shares(graph)
    from_elsewhere = (output[:count] * _elsewhere_shares(graph)).sum()
    error = influence[is_remainder].sum() + from_elsewhere
    tokens = influence[is_token].sum()
    replacement = tokens / (tokens + error).clamp_min(TINY)
    total = output.sum() + from_elsewhere
    completeness = 1 - (output[:count] * unexplained).sum() / total
    return Scores(replacement.item(), completeness.item())


def prune(graph: Graph, nodes: float = 0.8, edges: float = 0.98) -> Graph:
    """Leave out the nodes, then the edges, that matter least.

    Logits and embeddings stay. A unit or head stays only with an input and an output.

    Args:
        nodes: share of all influence that the kept nodes have.
        edges: share of all influence, among those nodes, that the kept edges carry.

    Raises:
        InputError: a share is not from 0 to 1.
    """
    require_share("nodes", nodes)
    require_share("edges", edges)
    always = torch.tensor([node.kind in ("embedding", "logit") for node in graph.nodes])
    influence = influences(graph)
    kept = (influence >= _find_cut(influence, nodes)) & (influence > 0) | always

    count = len(graph.edges)
    inner = graph.select(kept, torch.ones_like(graph.edges, dtype=torch.bool))
    shares = _shares(inner)
    output = _spread(inner, shares)
    output[: inner.logits] += inner.weights
    carried = shares * output[: len(shares), None]
    is_kept = (carried >= _find_cut(carried.flatten(), edges)) & (carried > 0)
    kept_edges = torch.zeros_like(graph.edges, dtype=torch.bool)
    rows = kept[:count].nonzero()[:, 0]
    columns = kept.nonzero()[:, 0]
    kept_edges[rows[:, None], columns] = is_kept
    return graph.select(_drop_loose_ends(kept, kept_edges, always, count), kept_edges)


def require_share(name: str, share: float) -> None:
    """InputError unless ``share`` is from 0 to 1."""
    if not 0 <= share <= 1:
        raise InputError(f"found {name} {share}, expected a share from 0 to 1")


def _drop_loose_ends(kept: Tensor, edges: Tensor, always: Tensor, count: int) -> Tensor:
    """``kept`` (N,) without nodes that have no output, or need an input and have none."""
    kept = kept.clone()
    while True:
        live = edges & kept & kept[:count, None]
        stays = live.any(0)
        stays[:count] &= live.any(1)
        stays |= always
        if bool((kept <= stays).all()):
            return kept
        kept &= stays


def _sizes(graph: Graph) -> Tensor:
    """(E, 1) the size of all that is added to each node."""
    sizes = graph.edges.double().abs().sum(-1) + graph.elsewhere_size
    return sizes.clamp_min(TINY)[:, None]


def _shares(graph: Graph) -> Tensor:
    """(E, N) edges as shares of all that is added to their node."""
    return graph.edges.double().abs() / _sizes(graph)


def _elsewhere_shares(graph: Graph) -> Tensor:
    """(E,) the share that comes from elsewhere."""
    return graph.elsewhere_size / _sizes(graph)[:, 0]


def _spread(graph: Graph, shares: Tensor) -> Tensor:
    """(N,) weights of the logits, passed on along ``shares`` until nothing is left."""
    count = len(shares)
    current = torch.zeros(len(graph.nodes), dtype=torch.float64)
    current[: graph.logits] = graph.weights
    total = torch.zeros_like(current)
    while current[:count].any():
        current = current[:count] @ shares
        total += current
    return total


def _find_cut(scores: Tensor, share: float) -> Tensor:
    """The least score of those, largest first, that make up ``share`` of all."""
    ordered = scores.sort(descending=True).values
    summed = ordered.cumsum(0) / ordered.sum().clamp_min(TINY)
    place = int(torch.searchsorted(summed, share).clamp_max(len(ordered) - 1))
    return ordered[place]
