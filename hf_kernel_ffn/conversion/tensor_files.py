"""Safetensors read and written one tensor at a time, for what does not fit in memory."""

from __future__ import annotations

import json
import math
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from io import BufferedReader, BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.untrusted_files import BYTES, read_header, weight_files
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
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""By the name that safetensors has for them, in the order in which it writes them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**24
"""Bytes copied at once."""
WAITING = 8
"""Tensors that may wait to be written: about a block."""
ONE_FILE = "50GB"
"""What ``save_pretrained`` puts into one file at most."""
LENGTH_BYTES = 8
"""The first bytes of a file say how long the header is, and the header's length is a multiple."""


class Place(NamedTuple):
    """Where a tensor lies in a file."""

    file: Path
    start: int
    """The byte at which it begins."""
    dtype: torch.dtype
    shape: tuple[int, ...]


class Reader:
    """Tensors of a checkpoint by the names that a model has for them, read when they are asked for.

    No file is mapped into memory.
    """

    def __init__(self, name: str, model: PreTrainedModel):
        """Find the tensors of ``model`` in the checkpoint ``name``.

        Args:
            name: local folder or hub id.
            model: the one that the checkpoint is of, on the meta device.

        Raises:
            InputError: there are no safetensors; one is damaged; or they are not what transformers
                makes that model of.
        """
        self.name = name
        self.model = model
        self.places: dict[str, Place] = {}
        """By the names in the files."""
        for file in _find_files(name):
            self._read_places(file)
        self.converters: dict[str, WeightConverter] = {}
        """How transformers puts tensors together, by the pattern of a source's name."""
        self.sources: dict[str, list[tuple[str, str | None]]] = {}
        """What each tensor of the model is made of: names in the files, and the converter's pattern
        unless it is only renamed."""
        expected = model.state_dict()
        self._find_sources(expected)
        self._check_sources(expected)

    def _read_places(self, file: Path) -> None:
        """Note where the tensors of ``file`` lie."""
        start = LENGTH_BYTES + int.from_bytes(_read_first_bytes(file, LENGTH_BYTES), "little")
        for key, (dtype, shape) in read_header(file).items():
            if dtype not in DTYPES:
                raise InputError(
                    f"found {key} of dtype {dtype} at {self.name}, expected one of "
                    f"{', '.join(DTYPES)}"
                )
            self.places[key] = Place(file, start, DTYPES[dtype], shape)
            start += math.prod(shape) * BYTES[dtype]

    def _find_sources(self, expected: dict[str, Tensor]) -> None:
        """Find what each ``expected`` tensor is made of: one renamed, or several put together."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.converters = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }
        prefix = self.model.base_model_prefix
        for key in sorted(self.places, key=dot_natural_key):
            named, pattern = rename_source_key(key, renamings, converters, prefix, expected)
            if named not in expected and key in expected:
                named, pattern = key, None
            if named in expected:
                self.sources.setdefault(named, []).append((key, pattern))

    def _check_sources(self, expected: Mapping[str, Tensor]) -> None:
        """InputError unless every ``expected`` tensor is there, whole and of its shape."""
        tied = get_tied_parameter_names(self.model)
        missing = sorted(set(expected) - tied - set(self.sources))
        split = [
            named
            for named in self.sources
            if self._is_converted(named) and len(self._get_converter(named).target_patterns) > 1
        ]
        misshapen = [
            named
            for named in self.sources
            if not self._is_converted(named)
            and self._get_place(named).shape != expected[named].shape
        ]
        for fault, names in (("no whole", missing), ("a split", split), ("a misshapen", misshapen)):
            if names:
                raise InputError(
                    f"found {fault} tensor {names[0]!r} at {self.name}, expected the stock "
                    "model's: load and save it by transformers, or convert it in memory"
                )

    def _is_converted(self, named: str) -> bool:
        """Whether the tensor is put together from others."""
        return self.sources[named][0][1] is not None

    def _get_converter(self, named: str) -> WeightConverter:
        return self.converters[str(self.sources[named][0][1])]

    def _get_place(self, named: str) -> Place:
        """Where a tensor lies that is only renamed."""
        return self.places[self.sources[named][0][0]]

    def read(self, named: str) -> Tensor:
        """Read a tensor, in the dtype it is stored in."""
        if not self._is_converted(named):
            return self._read_stored(self.sources[named][0][0])
        converter = deepcopy(self._get_converter(named))
        for key, pattern in self.sources[named]:
            # Tensors serve as well as the futures of them that transformers declares.
            converter.add_tensor(named, key, str(pattern), cast(Any, self._read_stored(key)))
        converted = converter.convert(named, model=self.model, config=self.model.config)
        tensor = converted[named]
        return tensor[0] if isinstance(tensor, list) else tensor

    def _read_stored(self, key: str) -> Tensor:
        """The tensor ``key`` of the files."""
        place = self.places[key]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        with place.file.open("rb") as stream:
            _fill_tensor(stream, place.start, tensor, key)
        return tensor

    def rows(self, named: str, indices: Tensor) -> Tensor:
        """Read (n, width) rows of a matrix that is only renamed."""
        key = self.sources[named][0][0]
        place = self.places[key]
        width = place.shape[1]
        rows = torch.empty(len(indices), width, dtype=place.dtype)
        with place.file.open("rb") as stream:
            for row, index in zip(rows, indices.tolist(), strict=True):
                _fill_tensor(stream, place.start + index * width * place.dtype.itemsize, row, key)
        return rows

    def pieces(self, named: str) -> Iterator[Tensor]:
        """Yield the tensor's numbers in order, flat, a piece at a time."""
        if self._is_converted(named):
            yield self.read(named)
            return
        key = self.sources[named][0][0]
        place = self.places[key]
        start = place.start
        left = math.prod(place.shape)
        with place.file.open("rb") as stream:
            while left:
                piece = torch.empty(min(left, PIECE // place.dtype.itemsize), dtype=place.dtype)
                _fill_tensor(stream, start, piece, key)
                yield piece
                start += len(piece) * place.dtype.itemsize
                left -= len(piece)


def _find_files(name: str) -> list[Path]:
    """The safetensors files of the checkpoint at ``name``."""
    if Path(name).is_dir():
        return weight_files(name)
    try:
        index = find_cached_file(name, SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            files = [cached_file(name, SAFE_WEIGHTS_NAME)]
        else:
            files = get_checkpoint_shard_files(name, str(index))[0]
    except OSError as error:
        raise InputError(
            f"found no safetensors at {name}, expected them: save the model by save_pretrained "
            "first"
        ) from error
    return [Path(str(file)) for file in files]


def _read_first_bytes(file: Path, count: int) -> bytes:
    with file.open("rb") as stream:
        return stream.read(count)


def _fill_tensor(stream: BufferedReader, start: int, tensor: Tensor, key: str) -> None:
    """Read ``tensor`` from the byte ``start`` of a file on."""
    stream.seek(start)
    if not tensor.numel():
        return
    if stream.readinto(_view_bytes(tensor)) != _count_bytes(tensor):
        raise InputError(
            f"found {key} cut off in {stream.name}, expected whole safetensors: copy the "
            "checkpoint again"
        )


class Writer:
    """Safetensors files whose tensors, described beforehand, are filled in any order.

    They have the same bytes as those of ``save_pretrained``. Tensors are rounded and written while
    the caller goes on.
    """

    def __init__(self, folder: Path, described: Mapping[str, Tensor]):
        """Make the files in ``folder``; ``described``: tensors on the meta device by name."""
        plan = split_state_dict_into_shards_factory(
            dict(described),
            get_storage_size=_count_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=ONE_FILE,
        )
        self.places: dict[str, tuple[BufferedWriter, int, torch.dtype]] = {}
        """By name: an open file, the byte at which the tensor begins there, and its dtype."""
        self.files = ExitStack()
        for file, keys in plan.filename_to_tensors.items():
            stream = self.files.enter_context((folder / file).open("wb"))
            self._begin_file(stream, {key: described[key] for key in keys})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
        self.left = set(described)
        """Names of the tensors that are not filled yet."""
        self.pool = ThreadPoolExecutor(1)
        self.pending: deque[Future[None]] = deque()

    def _begin_file(self, stream: BufferedWriter, described: Mapping[str, Tensor]) -> None:
        """Write the header of a file of these tensors, and give it its size."""
        order = list(NAMES)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        offset = 0
        for key in sorted(described, key=lambda key: (order.index(described[key].dtype), key)):
            tensor = described[key]
            offsets[key] = offset
            offset += _count_bytes(tensor)
            header[key] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offsets[key], offset],
            }

        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % LENGTH_BYTES)
        stream.write(struct.pack("<Q", len(text)) + text)
        start = LENGTH_BYTES + len(text)
        stream.truncate(start + offset)
        for key, tensor in described.items():
            self.places[key] = (stream, start + offsets[key], tensor.dtype)

    def write(self, key: str, pieces: Iterable[Tensor]) -> None:
        """Fill the tensor ``key`` by ``pieces`` of it in order, which nobody changes any more.

        An error may come with a later call, or at the end.
        """
        self.left.discard(key)
        self.pending.append(self.pool.submit(self._write_pieces, key, pieces))
        while len(self.pending) > WAITING:
            self.pending.popleft().result()

    def _write_pieces(self, key: str, pieces: Iterable[Tensor]) -> None:
        stream, start, dtype = self.places[key]
        stream.seek(start)
        for piece in pieces:
            for part in piece.reshape(-1).split(PIECE // dtype.itemsize):
                stream.write(_view_bytes(part.to(dtype)))

    def __enter__(self) -> Writer:
        """Return the writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what is being written, unless there was an error, and close the files."""
        try:
            while self.pending and error is None:
                self.pending.popleft().result()
        finally:
            self.pool.shutdown(cancel_futures=True)
            self.files.close()


def _count_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _view_bytes(tensor: Tensor) -> memoryview:
    """The tensor's own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
