"""Make the attribution graph of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...checkpoint_code.errors import InputError
from ...progress import count_progress
from ..model_parts import decode_tokens, get_embedding_weight
from ..tracing import tokenize_prompt
from .attributor import Attributor, Target
from .expansion import Expansion
from .graph import Graph, Node
from .sources import Source
from .steps import RULES
from .targets import (
    choose_likely,
    find_token,
    measure_probabilities,
    require_known,
    require_readable,
)

NODES = 256
"""Units and heads of a graph unless others are asked for."""
LOGITS = 10
"""Logits that a graph explains, at most."""
PROBABILITY = 0.95
"""Share of the probability that they hold, if so many do."""
HELD = ("attention patterns", "scales of norms")
"""What is held in every graph."""


def attribution_graph(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Tensor,
    *,
    target: str | int | Sequence[str | int] | None = None,
    against: str | int | None = None,
    nodes: int = NODES,
    heads: bool = False,
    rule: str = "half",
    start_units: bool = False,
    progress: bool = False,
) -> Graph:
    """Find which units of ``model`` (a causal language model) made which, up to the next token.

    With attention patterns and the scales of norms held at their values on the prompt, all between
    units is linear. So the edges into a node are exact: over all sources they add up to its value.
    The graph has the ``nodes`` most influential units; what others add is in ``elsewhere``.

    Memory grows with tokens times units, and with ``nodes``.

    Args:
        prompt: text, or token ids (T,).
        target: the next token to explain, or several, as text or id; None: the likeliest ones,
            at most :data:`LOGITS`, that hold :data:`PROBABILITY`.
        against: a token whose logit is subtracted; None: the mean over the vocabulary.
        nodes: units, and heads if they are nodes.
        heads: whether heads are nodes between units. What goes into a head is split along the
            direction of what it wrote, which is held.
        rule: how a coefficient is split over its scores, ``half`` or ``derivative``; see
            :mod:`~hf_kernel_ffn.reading.graph.steps`.
        start_units: whether units and heads at the start token are nodes. They are the same ones in
            every prompt, since they read that token alone; otherwise what all of a layer write
            there is one node, of the kind ``start``.
        progress: show a bar.

    Raises:
        InputError: the prompt has no token, a target is not one token, ``nodes`` is below one, the
            rule is unknown, the model is no causal language model of a family whose attention is
            described, or one of its norms is no LayerNorm or RMSNorm.
    """
    ids, targets, other = require_request(
        tokenizer, prompt, target, against, nodes=nodes, rule=rule
    )
    require_readable(model)
    embeddings = get_embedding_weight(model)
    for token in targets if other is None else [*targets, other]:
        require_known(token, len(embeddings))

    begins_with_start = ids[0].item() == getattr(tokenizer, "bos_token_id", None)
    attributor = Attributor(
        model,
        ids.to(embeddings.device),
        heads=heads,
        rule=rule,
        against=other,
        folds_start=begins_with_start and len(ids) > 1 and not start_units,
    )
    probabilities = measure_probabilities(attributor.final_logits)
    tokens = targets or choose_likely(probabilities, LOGITS, PROBABILITY)
    tokens = [token for token in tokens if token != other] or tokens
    weights = probabilities[tokens]
    expansion = Expansion(attributor, weights / weights.sum())
    last = len(ids) - 1
    layers = attributor.table.layers
    expansion.expand([Target("logit", layers, last, token) for token in tokens])
    with count_progress(nodes, "graph", progress) as see:
        expansion.grow(nodes, see)

    return _assemble(
        expansion,
        tokenizer,
        prompt,
        ids.tolist(),
        rule=rule,
        against=other,
        probabilities=weights.tolist(),
    )


def _assemble(
    expansion: Expansion,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Tensor,
    ids: list[int],
    *,
    rule: str,
    against: int | None,
    probabilities: list[float],
) -> Graph:
    """The graph of the nodes that ``expansion`` has."""
    attributor = expansion.attributor
    held = dict.fromkeys(HELD)
    for units in attributor.units:
        held.update(dict.fromkeys(units.held))
    texts = [decode_tokens(tokenizer, [number]) for number in ids]
    rest_name = "curvature" if rule == "derivative" else "remainder"
    nodes, edges = _describe_nodes(expansion, tokenizer, ids, texts, rest_name=rest_name)

    exact_edges = edges.double()
    sums = torch.tensor(expansion.sums, dtype=torch.float64)
    sizes = torch.tensor(expansion.sizes, dtype=torch.float64)
    return Graph(
        model=attributor.name,
        prompt=prompt if isinstance(prompt, str) else decode_tokens(tokenizer, ids),
        ids=ids,
        tokens=texts,
        layers=attributor.table.layers,
        rule=rule,
        held=tuple(held),
        against=against,
        probabilities=probabilities,
        nodes=nodes,
        edges=edges,
        elsewhere=sums - exact_edges.sum(-1),
        elsewhere_size=(sizes - exact_edges.abs().sum(-1)).clamp_min(0),
        gaps=torch.tensor(expansion.gaps, dtype=torch.float64),
    )


def require_request(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Tensor,
    target: str | int | Sequence[str | int] | None,
    against: str | int | None,
    *,
    nodes: int,
    rule: str,
) -> tuple[Tensor, list[int], int | None]:
    """Check what :func:`attribution_graph` is asked for, as far as it takes no model.

    Returns:
        ids of the prompt (T,), of the targets, and of ``against``.

    Raises:
        InputError: as :func:`attribution_graph`.
    """
    if nodes < 1:
        raise InputError(f"found nodes {nodes}, expected at least 1")
    if rule not in RULES:
        raise InputError(f"found rule {rule!r}, expected one of {', '.join(RULES)}")
    ids = tokenize_prompt(tokenizer, prompt)
    if target is None:
        tokens: list[str | int] = []
    elif isinstance(target, (str, int)):
        tokens = [target]
    else:
        tokens = list(target)
    targets = [find_token(tokenizer, token) for token in tokens]
    repeated = sorted({token for token in targets if targets.count(token) > 1})
    if repeated:
        raise InputError(f"found token {repeated[0]} twice among the targets, expected it once")
    other = None if against is None else find_token(tokenizer, against)
    if other is not None and other in targets:
        raise InputError(f"found token {other} against itself, expected another one")
    return ids, targets, other


def _describe_nodes(
    expansion: Expansion,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    texts: list[str],
    *,
    rest_name: str,
) -> tuple[list[Node], Tensor]:
    """The nodes, those with inputs first, and the edges between them."""
    attributor = expansion.attributor
    nodes = []
    for target, value in zip(expansion.targets, expansion.values, strict=True):
        kind, layer, position, number = target
        if kind == "logit":
            name = decode_tokens(tokenizer, [number])
        elif kind == "head":
            name = f"head {number}"
        else:
            name = attributor.units[layer].name(position, number)
        nodes.append(Node(kind, layer, position, number, name, value))

    numbers, edges = expansion.assemble()
    for number in numbers:
        nodes.append(_describe_leaf(attributor.table.find(number), ids, texts, rest_name))
    return nodes, edges


def _describe_leaf(source: Source, ids: list[int], texts: list[str], rest_name: str) -> Node:
    """The node of a source without inputs."""
    kind, layer, position, _ = source
    if kind == "embedding":
        return Node(kind, layer, position, ids[position], texts[position], float("nan"))
    names = {
        "position": f"position {position}",
        "bias": "biases",
        "remainder": rest_name,
        "start": "start token",
    }
    return Node(kind, layer, position, 0, names[kind], float("nan"))
