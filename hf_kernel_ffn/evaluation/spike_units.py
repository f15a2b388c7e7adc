"""Which units write the output of an FFN at spike tokens."""

from __future__ import annotations

import re

from torch import Tensor

from ..checkpoint_code.record import Readout
from ..conversion.figures import SPIKE

SPIKE_UNITS = 4
"""How many units are named at most: most often one or two write nearly all of a spike."""
SMALLEST_SHARE = 0.01
"""A unit that writes less of the spikes than this is not named."""

UnitShare = tuple[str, float]
"""A unit's number as text, and its share of what is written along the outputs."""


class SpikeUnits:
    """Sums up what every unit writes along the FFN's own output at spikes."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._along: Tensor | None = None
        self._squares = 0.0

    def add(self, record: Readout) -> None:
        """Count in a ``record`` with coefficients (spikes, prototypes)."""
        outputs = record.output().double()
        coefficients = record.coefficients.double()
        along = (coefficients * (outputs @ record.dictionary.double().T)).sum(0).cpu()
        self.names = record.names
        self._along = along if self._along is None else self._along + along
        self._squares += outputs.square().sum().item()

    def list_largest(self) -> list[UnitShare]:
        """List the units that write most, and their shares of Σ‖y‖², the largest first.

        The shares of all units and the bias sum to one; a unit that writes against the outputs has
        a negative share. Prototypes of one unit are counted as one.
        """
        if self._along is None or not self._squares:
            return []
        shares: dict[str, float] = {}
        for name, along in zip(self.names, self._along.tolist(), strict=True):
            unit = get_unit(name)
            shares[unit] = shares.get(unit, 0.0) + along / self._squares
        largest = sorted(shares.items(), key=lambda item: -item[1])[:SPIKE_UNITS]
        return [(unit, share) for unit, share in largest if share > SMALLEST_SHARE]


def get_unit(name: str) -> str:
    """Return the hidden unit that the prototype ``name`` is of, such as 12 of ``12+``; ``name``
    itself if it begins with no number."""
    number = re.match(r"\d+", name)
    return name if number is None else number[0]


def find_spikes(outputs: Tensor) -> Tensor:
    """Return which of the ``outputs`` (tokens, hidden_size) are spikes, (tokens,) bool."""
    squares = outputs.double().square().sum(-1)
    return squares > SPIKE**2 * squares.median()


def list_spike_units(record: Readout) -> dict[int, list[UnitShare]]:
    """List the units that write each spike in ``record``, by the token's place in it."""
    units: dict[int, list[UnitShare]] = {}
    for place in find_spikes(record.output()).nonzero()[:, 0].tolist():
        sums = SpikeUnits()
        row = record.coefficients[place : place + 1]
        sums.add(record._replace(coefficients=row))
        units[place] = sums.list_largest()
    return units
