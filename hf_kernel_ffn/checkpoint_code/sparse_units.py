"""Which units a readout with tied rows keeps, where a sparse map keeps few of them.

A unit is as loud at a token as what it writes is long: |c_i|‖v_i‖. ``top-k`` keeps the loudest of
every token, ``threshold`` all that pass one value per layer.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .decode import RowNorms
from .linears import get_effective_weight
from .parameters import to_at_least_float32
from .simplex import top_k_mask
from .unit_pieces import UnitPieces


class SparseUnits(UnitPieces):
    """What a readout with tied rows does about loudness."""

    output_prototypes: nn.Linear
    column_norms: RowNorms

    def keep_loudest(self, coefficients: Tensor) -> Tensor:
        """``coefficients`` (..., units), zero where a sparse map does not keep the unit."""
        settings = self.config.settings
        if not settings.sparse:
            return coefficients
        loudness = self.measure_loudness(coefficients)
        if settings.simplex == "threshold":
            return coefficients * (loudness >= self.threshold())
        self.require_whole("keeps a number of units per token")
        return coefficients * top_k_mask(loudness, settings.top_k or 0)

    def measure_loudness(self, coefficients: Tensor) -> Tensor:
        """|c_i|‖v_i‖ (..., units), float32 at least, without gradients."""
        weight, _ = get_effective_weight(self.output_prototypes, coefficients)
        keep = not (self.training or torch.is_grad_enabled())
        squares = self.column_norms.compute(weight.detach().T, keep)
        lengths = to_at_least_float32(squares).sqrt()
        return to_at_least_float32(coefficients.detach()).abs() * lengths

    @torch.no_grad()
    def fit_threshold(self, hidden_states: Tensor, rate: float = 1.0) -> None:
        """Move the threshold toward where ``top_k`` units pass on average.

        Args:
            hidden_states: (..., hidden_size) tokens over which the average is taken.
            rate: the share of the way, in its logarithm.
        """
        loudness = self.measure_loudness(self.coefficients_of_all(hidden_states))
        self.move_threshold(loudness.log().flatten(0, -2), rate)
