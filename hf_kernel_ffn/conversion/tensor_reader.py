"""Safetensors read one tensor at a time, for what does not fit in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.untrusted_files import BYTES, read_header
from ..compat import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    get_tied_parameter_names,
    rename_source_key,
)
from ..storage.weight_files import find_weight_files
from .safetensors_format import DTYPES, LENGTH_BYTES, PIECE, count_bytes, view_bytes


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
        for file in find_weight_files(name):
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
                named = key
                pattern = None
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


def _read_first_bytes(file: Path, count: int) -> bytes:
    with file.open("rb") as stream:
        return stream.read(count)


def _fill_tensor(stream: BufferedReader, start: int, tensor: Tensor, key: str) -> None:
    """Read ``tensor`` from the byte ``start`` of a file on."""
    stream.seek(start)
    if not tensor.numel():
        return
    if stream.readinto(view_bytes(tensor)) != count_bytes(tensor):
        raise InputError(
            f"found {key} cut off in {stream.name}, expected whole safetensors: copy the "
            "checkpoint again"
        )
