"""What the header of a GGUF file says, checked before transformers reads the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers.utils import is_gguf_available

from ..checkpoint_code.errors import CheckpointError, InputError, MissingPackage

SUFFIX = ".gguf"
MAGIC = b"GGUF"
"""The first bytes of every GGUF file."""
VERSIONS = (2, 3)
"""Of the format; files of version 1 are of 2023 alone, and transformers does not read them."""
ARCHITECTURE = "general.architecture"
"""The key of the metadata that names the architecture."""
ALIGNMENT = "general.alignment"
"""The key of the metadata for what the places of tensors are multiples of."""
DEFAULT_ALIGNMENT = 32
"""What they are multiples of where the file does not say."""
STRING = 8
"""Number of the type of strings in the metadata."""
ARRAY = 9
"""Number of the type of arrays in the metadata."""
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""The other types by number, as ``struct`` names them."""
LARGEST_RANK = 4
"""Dimensions of a tensor, at most: ggml has no more."""


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says about itself before its weights."""

    architecture: str
    """As llama.cpp names it."""
    tensors: tuple[str, ...]
    """Names of the tensors in the file, as llama.cpp has them."""


class _Tensor(NamedTuple):
    """An entry of the table of tensors."""

    name: str
    numbers: int
    kind: int
    """ggml's number of the type."""
    start: int
    """In bytes, behind the start of the weights."""


def is_gguf(name: str) -> bool:
    """Return whether ``name`` is that of a GGUF file."""
    return name.lower().endswith(SUFFIX)


def read_gguf_header(name: str) -> GGUFHeader:
    """Read and check the header of the GGUF file ``name``; no weights are read.

    Raises:
        MissingPackage: the package gguf is not installed.
        InputError: there is no such file here, or it is no GGUF file.
        CheckpointError: it is damaged or cut off.
    """
    path = Path(name)
    if not path.is_file():
        raise InputError(
            f"found no file {name}, expected a GGUF file on this machine: download it, or check "
            "the path"
        )
    _require_magic(path)
    if not is_gguf_available():
        raise MissingPackage(
            f"reading {name} needs the package gguf: pip install 'hf-kernel-ffn[gguf]'"
        )
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _read(_Cursor(content, name), name)


def _require_magic(path: Path) -> None:
    """InputError unless the file at ``path`` begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise InputError(
            f"found {path} unreadable ({error.strerror}), expected a GGUF file: check its rights"
        ) from error
    if magic != MAGIC:
        raise InputError(
            f"found {magic!r} at the beginning of {path}, expected {MAGIC!r}: it is no GGUF file"
        )


class _Cursor:
    """Reads numbers and strings from a file, one after the other."""

    def __init__(self, content: mmap.mmap, name: str):
        self.content = content
        self.name = name
        self.place = 0

    def read(self, kind: str) -> int:
        """The next number, of a type as ``struct`` names it."""
        layout = struct.Struct(f"<{kind}")
        return layout.unpack(self._take(layout.size))[0]

    def read_string(self) -> str:
        """The next string, with its length before it."""
        return self._take(self.read("Q")).decode("utf-8", errors="replace")

    def skip(self, count: int) -> None:
        """Go on ``count`` bytes."""
        if count > len(self.content) - self.place:
            raise damaged(self.name, f"its header goes on behind its {len(self.content):,} bytes")
        self.place += count

    def _take(self, count: int) -> bytes:
        first = self.place
        self.skip(count)
        return self.content[first : self.place]


def damaged(name: str, reason: str) -> CheckpointError:
    """Make the error that says that the GGUF file ``name`` is damaged, and why."""
    return CheckpointError(
        f"found {name} damaged or cut off ({reason}), expected a whole GGUF file: copy it again"
    )


def _read(cursor: _Cursor, name: str) -> GGUFHeader:
    """Read the header from its beginning."""
    cursor.skip(len(MAGIC))
    version = cursor.read("I")
    if version not in VERSIONS:
        raise InputError(
            f"found version {version} of the format in {name}, expected "
            f"{' or '.join(map(str, VERSIONS))}: write the file again by a newer llama.cpp"
        )
    tensor_count = cursor.read("Q")
    key_count = cursor.read("Q")
    metadata = _read_metadata(cursor, key_count)
    architecture = metadata.get(ARCHITECTURE)
    if not isinstance(architecture, str):
        raise damaged(name, f"it has no {ARCHITECTURE}")

    tensors = [_read_tensor(cursor) for _ in range(tensor_count)]
    if not tensors:
        raise damaged(name, "it has no tensors")
    _require_whole(cursor, tensors, metadata)
    return GGUFHeader(architecture, tuple(tensor.name for tensor in tensors))


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, object]:
    """Read ``count`` keys with their values; None stands for an array."""
    metadata: dict[str, object] = {}
    for _ in range(count):
        key = cursor.read_string()
        metadata[key] = _read_value(cursor, cursor.read("I"))
    return metadata


def _read_value(cursor: _Cursor, kind: int) -> object:
    """Read one value of the type with the number ``kind``; arrays are skipped."""
    if kind == STRING:
        return cursor.read_string()
    if kind in SCALARS:
        return cursor.read(SCALARS[kind])
    if kind != ARRAY:
        raise damaged(cursor.name, f"a value of type {kind}")

    item_kind = cursor.read("I")
    count = cursor.read("Q")
    if item_kind in SCALARS:
        cursor.skip(count * struct.calcsize(f"<{SCALARS[item_kind]}"))
        return None
    if item_kind == ARRAY:  # which no writer makes, and which could nest without end
        raise damaged(cursor.name, "an array of arrays")
    for _ in range(count):
        _read_value(cursor, item_kind)
    return None


def _read_tensor(cursor: _Cursor) -> _Tensor:
    """Read one entry of the table of tensors."""
    name = cursor.read_string()
    rank = cursor.read("I")
    if rank > LARGEST_RANK:
        raise damaged(cursor.name, f"a tensor of {rank} dimensions")
    numbers = math.prod(cursor.read("Q") for _ in range(rank))
    kind = cursor.read("I")
    return _Tensor(name, numbers, kind, start=cursor.read("Q"))


def _require_whole(cursor: _Cursor, tensors: list[_Tensor], metadata: Mapping[str, object]) -> None:
    """Raise CheckpointError unless all ``tensors`` lie in the file, in types that gguf knows."""
    from gguf import GGML_QUANT_SIZES

    alignment = metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise damaged(cursor.name, f"{ALIGNMENT} {alignment!r}")
    start = math.ceil(cursor.place / alignment) * alignment

    sizes = {kind.value: size for kind, size in GGML_QUANT_SIZES.items()}
    end = start
    for tensor in tensors:
        if tensor.kind not in sizes:
            raise damaged(cursor.name, f"{tensor.name} is of type {tensor.kind}, unknown to gguf")
        block, block_bytes = sizes[tensor.kind]
        end = max(end, start + tensor.start + tensor.numbers // block * block_bytes)
    if end > len(cursor.content):
        raise damaged(cursor.name, f"{len(cursor.content):,} bytes of {end:,}")
