"""The initialisers whose input prototypes are a unit's own rows: single, polarised, data-scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checkpoint_code.settings import AT_THE_DATA, KernelFFNConfig, needs_both_signs
from ...families.weights import FFNWeights
from .assembling import assemble_prototypes, mean_length
from .prototypes import Prototypes, register_initialiser
from .unit_pieces import SMALLEST_LENGTH, UnitRows, select_units

RATIOS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
"""Candidates for r in the polarised rows (gate ± r·up)/2; r = 1 is the identity
gu = ((g+u)/2)² − ((g−u)/2)²."""


@register_initialiser("single", "polarised", "data-scale")
def initialise_from_rows(
    weights: FFNWeights, settings: KernelFFNConfig, inputs: Tensor
) -> Prototypes:
    """Start from each unit's own rows, or from (gate ± r·up)/2 where both signs are needed.

    ``data-scale`` makes them as long as the inputs are on average.
    """
    length = mean_length(inputs) if settings.init in AT_THE_DATA else None
    both_signs = needs_both_signs(settings, weights.gate is not None)
    source = OwnRows(weights, length, RATIOS if both_signs else (1.0,))
    return assemble_prototypes(weights, settings, inputs, source)


class OwnRows:
    """Offers rows made of a unit's gate and up rows."""

    def __init__(self, weights: FFNWeights, length: Tensor | None, ratios: tuple[float, ...]):
        """Offer the rows of ``weights``, made as long as ``length`` unless that is None."""
        self.weights = weights
        self.length = length
        self.ratios = ratios

    def __call__(self, units: slice, ratio: Tensor, sign: float) -> UnitRows:
        """Make the rows of ``units``: polarised by ``ratio`` (m,) unless ``sign`` is 0."""
        weights = select_units(self.weights, units)
        rows, bias = _mix_rows(weights, ratio, sign)
        if self.length is None:
            return UnitRows(rows, bias, torch.ones_like(bias))

        stretch = self.length / rows.norm(dim=-1).clamp_min(SMALLEST_LENGTH)
        return UnitRows(rows * stretch[:, None], bias * stretch, stretch)


def _mix_rows(weights: FFNWeights, ratio: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Rows (m, d) and biases (m,): up, gate, or (gate + sign·ratio·up)/2."""
    zero = weights.up.new_zeros(len(weights.up))
    up_bias = zero if weights.up_bias is None else weights.up_bias
    if weights.gate is None:
        return weights.up, up_bias

    gate_bias = zero if weights.gate_bias is None else weights.gate_bias
    if sign == 0:
        return weights.gate, gate_bias

    rows = torch.addcmul(weights.gate, ratio[:, None], weights.up, value=sign).div_(2)
    return rows, (gate_bias + sign * ratio * up_bias) / 2
