"""The initialiser whose input prototypes are means of the inputs that fire a unit."""

from __future__ import annotations

from torch import Tensor

from ...checkpoint_code.settings import KernelFFNConfig, needs_both_signs
from ...families.weights import FFNWeights
from .assembling import assemble_prototypes, mean_length
from .prototypes import Prototypes, register_initialiser
from .unit_pieces import SMALLEST_LENGTH, UnitRows, choose_signs


@register_initialiser("firing-means")
def initialise_at_firing_means(
    weights: FFNWeights, settings: KernelFFNConfig, inputs: Tensor
) -> Prototypes:
    """Start from the mean input that fires each unit, one for each sign of a gated unit."""
    return assemble_prototypes(weights, settings, inputs, FiringMeans(weights, settings, inputs))


class FiringMeans:
    """Offers, for each unit and sign, the mean of the inputs weighted by how much they fire it."""

    ratios = (1.0,)
    """A mean has no mixing ratio to choose."""

    def __init__(self, weights: FFNWeights, settings: KernelFFNConfig, inputs: Tensor):
        """Average ``inputs`` (tokens, d) for all units and signs of ``weights``."""
        self.length = mean_length(inputs)
        signs = choose_signs(needs_both_signs(settings, weights.gate is not None))
        self.means = {
            sign: _average_firing_inputs(weights, settings, sign, inputs, self.length)
            for sign in signs
        }

    def __call__(self, units: slice, ratio: Tensor, sign: float) -> UnitRows:
        """Select the means of ``units`` for this ``sign``; ``ratio`` is not used."""
        means = self.means[sign]
        return UnitRows(means.rows[units], means.bias[units], means.stretch[units])


def _average_firing_inputs(
    weights: FFNWeights, settings: KernelFFNConfig, sign: float, inputs: Tensor, length: Tensor
) -> UnitRows:
    """Mean of the inputs that fire each unit with this sign, made as long as ``length``.

    The bias puts the mean score over the sample at zero, which is mostly what all inputs have in
    common.
    """
    if settings.values == "gated":
        fires = weights.activation(weights.pre_activations(inputs)[1]).relu()
    else:
        fires = weights.coefficients(inputs) * (sign or 1.0)
    share = fires.relu() / fires.relu().sum(0).clamp_min(SMALLEST_LENGTH)

    means = share.T @ inputs
    rows = means * (length / means.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_LENGTH))
    bias = -(rows @ inputs.mean(0))

    own_rows = weights.up if weights.gate is None else weights.gate
    stretch = rows.norm(dim=-1) / own_rows.norm(dim=-1).clamp_min(SMALLEST_LENGTH)
    return UnitRows(rows, bias, stretch)
