"""Nodes that are to be seen as one: by hand, or because their units read and write alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...checkpoint_code.errors import InputError
from ..model_parts import get_embedding_weight, list_ffn_paths
from .graph import Graph, Supernode
from .pruning import influences
from .units import Units, read_units

LEAST = 0.6
"""Units are alike from this similarity on."""


def group(graph: Graph, name: str, nodes: Sequence[str]) -> Graph:
    """The graph with one supernode more.

    Args:
        nodes: by their ``id``.

    Raises:
        InputError: there is no such node, or it is in a supernode already.
    """
    taken = {place for supernode in graph.supernodes for place in supernode.nodes}
    places = []
    for identity in nodes:
        try:
            place = graph.find(identity)
        except KeyError:
            raise InputError(
                f"found node {identity!r}, expected the id of a node of the graph"
            ) from None
        if place in taken:
            raise InputError(
                f"found node {identity!r} in a supernode already, expected one that is free"
            )
        places.append(place)
    return replace(graph, supernodes=(*graph.supernodes, Supernode(name, tuple(places))))


@torch.no_grad()
def group_similar(graph: Graph, model: PreTrainedModel, least: float = LEAST) -> Graph:
    """The graph with its free units grouped by similarity.

    Two units are as similar as the mean of two cosines: of what they write, on the sides of their
    coefficients, and of the rows that their (first) score reads. A unit at several tokens is
    similar to itself. The most influential unit starts a supernode; every other joins the first
    with whose members it is similar throughout, or starts one. Those of one stay free.

    Args:
        least: similarity from which on units are alike.
    """
    require_similarity(least)
    taken = {place for supernode in graph.supernodes for place in supernode.nodes}
    places = [
        place
        for place, node in enumerate(graph.nodes)
        if node.kind == "unit" and place not in taken
    ]
    if not places:
        return graph
    similarity = _compare(graph, model, places)
    influence = influences(graph)[places]

    members: list[list[int]] = []
    for number in influence.argsort(descending=True, stable=True).tolist():
        for together in members:
            if (similarity[number, together] >= least).all():
                together.append(number)
                break
        else:
            members.append([number])

    supernodes = []
    for together in members:
        if len(together) > 1:
            first = places[together[0]]
            words = graph.labels[first] if graph.labels else graph.nodes[first].name
            supernodes.append(Supernode(words, tuple(places[number] for number in together)))
    return replace(graph, supernodes=(*graph.supernodes, *supernodes))


def require_similarity(least: float) -> None:
    """InputError unless ``least`` is a similarity that can group anything."""
    if not 0 < least <= 1:
        raise InputError(f"found similarity {least}, expected a number above 0, up to 1")


def _compare(graph: Graph, model: PreTrainedModel, places: list[int]) -> Tensor:
    """(n, n) similarities of the units at ``places``."""
    paths = list_ffn_paths(model)
    weight = get_embedding_weight(model)
    nothing = weight.new_zeros(1, model.config.hidden_size)
    units_of: dict[int, Units] = {}
    writes = []
    reads = []
    for place in places:
        node = graph.nodes[place]
        if node.layer not in units_of:
            path = paths[node.layer]
            units_of[node.layer] = read_units(model, path, nothing, nothing, "half")
        units = units_of[node.layer]
        writes.append(units.dictionary[node.number] * (-1.0 if node.value < 0 else 1.0))
        row = units.rows[0].weight[node.number] if units.rows else torch.zeros_like(writes[-1])
        reads.append(row)
    cosines = [
        torch.nn.functional.normalize(torch.stack(rows).double(), dim=-1)
        for rows in (writes, reads)
    ]
    return (cosines[0] @ cosines[0].T + cosines[1] @ cosines[1].T) / 2
