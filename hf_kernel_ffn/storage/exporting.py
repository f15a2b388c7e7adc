"""The surgery alone: converted FFNs in one small file, which turns a teacher into the student."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..checkpoint_code.carried_code import get_custom_kernel_file
from ..checkpoint_code.errors import CheckpointError, InputError
from ..checkpoint_code.untrusted_files import read_header
from ..families.registry import ARCHITECTURES
from ..families.student import (
    get_config_entry,
    make_student_from_entry,
    parameter_prefixes_of_converted_ffns,
)
from .files import replace_file, save_tensors

if TYPE_CHECKING:
    from ..families.student import ConvertedModel

Shape = tuple[int, ...]


def export_surgery(student: ConvertedModel, file: str | Path) -> None:
    """Write the converted FFNs of ``student`` to a safetensors ``file``, with what they belong to.

    Raises:
        InputError: a kernel is a user's own, whose code has no place in the file.
    """
    if get_custom_kernel_file(student.config) is not None:
        raise InputError(
            "found a kernel of its author's own, whose code an export cannot carry: "
            "share the whole checkpoint"
        )
    tensors = {
        f"{path}.{name}": tensor.detach().cpu().contiguous()
        for path, ffn in student.kernel_ffns().items()
        for name, tensor in ffn.state_dict().items()
    }
    entry = get_config_entry(student)
    metadata = {
        "kernel_ffn": json.dumps(entry),
        "fingerprint": fingerprint_model(student, entry),
    }
    with replace_file(file) as beside:
        save_tensors(tensors, beside, metadata=metadata)


def apply_surgery(file: str | Path, teacher: PreTrainedModel) -> ConvertedModel:
    """Return the student that ``file`` makes of ``teacher``.

    It shares the memory of everything but the FFNs.

    Raises:
        InputError: ``file`` is no export, or damaged, or was made with another base model.
    """
    file = Path(file)
    shapes, entry, fingerprint = require_export(file)
    if entry["family"] != teacher.config.model_type:
        raise InputError(
            f"found a {teacher.config.model_type!r}, "
            f"expected the {entry['family']!r} that {file} was exported from"
        )
    _check_prototypes(entry.get("layers"), shapes, file)
    if fingerprint_model(teacher, entry) != fingerprint:
        raise InputError(
            f"found another base model than {file} was exported from, expected that one: "
            "give the original teacher"
        )

    student = make_student_from_entry(teacher, entry)
    _fill_ffns(student, shapes, file)
    return student


def require_export(file: Path) -> tuple[dict[str, Shape], dict[str, Any], str]:
    """Read what the export ``file`` says of itself, without its tensors.

    Returns:
        the shapes of its tensors by name, its ``kernel_ffn`` entry, and the fingerprint of the base
        model.

    Raises:
        InputError: it is no export, or damaged.
    """
    if not file.is_file():
        raise InputError(
            f"found no file {file}, expected one made by hf-kernel-ffn export: check the path"
        )
    shapes = {name: shape for name, (_, shape) in read_header(file).items()}
    return shapes, *_read_metadata(file)


@torch.no_grad()
def fingerprint_model(model: PreTrainedModel, entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 of ``model`` outside the FFNs that ``entry`` converts.

    It is that of every parameter, by name, shape and value in float32.
    """
    digest = hashlib.sha256()
    converted = parameter_prefixes_of_converted_ffns(model, entry)
    for name, parameter in sorted(model.named_parameters()):
        if not name.startswith(converted):
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_metadata(file: Path) -> tuple[dict[str, Any], str]:
    """Return the ``kernel_ffn`` entry in an export and the fingerprint of its base model.

    Raises:
        InputError: it is no export, or its entry is none of a known family.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        entry = json.loads(metadata["kernel_ffn"])
        fingerprint = metadata["fingerprint"]
    except (KeyError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(
            f"found no kernel_ffn export in {file} ({error}), "
            "expected one made by hf-kernel-ffn export"
        ) from error
    if not isinstance(entry, dict) or str(entry.get("family")) not in ARCHITECTURES:
        raise CheckpointError(
            f"found no entry of a known family in {file}, "
            "expected one made by hf-kernel-ffn export: it is damaged"
        )
    return entry, fingerprint


def _check_prototypes(layers: object, shapes: Mapping[str, Shape], file: Path) -> None:
    """Check the sizes in an entry before anything of them is allocated.

    Raises:
        CheckpointError: an FFN's input prototypes are of another shape.
    """
    if not isinstance(layers, dict):
        return
    for path, layer in layers.items():
        shape = shapes.get(f"{path}.input_prototypes.weight")
        expected = None
        if isinstance(layer, dict):
            expected = (layer.get("prototypes"), layer.get("hidden_size"))
        if expected is None or shape != expected:
            raise CheckpointError(
                f"found input_prototypes.weight of {shape} at {path!r} in {file}, "
                "expected another shape: it is damaged"
            )


def _fill_ffns(student: ConvertedModel, shapes: Mapping[str, Shape], file: Path) -> None:
    """Read the tensors of every converted FFN of ``student`` from ``file``.

    Raises:
        CheckpointError: one is missing, or of another shape.
    """
    with safe_open(file, "pt") as opened:
        for path, ffn in student.kernel_ffns().items():
            for name, tensor in ffn.state_dict().items():
                if shapes.get(f"{path}.{name}") != tuple(tensor.shape):
                    raise CheckpointError(
                        f"found no {path}.{name} of shape {tuple(tensor.shape)} in {file}: "
                        "it is damaged"
                    )
                tensor.copy_(opened.get_tensor(f"{path}.{name}"))
