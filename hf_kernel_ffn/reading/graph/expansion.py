"""Which nodes a graph should have: from the logits backward, the most influential next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from .attributor import Attributor, EdgeRows, Target

ROW_BYTES = 2**28
"""What the rows of one backward pass may take; so many nodes are expanded together."""
MOST_AT_ONCE = 32
"""Nodes expanded together, at most: later choices know the influence of earlier ones."""
EDGES_KEPT = 4096
"""Edges from units and heads that are remembered for each node, about, its largest. Sums are over
all."""
SAMPLE = 2**16
"""Edges by which the size of the last that is remembered is estimated; a sort of all of them would
take as long as the backward pass."""


class Expansion:
    """Rows of edges of the nodes expanded so far, the largest edges of each."""

    def __init__(self, attributor: Attributor, weights: Tensor):
        """Start with nothing.

        Args:
            weights: (logits,) what each logit counts.
        """
        self.attributor = attributor
        self.targets: list[Target] = []
        self.sources: list[Tensor] = []
        """Per node (kept,) int64 numbers of units and heads."""
        self.edges: list[Tensor] = []
        """Per node (kept,) their edges."""
        self.leaves: list[Tensor] = []
        """Per node the edges of all other sources."""
        self.sums: list[float] = []
        """Per node the sum of all edges."""
        self.sizes: list[float] = []
        """Per node the sum of all edges' absolute values."""
        self.values: list[float] = []
        self.gaps: list[float] = []
        self._weights = weights
        self._numbers: list[int] = []
        """Of every node as a source; −1 for logits."""

    def expand(self, targets: list[Target]) -> None:
        """Read the edges into ``targets``, as many at once as memory allows."""
        table = self.attributor.table
        row_bytes = table.total * self.attributor.final_logits.itemsize
        at_once = min(MOST_AT_ONCE, max(1, ROW_BYTES // row_bytes))
        for start in range(0, len(targets), at_once):
            batch = targets[start : start + at_once]
            self._keep(batch, self.attributor.read_rows(batch))

    def grow(self, count: int, see: Callable[[int], None]) -> None:
        """Expand the most influential nodes until there are ``count`` beside the logits.

        Fewer if nothing else has an influence.

        Args:
            see: is told how many nodes there are, after each step.
        """
        table = self.attributor.table
        logits = len(self.targets)
        while len(self.targets) - logits < count:
            influence = self.spread()
            influence[[number for number in self._numbers if number >= 0]] = 0.0
            missing = count - (len(self.targets) - logits)
            best = influence.topk(min(MOST_AT_ONCE, missing, len(influence)))
            numbers = best.indices[best.values > 0].tolist()
            if not numbers:
                return
            self.expand([Target(*table.find(number)) for number in numbers])
            see(len(self.targets) - logits)

    def spread(self) -> Tensor:
        """(units and heads,) how much each matters to the logits, over paths by nodes so far."""
        influence = torch.zeros(self.attributor.table.expandable, dtype=torch.float64)
        levels = defaultdict(list)
        for place, target in enumerate(self.targets):
            levels[2 * target.layer + (target.kind == "unit")].append(place)
        for level in sorted(levels, reverse=True):
            for place in levels[level]:
                number = self._numbers[place]
                weight = self._weights[place] if number < 0 else influence[number]
                shares = self.edges[place].double().abs() / max(self.sizes[place], 1e-300)
                influence.index_add_(0, self.sources[place], shares * weight)
        return influence

    def _keep(self, targets: list[Target], rows: EdgeRows) -> None:
        """Remember the largest edges of ``rows``, and all of those that have no inputs."""
        table = self.attributor.table
        first = table.expandable
        for number, target in enumerate(targets):
            row = rows.edges[number]
            sources = _find_largest(row[:first].abs(), EDGES_KEPT)
            self.targets.append(target)
            self.sources.append(sources.cpu())
            self.edges.append(row[sources].cpu())
            self.leaves.append(row[first:].cpu().clone())
            self.sums.append(rows.sums[number].item())
            self.sizes.append(rows.sizes[number].item())
            self.values.append(rows.values[number].item())
            self.gaps.append(rows.gaps[number].item())
            is_source = target.kind != "logit"
            self._numbers.append(table.number(*target) if is_source else -1)

    def assemble(self) -> tuple[list[int], Tensor]:
        """The sources that are nodes, and the edges between nodes.

        Returns:
            numbers of the sources without inputs that add something to a node;
            (E, E + those) edges, the first E columns being the expanded nodes themselves.
        """
        count = len(self.targets)
        place_of = torch.full((self.attributor.table.expandable,), -1)
        for place, number in enumerate(self._numbers):
            if number >= 0:
                place_of[number] = place
        inner = torch.zeros(count, count, dtype=self.edges[0].dtype)
        for place in range(count):
            columns = place_of[self.sources[place]]
            known = columns >= 0
            inner[place, columns[known]] = self.edges[place][known]

        leaves = torch.stack(self.leaves)
        used = leaves.any(0).nonzero()[:, 0]
        first = self.attributor.table.expandable
        return (used + first).tolist(), torch.cat([inner, leaves[:, used]], 1)


def _find_largest(sizes: Tensor, count: int) -> Tensor:
    """The places of about ``count`` of the largest of ``sizes`` (n,), or of all that are not
    zero."""
    step = max(1, len(sizes) // SAMPLE)
    sample = sizes[::step]
    in_sample = count // step
    if in_sample >= len(sample):
        return sizes.nonzero()[:, 0]
    cut = sample.topk(in_sample + 1).values[-1]
    return (sizes > cut).nonzero()[:, 0]
