"""The graph: nodes, exact edges between them, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .sources import SOURCE_KINDS

KINDS = ("logit", *SOURCE_KINDS)
"""What a node may be."""


class Node(NamedTuple):
    """Something at one token that writes, or a logit."""

    kind: str
    """One of :data:`KINDS`."""
    layer: int
    """Its block; −1 for embeddings, the number of blocks for what comes after the last."""
    position: int
    """Of its token in the prompt."""
    number: int
    """The unit, the head, or the token id of an embedding or a logit; otherwise 0."""
    name: str
    value: float
    """A unit's coefficient, a logit as it was asked for, the length of what a head wrote; nan for
    nodes without inputs."""

    @property
    def id(self) -> str:
        """``kind_layer_position_number``: one node of a graph has it."""
        return f"{self.kind}_{self.layer}_{self.position}_{self.number}"


class Supernode(NamedTuple):
    """Nodes that are to be seen as one."""

    name: str
    nodes: tuple[int, ...]
    """By their places in the graph."""


@dataclass(frozen=True, eq=False)
class Graph:
    """Which nodes made which, at one prompt: N nodes, of which the first E have inputs.

    ``edges.sum(-1) + elsewhere + gaps`` is the nodes' ``value``: of units, the coefficient, biases
    included by the edges of bias nodes.
    """

    model: str
    prompt: str
    ids: list[int]
    tokens: list[str]
    layers: int
    """Number of blocks."""
    rule: str
    """How a unit's coefficient is split over its scores; see :mod:`~.steps`."""
    held: tuple[str, ...]
    """What is held at its value on the prompt."""
    against: int | None
    """The token whose logit is subtracted; None: the mean over the vocabulary."""
    probabilities: list[float]
    """Of the logits, which are the first nodes."""
    nodes: list[Node]
    edges: Tensor
    """(E, N): what each node adds to each of the first E."""
    elsewhere: Tensor
    """(E,) what is added by sources that are no nodes of the graph, or by edges cut from it."""
    elsewhere_size: Tensor
    """(E,) the same with every source by its absolute value."""
    gaps: Tensor
    """(E,) rounding: what no source adds."""
    labels: list[str] = field(default_factory=list)
    """Per node a few words, such as the tokens that it promotes; empty where there are none."""
    contexts: list[list[str]] = field(default_factory=list)
    """Per node texts on which its unit fires most; empty if none were asked for."""
    effects: list[float] = field(default_factory=list)
    """Per node how much the first logit changes, to first order, when the unit writes nothing and
    all else follows (:func:`~.effects.measure_effects`); empty where that was not measured."""
    supernodes: tuple[Supernode, ...] = ()

    @property
    def logits(self) -> int:
        """How many logits the graph explains."""
        return len(self.probabilities)

    @property
    def weights(self) -> Tensor:
        """(logits,) the probabilities, as shares of their sum."""
        weights = torch.tensor(self.probabilities, dtype=torch.float64)
        return weights / weights.sum()

    def values(self) -> Tensor:
        """(E,) float64: the values of the nodes that have inputs."""
        return torch.tensor(
            [node.value for node in self.nodes[: len(self.edges)]], dtype=torch.float64
        )

    def rounding(self) -> float:
        """The largest |gap| over the sizes of all that was added."""
        sizes = self.edges.double().abs().sum(-1) + self.elsewhere_size
        return (self.gaps.abs() / sizes.clamp_min(1e-300)).max().item()

    def remainder_share(self) -> float:
        """The share of all edges' sizes that comes from remainders: zero if all is explained."""
        is_remainder = torch.tensor([node.kind == "remainder" for node in self.nodes])
        sizes = self.edges.double().abs()
        total = sizes.sum() + self.elsewhere_size.sum()
        return (sizes[:, is_remainder].sum() / total.clamp_min(1e-300)).item()

    def find(self, identity: str) -> int:
        """The place of the node with this ``id``; KeyError if there is none."""
        for place, node in enumerate(self.nodes):
            if node.id == identity:
                return place
        raise KeyError(identity)

    def select(self, nodes: Tensor, edges: Tensor) -> Graph:
        """The graph with some of its nodes and edges; what is cut is found in ``elsewhere``.

        Args:
            nodes: (N,) bool. Logits stay.
            edges: (E, N) bool.
        """
        nodes = nodes.clone()
        nodes[: self.logits] = True
        has_inputs = nodes[: len(self.edges)]
        kept = self.edges * (edges & nodes)
        cut = (self.edges - kept)[has_inputs].double()
        places = nodes.nonzero()[:, 0].tolist()
        moved = {old: new for new, old in enumerate(places)}
        supernodes = []
        for supernode in self.supernodes:
            members = tuple(moved[node] for node in supernode.nodes if node in moved)
            if members:
                supernodes.append(Supernode(supernode.name, members))
        return replace(
            self,
            nodes=[self.nodes[place] for place in places],
            edges=kept[has_inputs][:, nodes],
            elsewhere=self.elsewhere[has_inputs] + cut.sum(-1),
            elsewhere_size=self.elsewhere_size[has_inputs] + cut.abs().sum(-1),
            gaps=self.gaps[has_inputs],
            labels=[self.labels[place] for place in places] if self.labels else [],
            contexts=[self.contexts[place] for place in places] if self.contexts else [],
            effects=[self.effects[place] for place in places] if self.effects else [],
            supernodes=tuple(supernodes),
        )
