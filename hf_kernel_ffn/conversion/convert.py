"""Convert a pretrained model: every FFN becomes a kernel readout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.modeling import install_ffn
from ..checkpoint_code.settings import KernelFFNConfig, LayerConfig, resolve_defaults
from ..families.detection import refuse_undescribed_ffns
from ..families.lookup import (
    StockFFN,
    choose_layers,
    find_stock_ffns,
    get_attribute_at,
    parse_layers,
)
from ..families.registry import get_architecture_of_model
from ..families.student import make_config_entry, make_student_from_entry
from ..families.weights import is_finite, read_stock_weights, refuse_quantised_weights
from ..text.inputs import Inputs, count_rows, select_rows, tokens_per_row
from .initialization import initial_gate_bias, initialise_prototypes
from .ridge import calibrate_ffn
from .sampling import (
    make_blind_sample,
    read_ffn_inputs,
    read_fit_sample,
    split_fitted_and_held,
    write_own_text,
)

if TYPE_CHECKING:
    from ..families.student import ConvertedModel

CALIBRATION_TOKENS = 16_384
"""Tokens that a conversion reads, of the user's text or of the model's own making."""


@dataclass
class ConversionReport:
    """What a conversion did."""

    family: str
    """The teacher's model_type."""
    calibration: str
    """``text``, ``own tokens`` or ``none``."""
    calibration_tokens: int
    layers: dict[str, dict] = field(default_factory=dict)
    """By FFN path: prototypes, parameters, and the figures of :func:`hf_kernel_ffn.conversion.ridge.calibrate_ffn`."""

    def to_dict(self) -> dict:
        return dict(vars(self))


@torch.no_grad()
def convert(
    teacher: PreTrainedModel,
    config: KernelFFNConfig | Mapping[int, KernelFFNConfig] | None = None,
    layers: str | list[int] | None = None,
    *,
    calibration_ids: Inputs | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    copy: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> tuple[ConvertedModel, ConversionReport]:
    """A student: ``teacher`` with kernel-readout FFNs. The teacher stays as it is.

    Layers are converted in order, each calibrated to do at what the student feeds it what the teacher's FFN does there. Where
    torch.distributed is initialised, every process calls this with the same arguments: each reads its share of the tokens, and
    all get the same student.

    Args:
        config: settings for every layer, or one per layer number (then those layers are converted).
        layers: which layers, as numbers or ``"0-5,7"``, or by a pattern of FFN paths, such as ``"text_model.*"``; None for all.
            Several stacks are counted on; the experts of a layer have its number.
        calibration_ids: (rows, length) token ids of text, or whatever the model's main input is, or a mapping of its arguments;
            None: the teacher makes its own.
        calibration_tokens: how many of them are read; 0: no calibration, and each unit is fitted on made-up inputs.
        copy: own copies of the parameters that teacher and student have in common, instead of sharing their memory.
        seed: of the teacher's own tokens.
        progress: show a bar.

    Returns:
        the student, in the teacher's dtype, on its device, in eval mode; and a report.

    Raises:
        InputError: the model is unsupported, converted already, quantised or not finite; it has FFNs that its family's entry does
            not describe, and all layers are asked for; a layer does not exist; or a combination of settings is refused.
    """
    if calibration_tokens == 0 and calibration_ids is not None:
        raise InputError(
            "found calibration_tokens 0 with calibration text, expected one of them: leave one out"
        )
    chosen, settings = choose_ffns(teacher, config, layers)
    for name, parameter in teacher.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"found {name} offloaded, expected it in memory: load the teacher without device_map to convert it"
            )
    for name, parameter in teacher.named_parameters():
        require_finite(name, parameter)

    was_training = teacher.training
    teacher.eval()
    made: dict[str, KernelFFN] = {}
    changed: list[tuple] = []
    try:
        ids = calibration_ids
        if ids is None and calibration_tokens:
            ids = write_own_text(teacher, calibration_tokens, seed)
        ids, report = choose_calibration_rows(
            teacher, ids, calibration_tokens, "own tokens" if calibration_ids is None else "text"
        )
        for _, block in groupby(
            track_progress(chosen, "converting", progress), lambda path: chosen[path].number
        ):
            here, undo = convert_block(
                teacher, [chosen[path] for path in block], settings, ids, report
            )
            changed += undo
            made.update(here)
    finally:
        for owner, name, before in reversed(changed):
            setattr(owner, name, before)
        teacher.train(was_training)
    student = make_student_from_entry(
        teacher, make_config_entry(teacher, {path: ffn.config for path, ffn in made.items()}), copy
    )
    for path, ffn in made.items():
        student.base_model.get_submodule(path).load_state_dict(ffn.state_dict(), assign=True)
    return student.requires_grad_(True), report


def choose_ffns(teacher, config, layers) -> tuple[dict[str, StockFFN], dict[str, KernelFFNConfig]]:
    """The FFNs to convert, and the settings of each, by path in layer order; InputError as :func:`convert`."""
    ffns = find_stock_ffns(teacher, get_architecture_of_model(teacher))
    per_layer = _settings_by_layer(config, layers, ffns)
    if layers is None and not isinstance(config, Mapping):
        refuse_undescribed_ffns(teacher, ffns)
    chosen = {path: ffn for path, ffn in ffns.items() if ffn.number in per_layer}
    for ffn in chosen.values():
        refuse_quantised_weights(ffn)
    return chosen, {
        path: resolve_defaults(per_layer[ffn.number], ffn.shape.gated)
        for path, ffn in chosen.items()
    }


def choose_calibration_rows(
    teacher, ids: Inputs | None, tokens: int, source: str
) -> tuple[Inputs | None, ConversionReport]:
    """The first ``tokens`` of ``ids``, and a report that says so."""
    if ids is None:
        return None, ConversionReport(teacher.config.model_type, "none", 0)
    ids = select_rows(ids, slice(max(1, tokens // tokens_per_row(ids))))
    return ids, ConversionReport(
        teacher.config.model_type, source, count_rows(ids) * tokens_per_row(ids)
    )


def require_finite(name: str, tensor: Tensor) -> None:
    """InputError if ``tensor`` has NaN or infinite values."""
    if not is_finite(tensor):
        raise InputError(
            f"found NaN or infinite values in {name}, expected finite weights: repair the teacher"
        )


def convert_block(
    model, ffns: list[StockFFN], settings, ids, report
) -> tuple[dict[str, KernelFFN], list[tuple]]:
    """The readouts of one block's ``ffns`` by path, in the model's dtype and put in their place, where later blocks are calibrated on
    what they write; their figures go into ``report``. And what :func:`install_ffn` changed."""
    made: dict[str, KernelFFN] = {}
    changed: list[tuple] = []
    for stock in ffns:
        ffn, report.layers[stock.path] = _convert_ffn(model, stock, settings[stock.path], ids)
        made[stock.path] = ffn.to(next(model.parameters()).dtype)
    for path, ffn in made.items():
        changed += install_ffn(model.base_model, path, ffn)
    return made, changed


def _settings_by_layer(config, layers, ffns) -> dict[int, KernelFFNConfig]:
    count = len({ffn.number for ffn in ffns.values()})
    if isinstance(config, Mapping):
        if layers is not None:
            raise InputError(
                "found both layers and one config per layer, expected one of them: leave layers out"
            )
        chosen = parse_layers(",".join(map(str, config)), count)
        return {i: config[i] for i in chosen}
    config = config or KernelFFNConfig()
    if layers is None:
        chosen = list(range(count))
    else:
        chosen = choose_layers(
            layers if isinstance(layers, str) else ",".join(map(str, layers)), ffns
        )
    return dict.fromkeys(chosen, config)


def make_layer_config(
    model, stock: StockFFN, settings, size: int, prototypes: int, reference: dict
) -> LayerConfig:
    """What config.json says of the readout that replaces ``stock``."""
    return LayerConfig(
        settings,
        size,
        prototypes,
        reference,
        dropout=float(get_attribute_at(model.config, stock.shape.dropout))
        if stock.shape.dropout
        else 0.0,
        hidden_dropout=float(get_attribute_at(model.config, stock.shape.hidden_dropout))
        if stock.shape.hidden_dropout
        else 0.0,
        number=stock.number,
        absorbed=stock.absorbed,
        experts=len(get_attribute_at(stock.host, stock.shape.down))
        if stock.expert is not None
        else 0,
    )


def _convert_ffn(model, stock: StockFFN, settings, ids) -> tuple[KernelFFN, dict]:
    """One kernel readout, in float32, for the FFN ``stock``, and its figures; calibrated unless ``ids`` is None."""
    weights = read_stock_weights(model, stock)
    sample = (
        make_blind_sample(stock.norm(model.base_model), weights.up)
        if ids is None
        else read_fit_sample(model, stock.path, ids)
    )
    in32: Any = {k: v.float() for k, v in weights._asdict().items() if isinstance(v, Tensor)}
    start = initialise_prototypes(weights._replace(**in32), settings, sample)
    reference = dict(start.parameters)
    reference["scale"] = start.scale if settings.intensity == "mass" else 1.0
    if not settings.coefficients_are_kernel:
        reference["temperature"] = settings.temperature or 1.0
    if settings.simplex == "threshold":
        reference["threshold"] = 1.0  # found below
    layer = make_layer_config(
        model, stock, settings, start.rows.shape[1], len(start.rows), reference
    )
    with torch.device(
        "meta"
    ):  # drawing numbers for weights that are at hand takes longer than all the rest
        ffn = KernelFFN(layer).eval().requires_grad_(False)
    ffn.to_empty(device=sample.device)
    ffn.units.copy_(start.units)
    for ratio in ffn.log_ratio.values():
        ratio.zero_()
    ffn.input_prototypes.weight.data = start.rows.contiguous()
    if ffn.kernel.uses_bias:
        ffn.input_prototypes.bias.copy_(start.bias)
    ffn.output_prototypes.weight.data = start.dictionary.T.contiguous()
    ffn.output_prototypes.bias.zero_()
    if weights.down_bias is not None:
        ffn.output_prototypes.bias.copy_(weights.down_bias)
    if settings.values == "gated":
        unit = start.units.abs().long() - 1
        ffn.value_proj.weight.data = in32["up"].index_select(0, unit)
        ffn.value_proj.bias.zero_() if weights.up_bias is None else ffn.value_proj.bias.copy_(
            weights.up_bias[unit]
        )
    if settings.intensity == "gate":
        ffn.gate.weight.zero_()
        ffn.gate.bias.fill_(initial_gate_bias())
    if settings.simplex == "threshold":
        ffn.threshold_log_ratio.zero_()
        ffn.fit_threshold(sample)
        ffn.reference["threshold"] = math.exp(ffn.log_threshold().item())
        ffn.threshold_log_ratio.zero_()
    figures: dict[str, float] = {}
    if ids is not None:
        fitted, held = (
            read_ffn_inputs(model, stock.path, rows) for rows in split_fitted_and_held(ids)
        )
        figures = calibrate_ffn(ffn, stock, sample, fitted, held, settings.temperature)
    ffn.config = replace(layer, reference=dict(ffn.reference))
    parameters = sum(p.numel() for p in ffn.parameters())
    return ffn, {
        "prototypes": layer.prototypes,
        "parameters": parameters,
        "reference": dict(ffn.reference),
        **figures,
    }


def track_progress(items, label, show):
    if not show:
        return items
    from rich.progress import track

    return track(list(items), description=label)
