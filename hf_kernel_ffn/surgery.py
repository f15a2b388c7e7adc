"""Convert a pretrained model, restore it, save and load it: the surgery itself."""

from __future__ import annotations

import copy as copying
import importlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import __version__
from .architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    ffn_paths,
    ffn_weights,
    parse_layers,
)
from .calibration import blind_sample, calibrate, ffn_inputs, fit_sample, fitted_and_held, own_text
from .configuration import FORMAT, KernelFFNConfig, LayerConfig, with_defaults
from .errors import InputError
from .initialization import gate_bias, prototypes
from .loading import load_tokenizer, stored_dtype
from .readout import KernelFFN

CALIBRATION_TOKENS = 16_384
"""Tokens that a conversion reads, of the user's text or of the model's own making."""


@dataclass
class ConversionReport:
    """What a conversion did."""

    family: str
    """The teacher's model_type."""
    calibration: str
    """``text`` or ``own tokens``."""
    calibration_tokens: int
    layers: dict[str, dict] = field(default_factory=dict)
    """By FFN path: prototypes, parameters, and the figures of :func:`hf_kernel_ffn.calibration.calibrate`."""

    def to_dict(self) -> dict:
        return dict(vars(self))


@torch.no_grad()
def convert(
    teacher: PreTrainedModel,
    config: KernelFFNConfig | Mapping[int, KernelFFNConfig] | None = None,
    layers: str | list[int] | None = None,
    *,
    calibration_ids: Tensor | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    copy: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> tuple[PreTrainedModel, ConversionReport]:
    """A student: ``teacher`` with kernel-readout FFNs. The teacher stays as it is.

    Layers are converted in order, each calibrated to do at what the student feeds it what the teacher's FFN does there. Where
    torch.distributed is initialised, every process calls this with the same arguments: each reads its share of the tokens, and
    all get the same student.

    Args:
        config: settings for every layer, or one per layer number (then those layers are converted).
        layers: which layers, as numbers or ``"0-5,7"``; None for all.
        calibration_ids: (rows, length) token ids of text; None: the teacher makes its own.
        calibration_tokens: how many of them are read; 0 for no calibration: only the norm's weights are looked at.
        copy: own copies of the parameters that teacher and student have in common, instead of sharing their memory.
        seed: of the teacher's own tokens.
        progress: show a bar.

    Returns:
        the student, in the teacher's dtype, on its device, in eval mode; and a report.

    Raises:
        InputError: the model is unsupported, converted already, quantised or not finite; a layer does not exist; or a
            combination of settings is refused.
    """
    architecture = architecture_of(teacher)
    paths = ffn_paths(teacher, architecture)
    if calibration_tokens == 0 and calibration_ids is not None:
        raise InputError("found calibration_tokens 0 with calibration text, expected one of them: leave one out")
    per_layer = layer_settings(config, layers, len(paths))
    base = teacher.base_model
    stock = {paths[i]: base.get_submodule(paths[i]) for i in per_layer}
    weights = {i: ffn_weights(stock[paths[i]], architecture, teacher.config, paths[i]) for i in per_layer}
    resolved = {i: with_defaults(settings, weights[i].gate is not None) for i, settings in per_layer.items()}
    for name, parameter in teacher.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"found NaN or infinite values in {name}, expected finite weights: repair the teacher")

    was_training = teacher.training
    teacher.eval()
    ffns: dict[str, KernelFFN] = {}
    try:
        ids = calibration_ids
        if ids is None and calibration_tokens:
            ids = own_text(teacher, calibration_tokens, seed)
        ids = None if ids is None else ids[: max(1, calibration_tokens // ids.shape[1])]
        report = conversion_report(architecture, ids, calibration_ids)
        for i in with_progress(resolved, "converting", progress):
            ffn, figures = convert_ffn(teacher, architecture, paths[i], weights[i], resolved[i], ids)
            ffns[paths[i]] = ffn.to(next(teacher.parameters()).dtype)
            report.layers[paths[i]] = figures
            base.set_submodule(paths[i], ffns[paths[i]])  # later layers are calibrated on what the student feeds them
    finally:
        for path in ffns:
            base.set_submodule(path, stock[path])
        teacher.train(was_training)
    return _assemble(teacher, architecture, ffns, copy), report


def conversion_report(architecture, ids, given) -> ConversionReport:
    kind = "none" if ids is None else "own tokens" if given is None else "text"
    return ConversionReport(architecture.model_type, kind, 0 if ids is None else ids.numel())


def layer_settings(config, layers, count) -> dict[int, KernelFFNConfig]:
    if isinstance(config, Mapping):
        if layers is not None:
            raise InputError("found both layers and one config per layer, expected one of them: leave layers out")
        chosen = parse_layers(",".join(map(str, config)), count)
        return {i: config[i] for i in chosen}
    config = config or KernelFFNConfig()
    if layers is None:
        chosen = list(range(count))
    else:
        chosen = parse_layers(layers if isinstance(layers, str) else ",".join(map(str, layers)), count)
    return dict.fromkeys(chosen, config)


def _dropout(architecture: Architecture, teacher: PreTrainedModel) -> float:
    return float(getattr(teacher.config, architecture.dropout)) if architecture.dropout else 0.0


def convert_ffn(model, architecture, path, weights, settings, ids) -> tuple[KernelFFN, dict]:
    """One kernel readout, in float32, for the stock FFN at ``path``, and its figures; calibrated unless ``ids`` is None."""
    dropout = _dropout(architecture, model)
    norm = model.base_model.get_submodule(path.removesuffix(architecture.ffn) + architecture.ffn_norm)
    sample = blind_sample(norm) if ids is None else fit_sample(model, path, ids)
    weights32 = weights._replace(**{k: v.float() for k, v in weights._asdict().items() if isinstance(v, Tensor)})
    start = prototypes(weights32, settings, sample)
    reference = dict(start.parameters)
    reference["scale"] = start.scale if settings.intensity == "mass" else 1.0
    if not settings.coefficients_are_kernel:
        reference["temperature"] = settings.temperature or 1.0
    if settings.simplex == "threshold":
        reference["threshold"] = 1.0  # found below
    layer = LayerConfig(settings, start.rows.shape[1], len(start.rows), reference, dropout)
    ffn = KernelFFN(layer).to(sample.device).eval().requires_grad_(False)
    ffn.input_prototypes.weight.copy_(start.rows)
    if ffn.kernel.uses_bias:
        ffn.input_prototypes.bias.copy_(start.bias)
    ffn.output_prototypes.weight.copy_(start.dictionary.T)
    ffn.output_prototypes.bias.zero_()
    if weights.down_bias is not None:
        ffn.output_prototypes.bias.copy_(weights.down_bias)
    ffn.units.copy_(start.units)
    if settings.values == "gated":
        unit = start.units.abs().long() - 1
        ffn.value_proj.weight.copy_(weights.up[unit])
        ffn.value_proj.bias.zero_() if weights.up_bias is None else ffn.value_proj.bias.copy_(weights.up_bias[unit])
    if settings.intensity == "gate":
        ffn.gate.weight.zero_()
        ffn.gate.bias.fill_(gate_bias())
    if settings.simplex == "threshold":
        ffn.fit_threshold(sample)
        ffn.reference["threshold"] = math.exp(ffn.log_threshold().item())
        ffn.threshold_log_ratio.zero_()
    figures = {}
    if ids is not None:
        fitted, held = (ffn_inputs(model, path, rows) for rows in fitted_and_held(ids))
        figures = calibrate(ffn, model.base_model.get_submodule(path), sample, fitted, held, settings.temperature)
    ffn.config = LayerConfig(settings, layer.hidden_size, layer.prototypes, dict(ffn.reference), dropout)
    parameters = sum(p.numel() for p in ffn.parameters())
    return ffn, {"prototypes": layer.prototypes, "parameters": parameters, "reference": dict(ffn.reference), **figures}


def _assemble(teacher, architecture, ffns: dict[str, KernelFFN], copy: bool) -> PreTrainedModel:
    """A student around the teacher's other parameters and the new FFNs."""
    student = student_from_entry(teacher, config_entry(teacher, architecture, ffns), copy)
    for path, ffn in ffns.items():
        student.base_model.get_submodule(path).load_state_dict(ffn.state_dict(), assign=True)
    return student.requires_grad_(True)


def config_entry(teacher, architecture, ffns: dict[str, KernelFFN]) -> dict:
    """What config.json says of a student with these FFNs."""
    return {
        "format": FORMAT,
        "package_version": __version__,
        "family": architecture.model_type,
        "teacher_class": type(teacher).__name__,
        "activation": {architecture.activation: getattr(teacher.config, architecture.activation)},
        "layers": {path: ffn.config.to_dict() for path, ffn in ffns.items()},
    }


def student_from_entry(teacher: PreTrainedModel, entry: dict, copy: bool = False) -> Any:
    """A model of the family's own class with the FFNs that ``entry`` (of config.json) describes, zero until they are loaded,
    around the teacher's other parameters."""
    student = meta_student(teacher, entry)
    weight = next(teacher.parameters())
    for path in entry["layers"]:
        ffn = student.base_model.get_submodule(path).to(weight.dtype).to_empty(device=weight.device)
        for tensor in ffn.state_dict().values():
            tensor.zero_()
    _share(teacher, student, _inside(student, entry), copy)
    student.tie_weights()
    if teacher.can_generate():
        student.generation_config = copying.deepcopy(teacher.generation_config)
    return student.eval()


def meta_student(teacher: PreTrainedModel, entry: dict) -> Any:
    """The same without any weights, on the meta device."""
    student_class = _student_class(teacher, ARCHITECTURES[entry["family"]])
    settings = {
        k: v for k, v in teacher.config.to_dict().items() if k not in ("model_type", "auto_map", "transformers_version")
    }
    config = student_class.config_class(**settings, kernel_ffn=entry)
    config._attn_implementation = teacher.config._attn_implementation
    config.name_or_path = teacher.config.name_or_path
    with torch.device("meta"):
        return student_class(config)


def share_equal(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Let ``student`` use the teacher's memory for every parameter outside its FFNs that is equal to the teacher's."""
    theirs = dict(teacher.named_parameters())
    inside = _inside(student, student.config.kernel_ffn)
    for name, parameter in student.named_parameters():
        other = theirs.get(name)
        if not name.startswith(inside) and other is not None and torch.equal(parameter, other):
            parameter.data = other.data


def _inside(student: PreTrainedModel, entry: dict) -> tuple[str, ...]:
    """What the names of all parameters of converted FFNs start with."""
    return tuple(f"{name_prefix(student)}{path}." for path in entry["layers"])


def name_prefix(model: PreTrainedModel) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _student_class(teacher, architecture) -> Any:
    name = f"Kernel{type(teacher).__name__}"
    module = importlib.import_module(architecture.modeling)
    if not hasattr(module, name):
        heads = ", ".join(
            n.removeprefix("Kernel") for n in vars(module) if n.startswith("Kernel") and "Mixin" not in n and "Config" not in n
        )
        raise InputError(f"found a {type(teacher).__name__}, expected one of {heads}: load the teacher by one of these classes")
    return getattr(module, name)


def _share(source: nn.Module, target: nn.Module, skip: tuple[str, ...], copy: bool) -> None:
    """Give ``target`` the parameters and buffers of ``source``, ties kept, without those whose name starts with one of ``skip``."""
    made: dict[int, Tensor] = {}
    for kind, named in (("_parameters", source.named_parameters), ("_buffers", source.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            if name.startswith(skip):
                continue
            if id(tensor) not in made:
                data = tensor.detach().clone() if copy else tensor.detach()
                made[id(tensor)] = nn.Parameter(data, requires_grad=tensor.requires_grad) if kind == "_parameters" else data
            parent, _, leaf = name.rpartition(".")
            getattr(target.get_submodule(parent), kind)[leaf] = made[id(tensor)]


def restore(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    """A stock model again: ``student`` with the FFNs of ``teacher``, sharing the memory of both.

    Raises:
        InputError: ``student`` is not converted, or the two are not of one shape.
    """
    entry = getattr(student.config, "kernel_ffn", None)
    if entry is None:
        raise InputError("found a student that is not converted, expected one with a kernel_ffn entry: nothing to restore")
    if teacher.config.model_type != entry["family"]:
        raise InputError(
            f"found a teacher of type {teacher.config.model_type!r}, expected {entry['family']!r}: give the student's own"
        )
    inside = _inside(student, entry)
    mine = {n: p.shape for n, p in student.named_parameters() if not n.startswith(inside)}
    other = {n: p.shape for n, p in teacher.named_parameters() if not n.startswith(inside)}
    if mine != other:
        raise InputError(
            "found a teacher whose parameters differ in name or shape from the student's: give the student's own teacher"
        )
    with torch.device("meta"):
        stock = type(teacher)(teacher.config)
    _share(teacher, stock, (), copy=False)
    _share(student, stock, inside, copy=False)
    stock.tie_weights()
    if teacher.can_generate():
        stock.generation_config = copying.deepcopy(student.generation_config)
    return stock.eval()


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """InputError unless ``student`` is converted and ``teacher`` is a stock model of its family, vocabulary and shape."""
    entry = getattr(student.config, "kernel_ffn", None)
    if entry is None:
        raise InputError(
            "found a student that is not converted, expected one with a kernel_ffn entry: run hf-kernel-ffn convert"
        )
    if getattr(teacher.config, "kernel_ffn", None) is not None or teacher.config.model_type != entry["family"]:
        raise InputError(
            f"found a teacher of type {teacher.config.model_type!r}, expected a stock {entry['family']!r}: give the student's own"
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        mine, other = getattr(student.config, name), getattr(teacher.config, name)
        if mine != other:
            raise InputError(
                f"found {name} {mine} in the student and {other} in the teacher, expected equal: give the student's own teacher"
            )


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A folder to write to that becomes ``out`` when the block ends well, and vanishes when it does not.

    Raises:
        InputError: ``out`` is a file or holds something.
    """
    out = Path(out)
    require_empty(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        yield made
        if out.is_dir():
            out.rmdir()
        os.replace(made, out)


def require_empty(out: str | os.PathLike) -> None:
    """InputError if ``out`` exists and is not an empty folder, or cannot be made."""
    out = Path(out)
    require_place(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"found {out} not empty, expected a new or empty folder: choose another or remove it")


def save_converted(student: Any, source: str, out: Path, **reports: dict) -> None:
    """Save ``student`` in ``out``, in the dtype in which its teacher at ``source`` is stored, with that one's tokenizer and, as
    JSON, whatever reports are given by name."""
    student.to(dtype=stored_dtype(source)).save_pretrained(out)
    save_companions(source, out, **reports)


def save_companions(source: str, out: Path, **reports: dict) -> None:
    """Put the tokenizer at ``source`` and the reports into ``out``."""
    if Path(source).is_dir():
        for file in Path(source).iterdir():
            if file.is_file() and file.name in TOKENIZER_FILES:
                shutil.copyfile(file, out / file.name)
    else:
        load_tokenizer(source).save_pretrained(out)
    for name, report in reports.items():
        (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def require_place(path: Path) -> None:
    """InputError if nothing can be made at ``path``, because what lies above it is no folder or not writable."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"found {above} no writable folder, expected one to make {path} in: choose another place")


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "added_tokens.json", "chat_template.jinja", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def with_progress(items, label, show):
    if not show:
        return items
    from rich.progress import track

    return track(list(items), description=label)
