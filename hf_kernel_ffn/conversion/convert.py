"""Convert a pretrained model: every FFN becomes a kernel readout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.modeling import install_ffn
from ..checkpoint_code.settings import DEFAULT_SETTINGS, KernelFFNConfig, resolve_defaults
from ..checkpoint_code.tied import AnyKernelFFN
from ..families.detection import refuse_undescribed_ffns
from ..families.lookup import StockFFN, choose_layers, find_stock_ffns, parse_layers
from ..families.registry import get_architecture_of_model
from ..families.student import make_config_entry, make_student_from_entry
from ..families.weights import is_finite, refuse_quantised_weights
from ..progress import track_progress
from ..text.inputs import Inputs
from .allocation import allocate_top_k, require_allocatable
from .block_source import BlockSource
from .calibration_set import (
    CALIBRATION_TOKENS,
    PIECES_ROW_LENGTH,
    PIECES_TOKENS,
    CalibrationSet,
    choose_calibration,
    fits_only_pieces,
)
from .layer import convert_ffn
from .replay_check import open_block_source
from .sampling import OWN_TEXT_LENGTH, write_own_text
from .teacher_state import keep_as_it_was
from .tied import require_same_pieces

if TYPE_CHECKING:
    from ..families.student import ConvertedModel


@dataclass
class ConversionReport:
    """What a conversion did."""

    family: str
    """The teacher's model_type."""
    calibration: str
    """``text``, ``own tokens`` or ``none``."""
    calibration_tokens: int
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By FFN path: prototypes, parameters, and the figures of
    :func:`hf_kernel_ffn.conversion.ridge.calibrate_ffn`."""

    def to_dict(self) -> dict[str, Any]:
        """Return what conversion.json says."""
        return dict(vars(self))


@torch.no_grad()
def convert(
    teacher: PreTrainedModel,
    config: KernelFFNConfig | Mapping[int, KernelFFNConfig] | None = None,
    layers: str | list[int] | None = None,
    *,
    calibration_ids: Inputs | None = None,
    calibration_tokens: int | None = None,
    copy: bool = False,
    allocate: bool = False,
    start: ConvertedModel | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[ConvertedModel, ConversionReport]:
    """Make a student: ``teacher`` with kernel-readout FFNs. The teacher stays as it is.

    Layers are converted in order. Each is calibrated to do at what the student feeds it what the
    teacher's FFN does there. Where torch.distributed is initialised, every process calls this with
    the same arguments: each reads its share of the tokens, and all get the same student.

    Args:
        config: settings for every layer, or one per layer number (then those layers are converted);
            None: the most faithful, ``KernelFFNConfig(rows="tied")``.
        layers: which layers, as numbers or ``"0-5,7"``, or by a pattern of FFN paths, such as
            ``"text_model.*"``; None for all. Several stacks are counted on; the experts of a layer
            have its number.
        calibration_ids: (rows, length) token ids of text, or whatever the model's main input is, or
            a mapping of its arguments; None: the teacher makes its own.
        calibration_tokens: how many of them are read; 0: no calibration, and each unit is fitted on
            made-up inputs. None: 16,384; where all rows are tied, 4,096 of the teacher's own.
        copy: own copies of the parameters that teacher and student have in common, instead of
            sharing their memory.
        allocate: share the numbers of units that sparse maps keep out over the layers, by what
            leaving a unit out costs (:func:`hf_kernel_ffn.conversion.allocation.allocate_top_k`).
        start: a converted model with tied rows, whose pieces are taken instead of fitting them: for
            other settings of what is read off them.
        seed: of the teacher's own tokens.
        progress: show a bar.

    Returns:
        the student, in the teacher's dtype, on its device, in eval mode; and a report.

    Raises:
        InputError: the model is unsupported, converted already, quantised or not finite; it has
            FFNs that its family's entry does not describe, and all layers are asked for; a layer
            does not exist; or a combination of settings is refused.
    """
    if calibration_tokens == 0 and calibration_ids is not None:
        raise InputError(
            "found calibration_tokens 0 with calibration text, expected one of them: leave one out"
        )
    chosen, settings = choose_ffns(teacher, config, layers)
    if allocate:
        require_allocatable(teacher, chosen, settings)
    if allocate and calibration_tokens == 0:
        raise InputError(
            "found allocate with 0 calibration tokens, expected some: costs are measured on them"
        )
    if start is not None:
        for path in chosen:
            require_same_pieces(_find_start(start, path), settings[path])
    only_pieces = fits_only_pieces(settings.values())
    own_pieces = only_pieces and calibration_ids is None
    tokens = calibration_tokens
    if tokens is None:
        tokens = PIECES_TOKENS if own_pieces else CALIBRATION_TOKENS
    _require_whole_and_finite(teacher, progress)

    with keep_as_it_was(teacher):
        teacher.eval()
        ids = calibration_ids
        if ids is None and tokens:
            length = PIECES_ROW_LENGTH if own_pieces else OWN_TEXT_LENGTH
            ids = write_own_text(teacher, tokens, seed, length, progress=progress)
        calibration = None
        if ids is not None:
            calibration = choose_calibration(ids, tokens, only_pieces=only_pieces)
        if allocate:
            assert ids is not None
            settings = allocate_top_k(teacher, chosen, settings, ids, seed=seed, progress=progress)
        kind = "own tokens" if calibration_ids is None else "text"
        report = start_report(teacher, calibration, kind)
        ffns = _convert_blocks(
            teacher,
            chosen,
            settings,
            calibration=calibration,
            report=report,
            start=start,
            progress=progress,
        )
    return _make_student(teacher, ffns, copy), report


def _require_whole_and_finite(teacher: PreTrainedModel, progress: bool) -> None:
    """InputError if a parameter is offloaded, or has NaN or infinite values."""
    parameters = list(teacher.named_parameters())
    for name, parameter in parameters:
        if parameter.is_meta:
            raise InputError(
                f"found {name} offloaded, expected it in memory: load the teacher without "
                "device_map to convert it"
            )
    for name, parameter in track_progress(parameters, "checking", progress):
        require_finite(name, parameter)


def start_report(
    teacher: PreTrainedModel, calibration: CalibrationSet | None, kind: str
) -> ConversionReport:
    """Begin a report on the conversion of ``teacher``; ``kind``: what the calibration set is of."""
    family = teacher.config.model_type
    if calibration is None:
        return ConversionReport(family, "none", 0)
    return ConversionReport(family, kind, calibration.tokens)


def _convert_blocks(
    teacher: PreTrainedModel,
    chosen: Mapping[str, StockFFN],
    settings: Mapping[str, KernelFFNConfig],
    *,
    calibration: CalibrationSet | None,
    report: ConversionReport,
    start: ConvertedModel | None,
    progress: bool,
) -> dict[str, AnyKernelFFN]:
    """The readouts of all ``chosen`` FFNs by path, in their place in ``teacher``."""
    source = None if calibration is None else open_block_source(teacher, calibration)
    blocks = [list(ffns) for _, ffns in groupby(chosen.values(), lambda ffn: ffn.number)]
    converted: dict[str, AnyKernelFFN] = {}
    for ffns in track_progress(blocks, "converting", progress):
        number = ffns[0].number
        if source is not None and number > 0:
            source.close_blocks(number - 1)
        converted |= convert_block(teacher, ffns, settings, source, report, start)
    return converted


def _make_student(
    teacher: PreTrainedModel, ffns: Mapping[str, AnyKernelFFN], copy: bool
) -> ConvertedModel:
    """A model of the family's own class with ``ffns``, by path, and the rest of ``teacher``."""
    entry = make_config_entry(teacher, {path: ffn.config for path, ffn in ffns.items()})
    student = make_student_from_entry(teacher, entry, copy)
    for path, ffn in ffns.items():
        student.base_model.get_submodule(path).load_state_dict(ffn.state_dict(), assign=True)
    return student.requires_grad_(True)


def choose_ffns(
    teacher: PreTrainedModel,
    config: KernelFFNConfig | Mapping[int, KernelFFNConfig] | None,
    layers: str | list[int] | None,
) -> tuple[dict[str, StockFFN], dict[str, KernelFFNConfig]]:
    """Choose the FFNs to convert, and the settings of each, by path in layer order.

    Raises:
        InputError: as :func:`convert`.
    """
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


def require_finite(name: str, tensor: Tensor) -> None:
    """InputError if ``tensor`` has NaN or infinite values."""
    if not is_finite(tensor):
        raise InputError(
            f"found NaN or infinite values in {name}, expected finite weights: repair the teacher"
        )


def convert_block(
    model: PreTrainedModel,
    ffns: Sequence[StockFFN],
    settings: Mapping[str, KernelFFNConfig],
    source: BlockSource | None,
    report: ConversionReport,
    start: ConvertedModel | None = None,
) -> dict[str, AnyKernelFFN]:
    """Make the readouts of one block's ``ffns``, and put them in their place in ``model``.

    Later blocks are calibrated on what these write. Their figures go into ``report``.

    Args:
        settings: by FFN path.
        source: reads what comes to the FFNs; None: they are not calibrated.
        start: whose pieces are taken; None: they are fitted.

    Returns:
        the readouts by path, in the model's dtype.
    """
    if source is not None:
        source.open_block(ffns)
    dtype = next(model.parameters()).dtype
    converted: dict[str, AnyKernelFFN] = {}
    for stock in ffns:
        fitted = None if start is None else _find_start(start, stock.path)
        ffn, report.layers[stock.path] = convert_ffn(
            model, stock, settings[stock.path], source, fitted
        )
        converted[stock.path] = ffn.to(dtype)
    for path, ffn in converted.items():
        install_ffn(model.base_model, path, ffn)
    return converted


def _find_start(start: ConvertedModel, path: str) -> AnyKernelFFN:
    """The readout of ``start`` at ``path``; InputError if that is no converted FFN there."""
    ffn = start.kernel_ffns().get(path)
    if ffn is None:
        raise InputError(
            f"found no readout at {path} in the model to start from, expected one for every layer "
            "that is converted: choose layers by it, or leave start out"
        )
    return ffn


def _settings_by_layer(
    config: KernelFFNConfig | Mapping[int, KernelFFNConfig] | None,
    layers: str | list[int] | None,
    ffns: dict[str, StockFFN],
) -> dict[int, KernelFFNConfig]:
    """The settings of each layer that is to be converted, by its number."""
    count = len({ffn.number for ffn in ffns.values()})
    if isinstance(config, Mapping):
        if layers is not None:
            raise InputError(
                "found both layers and one config per layer, expected one of them: leave layers out"
            )
        numbers = parse_layers(",".join(map(str, config)), count)
        return {number: config[number] for number in numbers}

    if layers is None:
        numbers = list(range(count))
    elif isinstance(layers, str):
        numbers = choose_layers(layers, ffns)
    else:
        numbers = choose_layers(",".join(map(str, layers)), ffns)
    return dict.fromkeys(numbers, config or DEFAULT_SETTINGS)
