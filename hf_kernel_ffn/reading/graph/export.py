"""A graph as JSON that circuit-tracer's and Neuronpedia's viewers open.

Their format (schema version 1) has nodes by ``layer_feature_position`` and links by node ids. This
is how a graph stands in it:

* a unit is a feature of type "cross layer transcoder", the only one both viewers know; its layer is
  the block whose FFN it is in, and its activation is signed;
* a position embedding is added to its token's embedding;
* what remainders add, and what a layer's units write at the start token as one, is a "mlp
  reconstruction error" of their layer and token; circuit-tracer puts the latter there too;
* biases are nodes of type "bias" where they are asked for: circuit-tracer has none.

What the format has no place for stands under ``hf_kernel_ffn``, which the viewers ignore: what was
held, supernodes' edges aside, and per node what comes from elsewhere.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch

from ... import __version__
from ...storage.files import write_text
from .graph import Graph, Node
from .pruning import influences, score

HEADS = 1_000_000
"""Added to a head's number, so that its id is no unit's."""
FEATURE = "cross layer transcoder"
ERROR = "mlp reconstruction error"


def graph_data(graph: Graph, slug: str = "graph", biases: bool = False) -> dict[str, object]:
    """``graph`` as JSON types, in the viewers' format.

    Args:
        slug: the name of the graph in a viewer.
        biases: whether bias nodes are among the nodes.
    """
    cumulative = _accumulate(graph)
    nodes: dict[str, dict[str, object]] = {}
    identities: list[str | None] = []
    for place, node in enumerate(graph.nodes):
        if node.kind == "bias" and not biases:
            identities.append(None)
            continue
        identity = _make_id(graph, node)
        identities.append(identity)
        if identity not in nodes:
            nodes[identity] = _describe(graph, place, identity, cumulative[place])

    links: dict[tuple[str, str], float] = {}
    for target, source in (graph.edges != 0).nonzero().tolist():
        start = identities[source]
        end = identities[target]
        if start is not None and end is not None:
            weight = graph.edges[target, source].item()
            links[start, end] = links.get((start, end), 0.0) + weight
    supernodes = []
    for supernode in graph.supernodes:
        members = [identities[place] for place in supernode.nodes]
        supernodes.append([supernode.name, *members])
    return {
        "metadata": _describe_graph(graph, slug),
        "qParams": {
            "pinnedIds": [identity for members in supernodes for identity in members[1:]],
            "supernodes": supernodes,
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": list(nodes.values()),
        "links": [
            {"source": start, "target": end, "weight": weight}
            for (start, end), weight in links.items()
        ],
        "hf_kernel_ffn": _describe_rest(graph, identities),
    }


def write_graph(file: str | Path, graph: Graph, biases: bool = False) -> None:
    """Write :func:`graph_data` to ``file``, whose stem is the slug, whole or not at all."""
    slug = re.sub(r"[^a-z0-9]+", "-", Path(file).stem.lower()).strip("-") or "graph"
    text = json.dumps(graph_data(graph, slug, biases), ensure_ascii=False, allow_nan=False)
    write_text(file, text + "\n")


def _describe_graph(graph: Graph, slug: str) -> dict[str, object]:
    """The metadata of ``graph``."""
    scores = score(graph)
    return {
        "slug": slug,
        "scan": graph.model,
        "transcoder_list": [],
        "prompt_tokens": graph.tokens,
        "prompt": graph.prompt,
        "node_threshold": 1.0,
        "schema_version": 1,
        "info": {
            "description": (
                f"Exact edges; held on the prompt: {', '.join(graph.held)}. "
                f"Replacement {scores.replacement:.3f}, completeness {scores.completeness:.3f}, "
                "what the graph leaves out counted as unexplained."
            ),
            "generator": {"name": "hf-kernel-ffn", "version": __version__},
        },
    }


def _describe_rest(graph: Graph, identities: list[str | None]) -> dict[str, object]:
    """What the viewers' format has no place for."""
    rows = {
        str(identity): {"value": node.value, "elsewhere": elsewhere, "rounding": gap}
        for identity, node, elsewhere, gap in zip(
            identities, graph.nodes, graph.elsewhere.tolist(), graph.gaps.tolist(), strict=False
        )
    }
    for identity, effect in zip(identities, graph.effects, strict=False):
        if not math.isnan(effect):
            rows[str(identity)]["effect"] = effect
    return {
        "rule": graph.rule,
        "held": list(graph.held),
        "against": graph.against,
        "scores": score(graph)._asdict(),
        "remainder_share": graph.remainder_share(),
        "nodes": rows,
    }


def _make_id(graph: Graph, node: Node) -> str:
    """The id of ``node`` in the viewers' format."""
    if node.kind == "logit":
        return f"{graph.layers + 1}_{node.number}_{node.position}"
    if node.kind in ("embedding", "position"):
        return f"E_{graph.ids[node.position]}_{node.position}"
    if node.kind in ("remainder", "start"):
        return f"{node.layer}_-1_{node.position}"
    if node.kind == "bias":
        return f"{node.layer}_-2_{node.position}"
    return f"{node.layer}_{_number_feature(node)}_{node.position}"


def _number_feature(node: Node) -> int:
    """A unit's number, or one beyond all units for a head."""
    return node.number + HEADS if node.kind == "head" else node.number


def _pair(layer: int, feature: int) -> int:
    """Cantor's number of a pair, by which the viewers tell features of all layers apart."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _describe(graph: Graph, place: int, identity: str, influence: float) -> dict[str, object]:
    """One node."""
    node = graph.nodes[place]
    label = graph.labels[place] if graph.labels else ""
    described: dict[str, object] = {
        "node_id": identity,
        "feature": node.number,
        "layer": str(node.layer),
        "ctx_idx": node.position,
        "feature_type": FEATURE,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": identity,
        "clerp": f"{node.name} {label}".strip(),
        "influence": influence,
        "activation": None,
    }
    return {**described, **_describe_kind(graph, place)}


def _describe_kind(graph: Graph, place: int) -> dict[str, object]:
    """What is particular to a node's kind."""
    node = graph.nodes[place]
    if node.kind == "logit":
        probability = graph.probabilities[place]
        return {
            "layer": str(graph.layers + 1),
            "feature_type": "logit",
            "token_prob": probability,
            "is_target_logit": place == 0,
            "jsNodeId": f"L_{node.number}-{node.position}",
            "clerp": f'Output "{node.name}" (p={probability:.3f})',
            "influence": None,
        }
    if node.kind in ("embedding", "position"):
        token = graph.ids[node.position]
        return {
            "feature": node.position,
            "layer": "E",
            "feature_type": "embedding",
            "jsNodeId": f"E_{token}-{node.position}",
            "clerp": f'Emb: "{graph.tokens[node.position]}"',
        }
    if node.kind in ("remainder", "start", "bias"):
        number = -2 if node.kind == "bias" else -1
        return {
            "feature": number,
            "feature_type": "bias" if node.kind == "bias" else ERROR,
            "jsNodeId": f"{node.layer}_{number}-{node.position}",
        }
    feature = _number_feature(node)
    return {
        "feature": _pair(node.layer, feature),
        "jsNodeId": f"{node.layer}_{feature}-0",
        "activation": node.value,
    }


def _accumulate(graph: Graph) -> list[float]:
    """Per node the share of all influence that it and more influential nodes have: what the
    viewers' slider cuts by."""
    influence = influences(graph)
    order = influence.argsort(descending=True, stable=True)
    summed = torch.zeros_like(influence)
    summed[order] = influence[order].cumsum(0) / influence.sum().clamp_min(1e-300)
    return summed.clamp_max(1.0).tolist()
