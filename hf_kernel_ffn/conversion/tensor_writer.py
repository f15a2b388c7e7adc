"""Safetensors written one tensor at a time, for what does not fit in memory."""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from io import BufferedWriter
from pathlib import Path
from types import TracebackType

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .safetensors_format import LENGTH_BYTES, NAMES, PIECE, count_bytes, view_bytes

WAITING = 8
"""Tensors that may wait to be written: about a block."""
ONE_FILE = "50GB"
"""What ``save_pretrained`` puts into one file at most."""


class Writer:
    """Safetensors files whose tensors, described beforehand, are filled in any order.

    They have the same bytes as those of ``save_pretrained``. Tensors are rounded and written while
    the caller goes on.
    """

    def __init__(self, folder: Path, described: Mapping[str, Tensor]):
        """Make the files in ``folder``; ``described``: tensors on the meta device by name."""
        plan = split_state_dict_into_shards_factory(
            dict(described),
            get_storage_size=count_bytes,
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
            offset += count_bytes(tensor)
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
                stream.write(view_bytes(part.to("cpu", dtype)))

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
