"""One FFN converted: the readout that stands in for it, and its figures."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.layer_config import LayerConfig
from ..checkpoint_code.settings import KernelFFNConfig
from ..checkpoint_code.tied import AnyKernelFFN
from ..families.lookup import StockFFN, get_attribute_at
from ..families.weights import FFNWeights, read_stock_weights
from .block_source import BlockSource
from .figures import SPIKE, measure_fvu
from .initialization import initial_gate_bias, initialise_prototypes
from .ridge import calibrate_ffn
from .sampling import make_blind_sample
from .tied import make_tied_ffn

FEW_TOKENS = 256
"""Inputs at which a new readout is tried."""


def convert_ffn(
    model: PreTrainedModel,
    stock: StockFFN,
    settings: KernelFFNConfig,
    source: BlockSource | None,
    start: AnyKernelFFN | None = None,
) -> tuple[AnyKernelFFN, dict[str, Any]]:
    """Make the readout, in float32, for the FFN ``stock`` of ``model``, and its figures.

    Output prototypes of free rows, and of tied ones that are sparse, are calibrated on what
    ``source`` reads, unless that is None. Dense tied rows need no more than the fit of their
    pieces, which are those of ``start`` where that is given.

    Raises:
        InputError: ``start`` has pieces of other settings, or the readout is not finite.
    """
    weights = read_stock_weights(model, stock)
    if source is None:
        sample = make_blind_sample(stock.norm(model.base_model), weights.up)
    else:
        sample = source.read_fit_sample(stock)
    in_float32: Any = {
        name: part.float() for name, part in weights._asdict().items() if isinstance(part, Tensor)
    }
    weights = weights._replace(**in_float32)

    ffn: AnyKernelFFN
    if settings.rows == "tied":
        size = weights.up.shape[1]
        layer = make_layer_config(
            model, stock, settings, size=size, prototypes=len(weights.up), reference={}
        )
        ffn = make_tied_ffn(weights, layer, sample, start)
    else:
        ffn = _make_free_ffn(model, stock, settings, weights, sample)
    if settings.simplex == "threshold":
        _fit_threshold(ffn, sample)

    figures: dict[str, Any] = {}
    if source is not None and (settings.rows == "free" or settings.sparse or settings.skip):
        fitted = source.read(stock, "ridge")
        held = source.read(stock, "held_out")
        figures = calibrate_ffn(
            ffn,
            stock,
            sample,
            fitted=fitted,
            held=held,
            temperature=settings.temperature,
            longest=_find_longest_ordinary(weights, sample),
        )
        if settings.rows == "tied":
            figures |= measure_fvu(ffn, stock, source.read(stock, "held_out"))
        if settings.rows == "tied" and settings.simplex == "threshold":
            _fit_threshold(ffn, sample)  # units are louder or quieter by their new outputs
    elif source is not None:
        figures = measure_fvu(ffn, stock, source.read(stock, "held_out"))
    _require_finite_readout(ffn, stock.path, sample)
    return ffn, {
        "prototypes": ffn.config.prototypes,
        "parameters": sum(parameter.numel() for parameter in ffn.parameters()),
        "reference": dict(ffn.config.reference),
        **figures,
    }


@torch.no_grad()
def _require_finite_readout(ffn: AnyKernelFFN, path: str, sample: Tensor) -> None:
    """InputError unless the weights of ``ffn`` and what it writes at ``sample`` are finite."""
    parts = [*ffn.state_dict().values(), ffn(sample[:FEW_TOKENS])]
    if not all(part.isfinite().all() for part in parts):
        raise InputError(
            f"found a readout for {path} that is not finite with kernel "
            f"{ffn.config.settings.kernel!r}, expected one: its values overflow where this layer "
            "reads, or cannot be told apart there; choose another kernel"
        )


def _find_longest_ordinary(weights: FFNWeights, sample: Tensor) -> float:
    """How long an output is at most that is no spike, by those at ``sample``; any, if there are
    none, as in an expert that no token comes to."""
    if not len(sample):
        return math.inf
    outputs = weights.coefficients(sample) @ weights.down
    if weights.down_bias is not None:
        outputs = outputs + weights.down_bias
    return SPIKE * outputs.norm(dim=-1).median().item()


def _fit_threshold(ffn: AnyKernelFFN, sample: Tensor) -> None:
    """Make the threshold that keeps ``top_k`` prototypes over ``sample`` the reference."""
    ffn.fit_threshold(sample)
    ffn.set_reference("threshold", math.exp(ffn.log_threshold().item()))
    ffn.threshold_log_ratio.zero_()


def _make_free_ffn(
    model: PreTrainedModel,
    stock: StockFFN,
    settings: KernelFFNConfig,
    weights: FFNWeights,
    sample: Tensor,
) -> KernelFFN:
    """A readout with a row for every prototype, fitted on ``sample`` (tokens, hidden_size)."""
    start = initialise_prototypes(weights, settings, sample)
    reference = dict(start.parameters)
    reference["scale"] = start.scale if settings.intensity == "mass" else 1.0
    if not settings.coefficients_are_kernel:
        reference["temperature"] = settings.temperature or 1.0
    if settings.simplex == "threshold":
        reference["threshold"] = 1.0  # found by _fit_threshold

    up_rows = None
    up_bias = None
    if settings.values == "gated":
        unit = start.units.abs().long() - 1
        up_rows = weights.up.index_select(0, unit)
        up_bias = None if weights.up_bias is None else weights.up_bias[unit]
    prototypes, size = start.rows.shape
    layer = make_layer_config(
        model, stock, settings, size=size, prototypes=prototypes, reference=reference
    )
    ffn = KernelFFN.from_prototypes(
        layer,
        rows=start.rows,
        dictionary=start.dictionary,
        units=start.units,
        bias=start.bias,
        output_bias=weights.down_bias,
        up_rows=up_rows,
        up_bias=up_bias,
        gate_bias=initial_gate_bias(),
    ).requires_grad_(False)
    return ffn


def make_layer_config(
    model: PreTrainedModel,
    stock: StockFFN,
    settings: KernelFFNConfig,
    *,
    size: int,
    prototypes: int,
    reference: dict[str, float],
) -> LayerConfig:
    """Describe the readout that replaces ``stock`` as config.json does.

    Args:
        settings: resolved.
        size: hidden_size of the FFN.
        prototypes: how many.
        reference: see :class:`hf_kernel_ffn.checkpoint_code.layer_config.LayerConfig`.
    """

    def read_dropout(attribute: str | None) -> float:
        return float(get_attribute_at(model.config, attribute)) if attribute else 0.0

    experts = 0
    if stock.expert is not None:
        experts = len(get_attribute_at(stock.host, stock.shape.down))
    return LayerConfig(
        settings,
        size,
        prototypes,
        reference,
        dropout=read_dropout(stock.shape.dropout),
        hidden_dropout=read_dropout(stock.shape.hidden_dropout),
        number=stock.number,
        absorbed=stock.absorbed,
        experts=experts,
    )
