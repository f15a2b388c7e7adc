"""Numbers for all that may write into a graph's nodes: one axis of every row of edges."""

from __future__ import annotations

from typing import NamedTuple

SOURCE_KINDS = ("unit", "head", "embedding", "position", "bias", "remainder", "start")
"""Kinds of sources, in the order in which they are numbered."""


class Source(NamedTuple):
    """One source at one token."""

    kind: str
    """One of :data:`SOURCE_KINDS`."""
    layer: int
    """Its block; −1 for embeddings, the number of blocks for what comes after the last."""
    position: int
    number: int
    """The unit or head; 0 for others."""


class SourceTable:
    """Sources of a pass over T tokens through L blocks by number.

    Units come first, by layer, token and unit; then heads likewise; then embeddings and positions
    by token; then biases, remainders and what the start token writes by layer (L + 1 of them) and
    token.
    """

    def __init__(self, tokens: int, units: list[int], heads: int = 0):
        """Number the sources.

        Args:
            units: of each block's FFN.
            heads: of each block; 0 where heads are no nodes.
        """
        self.tokens = tokens
        self.layers = len(units)
        self.units = units
        self.heads = heads
        self._starts: dict[tuple[str, int], int] = {}
        self._sizes: dict[tuple[str, int], int] = {}

        places = [("unit", layer, count) for layer, count in enumerate(units)]
        places += [("head", layer, heads) for layer in range(len(units)) if heads]
        places += [("embedding", -1, 1), ("position", -1, 1)]
        for kind in ("bias", "remainder", "start"):
            places += [(kind, layer, 1) for layer in range(len(units) + 1)]
        total = 0
        for kind, layer, count in places:
            self._starts[kind, layer] = total
            self._sizes[kind, layer] = count
            total += count * tokens
        self.total = total
        self.expandable = self._starts["embedding", -1]
        """The first so many are units and heads, which have inputs themselves."""

    def place(self, kind: str, layer: int) -> slice:
        """Where the sources of one kind in one layer are, all tokens one after the other."""
        start = self._starts[kind, layer]
        return slice(start, start + self._sizes[kind, layer] * self.tokens)

    def number(self, kind: str, layer: int, position: int, index: int = 0) -> int:
        """The number of one source."""
        return self._starts[kind, layer] + position * self._sizes[kind, layer] + index

    def find(self, number: int) -> Source:
        """The source with this number."""
        kind, layer = max(
            (place for place, start in self._starts.items() if start <= number),
            key=lambda place: self._starts[place],
        )
        position, index = divmod(number - self._starts[kind, layer], self._sizes[kind, layer])
        return Source(kind, layer, position, index)
