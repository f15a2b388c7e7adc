"""Pieces of kernel that together stand in for one unit of a stock FFN, fitted to a sample."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...checkpoint_code.kernels import Kernel
from ...checkpoint_code.settings import KernelFFNConfig
from ...families.weights import FFNWeights
from .pursuit import select_columns

SHIFTS = (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Candidates for b, added to the teacher's own bias, in standard deviations of the unit's score.

Those below zero, where the kernel fires on less than half of the inputs, are only for pieces that
are added to another.
"""
UNITS_AT_ONCE = 1024
"""Units that are fitted together, so that memory stays bounded."""
SMALLEST_LENGTH = 1e-12
"""Norms and sums below this are taken as this where they divide: a row of zeros stays one."""


class UnitRows(NamedTuple):
    """Input prototypes offered for m units."""

    rows: Tensor
    """(m, d)"""
    bias: Tensor
    """(m,)"""
    stretch: Tensor
    """(m,) how many times as long the rows are as the unit's own."""


class RowSource(Protocol):
    """What an initialiser offers as input prototypes, for any units, mixing ratio and sign."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Candidates for the mixing ratio."""

    @property
    def length(self) -> Tensor | None:
        """() of every row; None: rows have the lengths of the teacher's."""

    def __call__(self, units: slice, ratio: Tensor, sign: float) -> UnitRows:
        """Make the rows of m ``units`` for ``ratio`` (m,) and ``sign``: 1, −1, or 0 for none."""


class UnitPiece(NamedTuple):
    """One piece of every unit: (units,) each."""

    amount: Tensor
    """Of the kernel, or of the difference between the kernels of both signs."""
    ratio: Tensor
    """Chosen among those of the row source."""
    shift: Tensor
    """Chosen among SHIFTS, in standard deviations of the score."""


class UnitTarget(NamedTuple):
    """What pieces are fitted to, (tokens, units)."""

    values: Tensor
    importance: Tensor | None
    """Weight of each token's squared error; None: all alike, a constant being free."""


def choose_signs(both: bool) -> tuple[float, ...]:
    """Return the signs of the rows that one piece consists of: ``both``, or none."""
    return (1.0, -1.0) if both else (0.0,)


def select_units(weights: FFNWeights, units: slice) -> FFNWeights:
    """Return ``weights`` with the given units only."""

    def select(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[units]

    return weights._replace(
        up=weights.up[units],
        up_bias=select(weights.up_bias),
        gate=select(weights.gate),
        gate_bias=select(weights.gate_bias),
        down=weights.down[units],
    )


class Candidates:
    """The kernels that may stand in for a unit: all ratios of a row source × SHIFTS."""

    def __init__(
        self,
        inputs: Tensor,
        source: RowSource,
        *,
        kernel: Kernel,
        parameters: dict[str, float],
        signs: tuple[float, ...],
    ):
        """Prepare to evaluate ``kernel`` at ``inputs`` (tokens, d).

        A kernel without a bias is not shifted.
        """
        self.inputs = inputs
        self.input_square = inputs.square().sum(-1, keepdim=True)
        self.source = source
        self.kernel = kernel
        self.parameters = {name: torch.as_tensor(value) for name, value in parameters.items()}
        self.signs = signs
        self.shifts = SHIFTS if kernel.uses_bias else (0.0,)
        self.table = torch.tensor(
            [(ratio, shift) for ratio in source.ratios for shift in self.shifts],
            device=inputs.device,
        )
        """(candidates, 2): ratio and shift of each."""

    def compute_columns(self, units: slice, count: int) -> Tensor:
        """(candidates, tokens, count): every candidate's kernel for ``count`` units.

        With two signs it is the difference between their kernels.
        """
        columns = []
        for ratio in self.source.ratios:
            ratios = self.inputs.new_full((count,), ratio)
            sides = [self._score(self.source(units, ratios, sign)) for sign in self.signs]
            for shift in self.shifts:
                values = [
                    self.kernel.value(score + shift * deviation, distance2, **self.parameters)
                    for score, distance2, deviation in sides
                ]
                columns.append(values[0] - values[1] if len(values) == 2 else values[0])
        return torch.stack(columns)

    def _score(self, offered: UnitRows) -> tuple[Tensor, Tensor | None, Tensor]:
        """Scores and squared distances (tokens, units), and the scores' deviations (units,)."""
        dot = self.inputs @ offered.rows.T
        distance2 = None
        if self.kernel.uses_distance:
            row_square = offered.rows.square().sum(-1)
            distance2 = (self.input_square + row_square - 2 * dot).clamp_min(0)
        score = dot + offered.bias if self.kernel.uses_bias else dot
        return score, distance2, dot.std(0)


def fit_unit_pieces(
    weights: FFNWeights, settings: KernelFFNConfig, candidates: Candidates, pieces: int
) -> list[UnitPiece]:
    """Choose the ``pieces`` whose sum stands in best for each unit's coefficient."""
    allowed_first = candidates.table[:, 1] >= 0
    amounts = []
    numbers = []
    for low in range(0, len(weights.up), UNITS_AT_ONCE):
        units = slice(low, low + UNITS_AT_ONCE)
        unit_weights = select_units(weights, units)
        target = _compute_target(unit_weights, settings, candidates.inputs)
        amount, number = select_columns(
            candidates.compute_columns(units, len(unit_weights.up)),
            target.values,
            target.importance,
            pieces=pieces,
            allowed_first=allowed_first,
        )
        amounts.append(amount)
        numbers.append(number)

    all_amounts = torch.cat(amounts)
    ratios_and_shifts = candidates.table[torch.cat(numbers)]
    return [
        UnitPiece(all_amounts[:, i], ratios_and_shifts[:, i, 0], ratios_and_shifts[:, i, 1])
        for i in range(pieces)
    ]


def _compute_target(weights: FFNWeights, settings: KernelFFNConfig, inputs: Tensor) -> UnitTarget:
    """What the kernel is to stand in for at ``inputs`` (tokens, d)."""
    up, gate = weights.pre_activations(inputs)
    activation = weights.activation(up if gate is None else gate)
    if settings.values == "gated":
        # y = Σ κ_i (u_i·x) v_i: κ stands in for the activation, weighted by (u·x)²
        return UnitTarget(activation, up.square())
    return UnitTarget(activation if gate is None else activation * up, None)
