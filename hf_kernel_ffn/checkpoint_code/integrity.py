"""Whether a checkpoint's files are what they should be, before anything of their size is made; and checksums of them.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

import hashlib
import json
import math
import os
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .errors import InputError

CHECKSUMS = "checksums.json"
"""SHA-256 of the files that make up the model, by name."""
JSON_LIMIT = 64 * 2**20
"""Bytes of a JSON file that is still read."""
HEADER_LIMIT = 100 * 10**6
"""Bytes of a safetensors header that is still read, as the library has it."""
BYTES = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


def read_json(file) -> dict:
    """The mapping in a JSON ``file``; InputError if it is not one."""
    file = Path(file)
    try:
        if file.stat().st_size > JSON_LIMIT:
            raise InputError(
                f"found {file} of {file.stat().st_size:,} bytes, expected a small file: it is damaged"
            )
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"found {file} unreadable ({_line(error)}), expected JSON: copy the checkpoint again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"found a {type(content).__name__} in {file}, expected a mapping: the checkpoint is damaged"
        )
    return content


def weight_files(folder) -> list:
    """The safetensors files in ``folder`` that its index names, or the only one.

    Raises:
        InputError: one is missing, or the index names something else than files beside it.
    """
    folder = Path(folder)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        if not (folder / SAFE_WEIGHTS_NAME).is_file():
            raise InputError(
                f"found no {SAFE_WEIGHTS_NAME} in {folder}, expected the weights in safetensors: copy it again"
            )
        return [folder / SAFE_WEIGHTS_NAME]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(
            f"found no weight_map in {index}, expected file names by tensor: copy the checkpoint again"
        )
    for name in names.values():
        if (
            not isinstance(name, str)
            or name != os.path.basename(name)
            or not name.endswith(".safetensors")
        ):
            raise InputError(
                f"found {name!r} in {index}, expected the name of a safetensors file beside it: it is damaged"
            )
        if not (folder / name).is_file():
            raise InputError(
                f"found no {name} in {folder}, which its index names: copy the checkpoint again"
            )
    return [folder / name for name in sorted(set(names.values()))]


def read_header(file) -> dict:
    """(dtype name, shape) by tensor name of a safetensors ``file``, of which only the header is read.

    Raises:
        InputError: it is truncated, or its header does not describe its bytes.
    """
    file = Path(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = file.stat().st_size
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise _damaged(file, "its header does not fit into it")
        try:
            entries = json.loads(stream.read(length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _damaged(file, _line(error)) from error
    if not isinstance(entries, dict):
        raise _damaged(file, "its header is no mapping")
    entries.pop("__metadata__", None)
    found, end = {}, 0
    try:
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            count = 1
            if len(shape) > 8:
                raise ValueError(f"{name!r}: {len(shape)} dimensions")
            for side in shape:
                if type(side) is not int or not 0 <= side < 2**63:
                    raise ValueError(f"shape {shape}")
                count *= side
            if dtype not in BYTES or start != end or stop - start != count * BYTES[dtype]:
                raise ValueError(
                    f"{name!r}: dtype {dtype!r}, shape {shape}, bytes {start} to {stop}"
                )
            found[name], end = (dtype, tuple(shape)), stop
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(file, _line(error)) from error
    if end != size - 8 - length:
        raise _damaged(file, f"{size - 8 - length:,} bytes of data where {end:,} are described")
    return found


def read_headers(folder) -> dict:
    """(dtype name, shape) by tensor name of all weights in ``folder``.

    Raises:
        InputError: a file is damaged, or the index and the files name different tensors.
    """
    found: dict = {}
    index = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
    named = read_json(index)["weight_map"] if weight_files(folder) and index.is_file() else None
    for file in weight_files(folder):
        inside = read_header(file)
        if named is not None:
            expected = {name for name, where in named.items() if where == file.name}
            if expected != inside.keys():
                odd = sorted(expected ^ inside.keys())[0]
                raise _damaged(file, f"{odd!r} is in the index or in the file, not in both")
        found.update(inside)
    return found


def check_folder(folder, subfolder="") -> dict | None:
    """(dtype name, shape) by tensor name of the weights in ``folder``; None where it is not a local one, or is quantised.

    Raises:
        InputError: they are damaged, or are not those of the FFNs in config.json, of which a wrong size would be allocated.
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
        if (dtype == "I32") != name.endswith(".units") or dtype not in (
            "F64",
            "F32",
            "BF16",
            "F16",
            "I32",
        ):
            raise InputError(
                f"found {name!r} of type {dtype} in {folder}, expected another type: convert or copy it again"
            )
    entry = config.get("kernel_ffn")
    layers = entry.get("layers") if isinstance(entry, dict) else None
    for path, layer in layers.items() if isinstance(layers, dict) else ():
        wanted = (
            (layer.get("prototypes"), layer.get("hidden_size")) if isinstance(layer, dict) else ()
        )
        if not wanted or not all(type(side) is int and side > 0 for side in wanted):
            continue  # the config class says what is wrong
        shapes = {
            shape
            for name, (_, shape) in tensors.items()
            if f".{name}".endswith(f".{path}.input_prototypes.weight")
        }
        if wanted not in shapes:
            raise InputError(
                f"found {path}.input_prototypes.weight of {sorted(shapes) or 'no shape'} in {folder}, expected {wanted} for {path!r} by "
                "its config.json: the checkpoint is incomplete; copy or convert it again"
            )
    blocks = config.get("num_hidden_layers", config.get("n_layer"))
    if isinstance(blocks, int) and blocks > len(tensors):
        raise InputError(
            f"found {blocks} layers in {folder}/config.json and {len(tensors)} tensors: config.json is damaged"
        )
    return tensors


def check_model(empty, tensors, folder) -> None:
    """InputError if ``empty``, a model on the meta device, wants sizes that the ``tensors`` of ``folder`` do not have: whatever is
    missing or misshapen is allocated before anything is said about it."""
    prefix = "" if empty.base_model is empty else f"{empty.base_model_prefix}."
    room = sum(math.prod(shape) for _, shape in tensors.values())
    for name, parameter in empty.named_parameters():
        short = name.removeprefix(prefix)
        found = (
            tensors.get(name)
            or tensors.get(short)
            or tensors.get(f"{empty.base_model_prefix}.{name}")
        )
        if found is None and parameter.numel() > room:
            raise InputError(
                f"found no {name} in {folder}, expected {tuple(parameter.shape)} by its config.json: one is damaged"
            )
        if (
            found is not None
            and found[1] != tuple(parameter.shape)
            and (name != short or not prefix)
        ):
            raise InputError(
                f"found {name} of shape {found[1]} in {folder}, expected {tuple(parameter.shape)} by its config.json: one of them "
                "is damaged; copy or convert it again"
            )


def compute_checksums(folder) -> dict:
    """SHA-256 by name of the files in ``folder`` that make up the model."""
    found = {}
    for file in sorted(Path(folder).iterdir()):
        if file.name.endswith(".safetensors") or file.name in (
            SAFE_WEIGHTS_INDEX_NAME,
            "config.json",
        ):
            with file.open("rb") as stream:
                found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def record_checksums(folder) -> None:
    """Write the checksums of the model in ``folder`` beside it."""
    Path(folder, CHECKSUMS).write_text(
        json.dumps({"sha256": compute_checksums(folder)}, indent=1) + "\n", encoding="utf-8"
    )


def _damaged(file, why) -> InputError:
    return InputError(
        f"found {file} damaged ({why}), expected whole safetensors: the checkpoint is incomplete; copy or convert it again"
    )


def _line(error) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
