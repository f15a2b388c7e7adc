"""From a stock FFN to a readout with tied rows."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..checkpoint_code.kernels import get_kernel
from ..checkpoint_code.layer_config import LayerConfig
from ..checkpoint_code.tied import TiedKernelFFN
from ..families.weights import FFNWeights
from .pieces.fitting import fit_pieces


def make_tied_ffn(weights: FFNWeights, config: LayerConfig, inputs: Tensor) -> TiedKernelFFN:
    """The readout of ``config`` that stands in for the FFN ``weights`` (float32).

    The rows and the outputs stay the teacher's. Kernels per unit are fitted on ``inputs``
    (tokens, hidden_size), float32.
    """
    fitted = fit_pieces(weights, config.settings, inputs)
    gated = weights.gate is not None
    reference = {**fitted.parameters, "scale": fitted.scale}
    if fitted.far is not None and get_kernel(config.settings.kernel).uses_knot:
        reference["far"] = fitted.far
    if config.settings.simplex == "threshold":
        reference["threshold"] = 1.0  # found on the sample
    pieces = {name: value for name, value in fitted.pieces._asdict().items() if value is not None}
    return TiedKernelFFN.from_pieces(
        replace(config, reference=reference, gated=gated, prototypes=len(weights.down)),
        rows=weights.up if weights.gate is None else weights.gate,
        row_bias=weights.gate_bias if gated else weights.up_bias,
        values=weights.up if gated else None,
        value_bias=weights.up_bias if gated else None,
        outputs=weights.down,
        output_bias=weights.down_bias,
        pieces=pieces,
    )
