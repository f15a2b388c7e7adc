"""The surgery alone: converted FFNs in one small file, which turns the original checkpoint into the student."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..checkpoint_code.carried_code import get_custom_kernel_file
from ..checkpoint_code.errors import InputError
from ..checkpoint_code.integrity import read_header
from ..families.registry import ARCHITECTURES
from ..families.student import make_student_from_entry, parameter_prefixes_of_converted_ffns
from .files import replace_file


def export_surgery(student: Any, file: str | Path) -> None:
    """Write the converted FFNs of ``student`` to a safetensors ``file``, with what they belong to.

    Raises:
        InputError: a kernel is a user's own, whose code has no place in the file.
    """
    if get_custom_kernel_file(student.config) is not None:
        raise InputError(
            "found a kernel of its author's own, whose code an export cannot carry: share the whole checkpoint"
        )
    tensors = {
        f"{path}.{name}": tensor.detach().cpu().contiguous()
        for path, ffn in student.kernel_ffns().items()
        for name, tensor in ffn.state_dict().items()
    }
    entry = student.config.kernel_ffn
    about = {"kernel_ffn": json.dumps(entry), "fingerprint": fingerprint_model(student, entry)}
    with replace_file(file) as beside:
        save_file(tensors, beside, metadata=about)


def apply_surgery(file: str | Path, teacher: Any) -> Any:
    """The student that ``file`` makes of ``teacher``, sharing the memory of everything but the FFNs.

    Raises:
        InputError: ``file`` is no export, or damaged, or was made with another base model.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(
            f"found no file {file}, expected one made by hf-kernel-ffn export: check the path"
        )
    shapes = read_header(file)
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
        entry, expected = json.loads(about["kernel_ffn"]), about["fingerprint"]
    except (KeyError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(
            f"found no kernel_ffn export in {file} ({error}), expected one made by hf-kernel-ffn export"
        ) from error
    if not isinstance(entry, dict) or str(entry.get("family")) not in ARCHITECTURES:
        raise InputError(
            f"found no entry of a known family in {file}, expected one made by hf-kernel-ffn export: it is damaged"
        )
    if entry["family"] != teacher.config.model_type:
        raise InputError(
            f"found a {teacher.config.model_type!r}, expected the {entry['family']!r} that {file} was exported from"
        )
    layers = entry.get("layers")
    for path, layer in layers.items() if isinstance(layers, dict) else ():
        found = shapes.get(f"{path}.input_prototypes.weight", (None, None))[1]
        if not isinstance(layer, dict) or found != (
            layer.get("prototypes"),
            layer.get("hidden_size"),
        ):
            raise InputError(
                f"found input_prototypes.weight of {found} at {path!r} in {file}, expected another shape: it is damaged"
            )
    if fingerprint_model(teacher, entry) != expected:
        raise InputError(
            f"found another base model than {file} was exported from, expected that one: give the original teacher"
        )
    student = make_student_from_entry(teacher, entry)
    with safe_open(file, "pt") as opened:
        for path, ffn in student.kernel_ffns().items():
            for name, tensor in ffn.state_dict().items():
                if shapes.get(f"{path}.{name}", (None, None))[1] != tuple(tensor.shape):
                    raise InputError(
                        f"found no {path}.{name} of shape {tuple(tensor.shape)} in {file}: it is damaged"
                    )
                tensor.copy_(opened.get_tensor(f"{path}.{name}"))
    return student


@torch.no_grad()
def fingerprint_model(model: Any, entry: dict) -> str:
    """SHA-256 of every parameter of ``model`` outside the FFNs that ``entry`` converts, by name, shape and value in float32."""
    found = hashlib.sha256()
    skipped = parameter_prefixes_of_converted_ffns(model, entry)
    for name, parameter in sorted(model.named_parameters()):
        if not name.startswith(skipped):
            found.update(f"{name} {tuple(parameter.shape)}".encode())
            found.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()
