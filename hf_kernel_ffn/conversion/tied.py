"""From a stock FFN to a readout with tied rows."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.kernels import get_kernel
from ..checkpoint_code.layer_config import LayerConfig
from ..checkpoint_code.settings import KernelFFNConfig
from ..checkpoint_code.tied import AnyKernelFFN, TiedKernelFFN
from ..families.weights import FFNWeights
from .pieces.fitting import fit_pieces


def make_tied_ffn(
    weights: FFNWeights,
    config: LayerConfig,
    inputs: Tensor,
    fitted: AnyKernelFFN | None = None,
) -> TiedKernelFFN:
    """The readout of ``config`` that stands in for the FFN ``weights`` (float32).

    The rows and the outputs stay the teacher's. Kernels per unit are fitted on ``inputs``
    (tokens, hidden_size), float32, or taken from ``fitted``.

    Raises:
        InputError: ``fitted`` has pieces of other settings.
    """
    if fitted is None:
        start = fit_pieces(weights, config.settings, inputs)
        pieces = {
            name: value for name, value in start.pieces._asdict().items() if value is not None
        }
        reference = {**start.parameters, "scale": start.scale}
        if start.far is not None and get_kernel(config.settings.kernel).uses_knot:
            reference["far"] = start.far
    else:
        pieces, reference = _take_pieces(fitted, config)

    gated = weights.gate is not None
    if config.settings.simplex == "threshold":
        reference["threshold"] = 1.0  # found on the sample
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


def _take_pieces(
    fitted: AnyKernelFFN, config: LayerConfig
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The pieces of ``fitted`` by name, and the reference values that go with them."""
    require_same_pieces(fitted, config.settings)
    assert isinstance(fitted, TiedKernelFFN)
    pieces = {name: fitted.get_piece_tensor(name) for name in fitted.pieces}
    reference = dict(fitted.config.reference)
    for name in fitted.log_ratio:
        reference[name] = fitted.positive(name).item()
    reference.pop("threshold", None)
    return pieces, reference


def require_same_pieces(fitted: AnyKernelFFN, wanted: KernelFFNConfig) -> None:
    """InputError unless the pieces of ``fitted`` are of the settings ``wanted``, resolved."""
    found = fitted.config.settings
    for name in ("rows", "kernel", "values", "pieces"):
        if getattr(found, name) != getattr(wanted, name):
            raise InputError(
                f"found {name}={getattr(found, name)!r} in the model to start from, expected "
                f"{getattr(wanted, name)!r}: convert it by these settings first"
            )
