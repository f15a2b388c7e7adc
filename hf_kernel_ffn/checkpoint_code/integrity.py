"""Whether a checkpoint's files are what they should be, before anything of their size is made.

Also the checksums of them.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .errors import InputError
from .untrusted_files import TensorFacts, read_headers, read_json, weight_files

CHECKSUMS = "checksums.json"
"""SHA-256 of the files that make up the model, by name."""
STUDENT_DTYPES = ("F64", "F32", "BF16", "F16", "I32")
"""dtypes in an unquantised checkpoint; the last is that of ``units`` alone."""


def check_folder(
    folder: str | os.PathLike[str] | None, subfolder: str = ""
) -> dict[str, TensorFacts] | None:
    """Facts by tensor name of the weights in ``folder``.

    Returns:
        None where the folder is no local one, or the model is quantised.

    Raises:
        InputError: the weights are damaged, or are not those of the FFNs in config.json, of which
            a wrong size would be allocated.
    """
    folder = Path(folder or "", subfolder or "")
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    if config.get("quantization_config") is not None:
        weight_files(folder)
        return None  # other tensors than the config's, in other types

    tensors = read_headers(folder)
    for name, (dtype, _) in tensors.items():
        is_units = name.endswith(".units")
        if is_units != (dtype == "I32") or dtype not in STUDENT_DTYPES:
            raise InputError(
                f"found {name!r} of type {dtype} in {folder}, expected another type: "
                "convert or copy it again"
            )
    entry = config.get("kernel_ffn")
    layers = entry.get("layers") if isinstance(entry, dict) else None
    if isinstance(layers, dict):
        for path, layer in layers.items():
            _check_layer(path, layer, tensors, folder)
    blocks = config.get("num_hidden_layers", config.get("n_layer"))
    if isinstance(blocks, int) and blocks > len(tensors):
        raise InputError(
            f"found {blocks} layers in {folder}/config.json and {len(tensors)} tensors: "
            "config.json is damaged"
        )
    return tensors


def _check_layer(path: str, layer: object, tensors: dict[str, TensorFacts], folder: Path) -> None:
    """InputError if the input prototypes at ``path`` have another shape than config.json says."""
    if not isinstance(layer, dict):
        return  # the config class says what is wrong
    expected = (layer.get("prototypes"), layer.get("hidden_size"))
    if not all(type(side) is int and side > 0 for side in expected):
        return
    shapes = {
        shape
        for name, (_, shape) in tensors.items()
        if f".{name}".endswith(f".{path}.input_prototypes.weight")
    }
    if expected not in shapes:
        raise InputError(
            f"found {path}.input_prototypes.weight of {sorted(shapes) or 'no shape'} in {folder}, "
            f"expected {expected} for {path!r} by its config.json: "
            "the checkpoint is incomplete; copy or convert it again"
        )


def check_model(
    empty: PreTrainedModel, tensors: dict[str, TensorFacts], folder: str | os.PathLike[str]
) -> None:
    """Compare the sizes of ``empty``, a model on the meta device, with those of a checkpoint.

    Whatever is missing or misshapen would be allocated before anything is said about it.

    Args:
        tensors: facts by tensor name of the checkpoint in ``folder``.

    Raises:
        InputError: the model wants sizes that the tensors do not have.
    """
    base_prefix = empty.base_model_prefix
    is_bare = empty.base_model is empty
    prefix = "" if is_bare else f"{base_prefix}."
    stored_elements = sum(math.prod(shape) for _, shape in tensors.values())
    for name, parameter in empty.named_parameters():
        short = name.removeprefix(prefix)
        stored = tensors.get(name) or tensors.get(short) or tensors.get(f"{base_prefix}.{name}")
        shape = tuple(parameter.shape)
        if stored is None and parameter.numel() > stored_elements:
            raise InputError(
                f"found no {name} in {folder}, expected {shape} by its config.json: one is damaged"
            )
        in_body = name != short or is_bare
        if stored is not None and stored[1] != shape and in_body:
            raise InputError(
                f"found {name} of shape {stored[1]} in {folder}, expected {shape} "
                "by its config.json: one of them is damaged; copy or convert it again"
            )


@contextmanager
def set_aside_weights(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Rename what says where the weights in ``folder`` are, and remove it if the context ends well.

    One file of weights, and the index of several, do not overwrite each other: of two saves the
    older one would be read.
    """
    aside: dict[Path, Path] = {}
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        path = Path(folder, name)
        if path.is_file():
            aside[path] = path.with_name(f".{name}.before")
            os.replace(path, aside[path])
    try:
        yield
    except BaseException:
        for path, before in aside.items():
            os.replace(before, path)
        raise
    for before in aside.values():
        before.unlink()


def share_mode(folder: str | os.PathLike[str]) -> None:
    """Give the weight files in ``folder`` the mode of config.json, as any new file has it.

    The library that writes them lets nobody but their owner read them.
    """
    mode = stat.S_IMODE(Path(folder, "config.json").stat().st_mode)
    for file in Path(folder).glob("*.safetensors"):
        file.chmod(mode)


def compute_checksums(folder: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 by name of the files in ``folder`` that make up the model."""
    checksums = {}
    for file in sorted(Path(folder).iterdir()):
        is_json = file.name in (SAFE_WEIGHTS_INDEX_NAME, "config.json")
        if is_json or file.name.endswith(".safetensors"):
            with file.open("rb") as stream:
                checksums[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return checksums


def record_checksums(folder: str | os.PathLike[str]) -> None:
    """Write the checksums of the model in ``folder`` beside it."""
    text = json.dumps({"sha256": compute_checksums(folder)}, indent=1) + "\n"
    Path(folder, CHECKSUMS).write_text(text, encoding="utf-8")
