"""Words for a graph's nodes: the tokens that a unit promotes, and where on a text it fires."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..contexts import Contexts
from ..model_parts import list_ffn_paths, read_dictionary
from ..naming import written
from ..rules import mark_text
from .graph import Graph, Node

SHOWN = 4
"""Tokens, and contexts, per node."""


@torch.no_grad()
def label(
    graph: Graph,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Mapping[str, Contexts] | None = None,
) -> Graph:
    """Give every node of ``graph`` its words.

    A unit has the tokens that it promotes by the logit lens, on the side of its coefficient's
    sign: a negative coefficient promotes what the unit's output suppresses.

    Args:
        contexts: by an FFN's path, from :func:`hf_kernel_ffn.reading.contexts.contexts`, for the
            strongest contexts of its units.
    """
    labels = [""] * len(graph.nodes)
    texts: list[list[str]] = [[] for _ in graph.nodes]
    paths = list_ffn_paths(model)
    for layer, places in _group_units(graph).items():
        record = read_dictionary(model, paths[layer])
        row_of = {name: row for row, name in enumerate(record.names)}
        rows = [row_of[graph.nodes[place].name] for place in places]
        signs = _read_signs([graph.nodes[place] for place in places], record.dictionary)
        directions = record.dictionary[rows] * signs[:, None]
        for place, words in zip(places, written(model, tokenizer, directions, SHOWN), strict=True):
            labels[place] = str(words)
        if contexts is not None and paths[layer] in contexts:
            for place, row in zip(places, rows, strict=True):
                texts[place] = _show_contexts(tokenizer, contexts[paths[layer]], row)
    return replace(graph, labels=labels, contexts=texts if contexts is not None else [])


def _group_units(graph: Graph) -> dict[int, list[int]]:
    """The places of units by layer."""
    places = defaultdict(list)
    for place, node in enumerate(graph.nodes):
        if node.kind == "unit":
            places[node.layer].append(place)
    return places


def _read_signs(nodes: list[Node], like: Tensor) -> Tensor:
    """(n,) −1 where a coefficient is negative and its name has no side that says so."""
    return like.new_tensor(
        [-1.0 if node.value < 0 and node.name[-1] not in "+-" else 1.0 for node in nodes]
    )


def _show_contexts(tokenizer: PreTrainedTokenizerBase, found: Contexts, row: int) -> list[str]:
    """The strongest contexts of one row as text, the token that fires in »«."""
    fires = found.values[row] > 0
    windows = found.windows[row][fires][:SHOWN]
    return [mark_text(tokenizer, window) for window in windows]
