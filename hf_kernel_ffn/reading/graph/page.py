"""A graph as one self-contained HTML page: tokens from left to right, layers from bottom to top.

A click on a node shows its words, inputs and outputs. What is pinned can be moved, grouped into
supernodes, and saved as JSON. :func:`page_data` turns a graph into plain numbers,
:func:`write_page` puts them into the page (``page.html``).
"""

from __future__ import annotations

import math
from pathlib import Path

from ..pages import fill_page, shorten
from .graph import Graph
from .pruning import influences, score

TEMPLATE = Path(__file__).with_name("page.html")


def page_data(graph: Graph) -> dict[str, object]:
    """What the page of ``graph`` shows, as JSON types."""
    influence = influences(graph)
    nodes = []
    for place, node in enumerate(graph.nodes):
        has_inputs = place < len(graph.edges)
        nodes.append(
            {
                "id": node.id,
                "kind": node.kind,
                "layer": node.layer,
                "position": node.position,
                "name": node.name,
                "value": shorten(node.value) if has_inputs else None,
                "words": graph.labels[place] if graph.labels else "",
                "contexts": graph.contexts[place] if graph.contexts else [],
                "effect": _shorten_effect(graph, place),
                "influence": shorten(influence[place].item()),
                "elsewhere": shorten(graph.elsewhere[place].item()) if has_inputs else None,
                "probability": graph.probabilities[place] if place < graph.logits else None,
            }
        )
    edges = [
        [target, source, shorten(graph.edges[target, source].item())]
        for target, source in (graph.edges != 0).nonzero().tolist()
    ]
    return {
        "model": graph.model,
        "prompt": graph.prompt,
        "tokens": graph.tokens,
        "layers": graph.layers,
        "held": list(graph.held),
        "rule": graph.rule,
        "scores": score(graph)._asdict(),
        "remainder": graph.remainder_share(),
        "nodes": nodes,
        "edges": edges,
        "supernodes": [[supernode.name, list(supernode.nodes)] for supernode in graph.supernodes],
    }


def _shorten_effect(graph: Graph, place: int) -> float | None:
    """The effect of a unit, where it was measured."""
    effect = graph.effects[place] if graph.effects else math.nan
    return None if math.isnan(effect) else shorten(effect)


def write_page(file: str | Path, graph: Graph) -> None:
    """Write the page of ``graph`` to ``file``, whole or not at all. It needs no network."""
    fill_page(file, TEMPLATE, page_data(graph))
