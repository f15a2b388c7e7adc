"""Reading a checkpoint's JSON and the headers of its safetensors, without trusting either.

Sizes are looked at before anything is read, and headers have to describe all bytes of their file.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .errors import InputError

TensorFacts = tuple[str, tuple[int, ...]]
"""(dtype as safetensors names it, shape) of a stored tensor."""

JSON_LIMIT = 64 * 2**20
"""Bytes of a JSON file that is still read."""
HEADER_LIMIT = 100 * 10**6
"""Bytes of a safetensors header that is still read: the library's own limit."""
LARGEST_RANK = 8
"""Dimensions of a tensor, at most: no model has one of more."""
LONGEST_MESSAGE = 200
"""Characters of another library's error that are passed on."""
BYTES = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes of one number by the dtype's name in a safetensors header."""


def read_json(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a JSON ``file``; InputError if it is not one."""
    file = Path(file)
    try:
        size = file.stat().st_size
        if size > JSON_LIMIT:
            raise InputError(
                f"found {file} of {size:,} bytes, expected a small file: it is damaged"
            )
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"found {file} unreadable ({_first_line(error)}), expected JSON: "
            "copy the checkpoint again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"found a {type(content).__name__} in {file}, expected a mapping: "
            "the checkpoint is damaged"
        )
    return content


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files in ``folder``: the only one, or those that its index names.

    Where there are both, transformers reads the one.

    Raises:
        InputError: one is missing, or the index names something else than files beside it.
    """
    folder = Path(folder)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    if not index.is_file():
        raise InputError(
            f"found no {SAFE_WEIGHTS_NAME} in {folder}, "
            "expected the weights in safetensors: copy it again"
        )

    names = _read_weight_map(index).values()
    for name in names:
        is_name = isinstance(name, str) and name == os.path.basename(name)
        if not is_name or not name.endswith(".safetensors"):
            raise InputError(
                f"found {name!r} in {index}, "
                "expected the name of a safetensors file beside it: it is damaged"
            )
        if not (folder / name).is_file():
            raise InputError(
                f"found no {name} in {folder}, which its index names: copy the checkpoint again"
            )
    return [folder / name for name in sorted(set(names))]


def _read_weight_map(index: Path) -> dict[str, Any]:
    """File names by tensor name; InputError if the index has none."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"found no weight_map in {index}, expected file names by tensor: "
            "copy the checkpoint again"
        )
    return weight_map


def read_header(file: str | os.PathLike[str]) -> dict[str, TensorFacts]:
    """Facts by tensor name of a safetensors ``file``, of which only the header is read.

    Raises:
        InputError: it is truncated, or its header does not describe its bytes.
    """
    file = Path(file)
    entries, data_size = _read_header_entries(file)
    entries.pop("__metadata__", None)
    tensors: dict[str, TensorFacts] = {}
    end = 0
    try:
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = entry["dtype"]
            shape = entry["shape"]
            start, stop = entry["data_offsets"]
            count = _count_elements(name, shape)
            if dtype not in BYTES or start != end or stop - start != count * BYTES[dtype]:
                raise ValueError(
                    f"{name!r}: dtype {dtype!r}, shape {shape}, bytes {start} to {stop}"
                )
            tensors[name] = (dtype, tuple(shape))
            end = stop
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(file, _first_line(error)) from error
    if end != data_size:
        raise _damaged(file, f"{data_size:,} bytes of data where {end:,} are described")
    return tensors


def _read_header_entries(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors ``file``, and how many bytes of data follow it."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        room = file.stat().st_size - 8
        if not 2 <= length <= min(HEADER_LIMIT, room):
            raise _damaged(file, "its header does not fit into it")
        try:
            entries = json.loads(stream.read(length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _damaged(file, _first_line(error)) from error
    if not isinstance(entries, dict):
        raise _damaged(file, "its header is no mapping")
    return entries, room - length


def _count_elements(name: str, shape: list[int]) -> int:
    """How many numbers a tensor of this ``shape`` has; ValueError if it is no shape."""
    if len(shape) > LARGEST_RANK:
        raise ValueError(f"{name!r}: {len(shape)} dimensions")
    for side in shape:
        if type(side) is not int or not 0 <= side < 2**63:
            raise ValueError(f"shape {shape}")
    return math.prod(shape)


def read_headers(folder: str | os.PathLike[str]) -> dict[str, TensorFacts]:
    """Facts by tensor name of all weights in ``folder``.

    Raises:
        InputError: a file is damaged, or the index and the files name different tensors.
    """
    files = weight_files(folder)
    index = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
    is_sharded = files[0].name != SAFE_WEIGHTS_NAME or len(files) > 1
    weight_map = _read_weight_map(index) if is_sharded else None

    tensors: dict[str, TensorFacts] = {}
    for file in files:
        in_file = read_header(file)
        if weight_map is not None:
            in_index = {name for name, where in weight_map.items() if where == file.name}
            if in_index != in_file.keys():
                odd = sorted(in_index ^ in_file.keys())[0]
                raise _damaged(file, f"{odd!r} is in the index or in the file, not in both")
        tensors.update(in_file)
    return tensors


def _damaged(file: Path, why: str) -> InputError:
    return InputError(
        f"found {file} damaged ({why}), expected whole safetensors: "
        "the checkpoint is incomplete; copy or convert it again"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:LONGEST_MESSAGE]
