"""Safetensors read and written one tensor at a time, for what does not fit in memory."""

from __future__ import annotations

import json
import math
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.integrity import BYTES, read_header, weight_files
from ..compat import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    find_cached_file,
    get_model_conversion_mapping,
    get_tied_parameter_names,
    rename_source_key,
)

DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16,
}  # fmt: skip
"""By the name that safetensors has for them, in the order in which it writes them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**24
"""Bytes copied at once."""
WAITING = 8
"""Tensors that may wait to be written: about a block."""


class Reader:
    """Tensors of a checkpoint by the names that a model has for them, read when they are asked for; no file is mapped into memory."""

    def __init__(self, name: str, model: Any):
        """``name``: local folder or hub id; ``model``: the one that the checkpoint is of, on the meta device.

        Raises:
            InputError: there are no safetensors; one is damaged; or they are not what transformers makes that model of.
        """
        self.name, self.model = name, model
        self.places: dict[str, tuple[Path, int, torch.dtype, tuple[int, ...]]] = {}
        for file in _files(name):
            start = 8 + int.from_bytes(_first_bytes(file, 8), "little")
            for key, (dtype, shape) in read_header(file).items():
                if dtype not in DTYPES:
                    raise InputError(
                        f"found {key} of dtype {dtype} at {name}, expected one of {', '.join(DTYPES)}"
                    )
                self.places[key] = file, start, DTYPES[dtype], shape
                start += math.prod(shape) * BYTES[dtype]
        self._find(model.state_dict())

    def _find(self, expected: dict[str, Tensor]) -> None:
        """What each tensor of the model is made of, as loading has it: renamed, or put together from several."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.converters = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }
        self.parts: dict[str, list[tuple[str, str | None]]] = {}
        prefix = self.model.base_model_prefix
        for key in sorted(self.places, key=dot_natural_key):
            named, pattern = rename_source_key(key, renamings, converters, prefix, expected)
            if named not in expected and key in expected:
                named, pattern = key, None
            if named in expected:
                self.parts.setdefault(named, []).append((key, pattern))
        tied = get_tied_parameter_names(self.model)
        missing = sorted(set(expected) - tied - set(self.parts))
        several = [
            named for named, parts in self.parts.items() if parts[0][1] and self._targets(named) > 1
        ]
        odd = [
            named
            for named in self.parts
            if not self._converted(named) and self._shape(named) != expected[named].shape
        ]
        for what, names in (("no whole", missing), ("a split", several), ("a misshapen", odd)):
            if names:
                raise InputError(
                    f"found {what} tensor {names[0]!r} at {self.name}, expected the stock model's: load and save it by transformers, or "
                    "convert it in memory"
                )

    def _targets(self, named: str) -> int:
        return len(self.converters[str(self.parts[named][0][1])].target_patterns)

    def _converted(self, named: str) -> bool:
        return self.parts[named][0][1] is not None

    def _shape(self, named: str) -> tuple[int, ...]:
        return self.places[self.parts[named][0][0]][3]

    def read(self, named: str) -> Tensor:
        """The tensor, in the dtype it is stored in."""
        if not self._converted(named):
            return self._numbers(self.parts[named][0][0])
        converter: Any = deepcopy(self.converters[str(self.parts[named][0][1])])
        for key, pattern in self.parts[named]:
            converter.add_tensor(named, key, pattern, self._numbers(key))
        found = converter.convert(named, model=self.model, config=self.model.config)[named]
        return found[0] if isinstance(found, list) else found

    def _numbers(self, key: str) -> Tensor:
        file, start, dtype, shape = self.places[key]
        tensor = torch.empty(shape, dtype=dtype)
        with file.open("rb") as opened:
            _fill(opened, start, tensor, key)
        return tensor

    def rows(self, named: str, indices: Tensor) -> Tensor:
        """(n, width) rows of a matrix."""
        key = self.parts[named][0][0]
        file, start, dtype, shape = self.places[key]
        rows = torch.empty(len(indices), shape[1], dtype=dtype)
        with file.open("rb") as opened:
            for row, index in zip(rows, indices.tolist()):
                _fill(opened, start + index * shape[1] * dtype.itemsize, row, key)
        return rows

    def pieces(self, named: str) -> Iterator[Tensor]:
        """The tensor's numbers in order, flat, a piece at a time."""
        if self._converted(named):
            yield self.read(named)
            return
        key = self.parts[named][0][0]
        file, start, dtype, shape = self.places[key]
        left = math.prod(shape)
        with file.open("rb") as opened:
            while left:
                piece = torch.empty(min(left, PIECE // dtype.itemsize), dtype=dtype)
                _fill(opened, start, piece, key)
                yield piece
                start, left = start + len(piece) * dtype.itemsize, left - len(piece)


def _files(name: str) -> list[Path]:
    """The safetensors files of the checkpoint at ``name``."""
    if Path(name).is_dir():
        return weight_files(name)
    try:
        index = find_cached_file(name, SAFE_WEIGHTS_INDEX_NAME)
        files = (
            [cached_file(name, SAFE_WEIGHTS_NAME)]
            if index is None
            else get_checkpoint_shard_files(name, str(index))[0]
        )
    except OSError as error:
        raise InputError(
            f"found no safetensors at {name}, expected them: save the model by save_pretrained first"
        ) from error
    return [Path(str(file)) for file in files]


def _first_bytes(file: Path, count: int) -> bytes:
    with file.open("rb") as opened:
        return opened.read(count)


def _fill(opened: Any, start: int, tensor: Tensor, key: str) -> None:
    """Read ``tensor`` from the byte ``start`` on."""
    opened.seek(start)
    if tensor.numel() and opened.readinto(_bytes(tensor)) != _size(tensor):
        raise InputError(
            f"found {key} cut off in {opened.name}, expected whole safetensors: copy the checkpoint again"
        )


class Writer:
    """Safetensors files whose tensors, described beforehand, are filled in any order; the same bytes as ``save_pretrained``. They are
    rounded and written while the caller goes on."""

    def __init__(self, folder: Path, described: dict[str, Tensor]):
        """``described``: tensors on the meta device by name."""
        plan = split_state_dict_into_shards_factory(
            described,
            get_storage_size=_size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size="50GB",
        )
        self.places: dict[str, tuple[Any, int, torch.dtype]] = {}
        self.files = ExitStack()
        order = list(NAMES)
        for file, keys in plan.filename_to_tensors.items():
            about: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for key in sorted(keys, key=lambda key: (order.index(described[key].dtype), key)):
                tensor, end = described[key], offset + _size(described[key])
                about[key] = {
                    "dtype": NAMES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "data_offsets": [offset, end],
                }
                offset = end
            text = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % 8)
            opened = self.files.enter_context((folder / file).open("wb"))
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + offset)
            for key in keys:
                self.places[key] = (
                    opened,
                    8 + len(text) + about[key]["data_offsets"][0],
                    described[key].dtype,
                )
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            listed = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(listed, encoding="utf-8")
        self.left = set(described)
        self.pool, self.pending = ThreadPoolExecutor(1), deque[Future]()

    def write(self, key: str, pieces: Iterable[Tensor]) -> None:
        """Fill the tensor ``key`` by ``pieces`` of it in order, which nobody changes any more. An error may come with a later
        call, or at the end."""
        self.left.discard(key)
        self.pending.append(self.pool.submit(self._write, key, pieces))
        while len(self.pending) > WAITING:
            self.pending.popleft().result()

    def _write(self, key: str, pieces: Iterable[Tensor]) -> None:
        file, offset, dtype = self.places[key]
        file.seek(offset)
        for piece in pieces:
            for part in piece.reshape(-1).split(PIECE // dtype.itemsize):
                file.write(_bytes(part.to(dtype)))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        try:
            while self.pending and error is None:
                self.pending.popleft().result()
        finally:
            self.pool.shutdown(cancel_futures=True)
            self.files.close()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
