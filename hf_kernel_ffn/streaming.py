"""Converting what does not fit in memory: safetensors to safetensors, one block of the model at a time.

The blocks before the current one are stood in for by what they put out on the calibration tokens, so that each is read once.
What is held: the tensors of one block and the next, read ahead, and hidden_size numbers per calibration token.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .architectures import architecture_of, ffn_paths, ffn_weights
from .calibration import BATCH_TOKENS, FIT_ROWS, fitted_and_held
from .configuration import KernelFFNConfig, LayerConfig, with_defaults
from .errors import InputError
from .loading import load_stock_on_meta, stored_dtype, torch_dtype
from .readout import KernelFFN
from .surgery import (
    CALIBRATION_TOKENS,
    ConversionReport,
    config_entry,
    conversion_report,
    convert_ffn,
    layer_settings,
    meta_student,
    name_prefix,
    save_companions,
    with_progress,
)

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}
"""dtypes as safetensors calls them,."""
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16")
"""In which safetensors writes them."""
PIECE = 2**24
"""Bytes copied at once."""


@torch.no_grad()
def convert_streamed(
    source: str,
    out: Path,
    config: KernelFFNConfig | None = None,
    layers: str | None = None,
    *,
    calibration_ids: Tensor | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    dtype: str = "float32",
    progress: bool = False,
) -> ConversionReport:
    """Convert the stock model at ``source`` into the folder ``out``: the checkpoint that :func:`hf_kernel_ffn.convert` and
    saving make, bit for bit, on the CPU.

    Args:
        calibration_ids: (rows, length) token ids of text; None only with ``calibration_tokens`` 0, since a model that is never
            whole in memory cannot write its own.
        dtype: of the weights while they are computed with.

    Raises:
        InputError: as convert(); or the checkpoint's tensors are not the stock model's by name.
    """
    if (calibration_ids is None) != (calibration_tokens == 0):
        raise InputError(
            "found a streamed conversion without text, expected calibration text, or 0 calibration tokens: give one"
        )
    teacher, reader = load_stock_on_meta(source), Reader(source)
    architecture = architecture_of(teacher)
    paths = ffn_paths(teacher, architecture)
    per_layer = layer_settings(config, layers, len(paths))
    ids = None if calibration_ids is None else calibration_ids[: max(1, calibration_tokens // calibration_ids.shape[1])]
    report = conversion_report(architecture, ids, calibration_ids)
    tied = set(teacher.all_tied_weights_keys)
    missing = sorted({name for name, _ in teacher.named_parameters()} - tied - set(reader.places))
    if missing:
        raise InputError(
            f"found no tensor {missing[0]!r} at {source}, expected the stock model's names: load and save it by transformers, "
            "or convert in memory"
        )
    batches = [] if ids is None else calibration_batches(ids)
    stored, prefix = stored_dtype(source), name_prefix(teacher)
    ffns: dict[str, Any] = {}

    described = {
        name: torch.empty_like(p, dtype=stored, device="meta") for name, p in teacher.named_parameters() if name not in tied
    }
    shapes = {i: _described_ffn(teacher, architecture, paths[i], settings, stored) for i, settings in per_layer.items()}
    for i in per_layer:
        inside = f"{prefix}{paths[i]}."
        described = {name: t for name, t in described.items() if not name.startswith(inside)}
        described.update({inside + name: t for name, t in shapes[i].items()})
    writer = Writer(out, described)
    replay = Replay(teacher, reader, architecture.layers, torch_dtype(dtype))
    try:
        groups = [[prefix + name for name in replay.names(i)] for i in range(len(paths))]
        for i, tensors in zip(with_progress(range(len(paths)), "converting", progress), read_ahead(reader, groups)):
            for key, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    raise InputError(f"found NaN or infinite values in {key}, expected finite weights: repair the teacher")
            with replay.block({key.removeprefix(prefix): tensor for key, tensor in tensors.items()}):
                if i in per_layer:
                    path, stock = paths[i], replay.base.get_submodule(paths[i])
                    weights = ffn_weights(stock, architecture, teacher.config, path)
                    settings = with_defaults(per_layer[i], weights.gate is not None)
                    ffn, report.layers[path] = convert_ffn(teacher, architecture, path, weights, settings, ids)
                    ffns[path] = ffn.to(replay.dtype)
                    made = {f"{prefix}{path}.{name}": t for name, t in ffns[path].state_dict().items()}
                    for key, tensor in made.items():
                        writer.write(key, iter([tensor]))
                    replay.base.set_submodule(path, ffns[path])
                for key, tensor in tensors.items():
                    if key in writer.places:
                        writer.write(key, iter([tensor]))
                if ids is not None and i + 1 < len(paths):
                    replay.advance(i, batches)
            if i in per_layer:
                ffns[paths[i]] = ffn.to("meta")
                replay.base.set_submodule(paths[i], nn.Identity())
        for key in sorted(writer.left):
            writer.write(key, reader.pieces(key))
    finally:
        writer.close()
    student = meta_student(teacher, config_entry(teacher, architecture, ffns))
    student.generation_config = teacher.generation_config
    written = {file.name: file.rename(out / f"{file.name}.kept") for file in out.glob("model*")}
    student.to(dtype=stored).save_pretrained(out, state_dict={})
    for file in out.glob("model*.safetensors"):
        file.unlink()
    for name, file in written.items():
        file.rename(out / name)
    save_companions(source, out, conversion=report.to_dict())
    return report


def calibration_batches(ids: Tensor) -> list[Tensor]:
    """Batches (rows, length) in which a conversion reads the calibration ids: its sample, what it fits on, what it holds out."""
    sample = ids[torch.linspace(0, len(ids) - 1, min(len(ids), FIT_ROWS)).long()]
    return [batch for rows in (sample, *fitted_and_held(ids)) for batch in rows.split(max(1, BATCH_TOKENS // rows.shape[1]))]


def _described_ffn(teacher, architecture, path, settings, dtype) -> dict[str, Tensor]:
    """The tensors of the readout that is to replace the FFN at ``path``, on the meta device."""
    ffn = teacher.base_model.get_submodule(path)
    up = ffn.get_submodule(architecture.up).weight
    hidden = teacher.config.hidden_size
    settings = with_defaults(settings, architecture.gate is not None)
    prototypes = round(settings.expansion * (up.numel() // hidden))
    with torch.device("meta"):
        readout = KernelFFN(LayerConfig(settings, hidden, prototypes, {}))
    return readout.to(dtype).state_dict()


class Reader:
    """Tensors of a checkpoint by name, read from its files when they are asked for; no file is mapped into memory."""

    def __init__(self, name: str):
        """``name``: local folder or hub id. InputError if there are no safetensors."""
        try:
            index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
            if index is not None:
                files = get_checkpoint_shard_files(name, index)[0]
            else:
                files = [cached_file(name, "model.safetensors")]
        except OSError as error:
            raise InputError(
                f"found no safetensors at {name}, expected them: save the model by save_pretrained first"
            ) from error
        self.places: dict[str, tuple[str, int, torch.dtype, tuple[int, ...]]] = {}
        dtypes = {name: dtype for dtype, name in NAMES.items()}
        for file in files:
            with open(file, "rb") as opened:
                length = struct.unpack("<Q", opened.read(8))[0]
                header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            for key, entry in header.items():
                if entry["dtype"] not in dtypes:
                    raise InputError(f"found {key} of dtype {entry['dtype']} at {name}, expected one of {', '.join(dtypes)}")
                start = 8 + length + entry["data_offsets"][0]
                self.places[key] = (file, start, dtypes[entry["dtype"]], tuple(entry["shape"]))

    def read(self, key: str) -> Tensor:
        """The tensor, in the dtype it is stored in."""
        file, start, dtype, shape = self.places[key]
        tensor = torch.empty(shape, dtype=dtype)
        with open(file, "rb", buffering=0) as opened:
            opened.seek(start)
            opened.readinto(_bytes(tensor))
        return tensor

    def rows(self, key: str, indices: Tensor) -> Tensor:
        """(n, width) rows of a matrix."""
        file, start, dtype, shape = self.places[key]
        rows = torch.empty(len(indices), shape[1], dtype=dtype)
        with open(file, "rb") as opened:
            for row, index in zip(rows, indices.tolist()):
                opened.seek(start + index * shape[1] * dtype.itemsize)
                opened.readinto(_bytes(row))
        return rows

    def pieces(self, key: str) -> Iterator[Tensor]:
        """The tensor's numbers in order, flat, a piece at a time."""
        file, start, dtype, shape = self.places[key]
        left = math.prod(shape)
        with open(file, "rb", buffering=0) as opened:
            opened.seek(start)
            while left:
                piece = torch.empty(min(left, PIECE // dtype.itemsize), dtype=dtype)
                opened.readinto(_bytes(piece))
                yield piece
                left -= len(piece)


class Writer:
    """Safetensors files whose tensors, described beforehand, are filled in any order; the same bytes as ``save_pretrained``."""

    def __init__(self, folder: Path, described: dict[str, Tensor]):
        """``described``: tensors on the meta device by name."""
        plan = split_state_dict_into_shards_factory(
            described, get_storage_size=_size, filename_pattern="model{suffix}.safetensors", max_shard_size="50GB"
        )
        self.places: dict[str, tuple[Any, int, torch.dtype]] = {}
        self.files = ExitStack()
        for file, keys in plan.filename_to_tensors.items():
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for key in sorted(keys, key=lambda key: (ORDER.index(NAMES[described[key].dtype]), key)):
                tensor, end = described[key], offset + _size(described[key])
                header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
                offset = end
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % 8)
            opened = self.files.enter_context((folder / file).open("wb", buffering=0))
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + offset)
            for key in keys:
                self.places[key] = (opened, 8 + len(text) + header[key]["data_offsets"][0], described[key].dtype)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )
        self.left = set(described)

    def write(self, key: str, pieces: Iterator[Tensor]) -> None:
        """Fill the tensor ``key`` by flat ``pieces`` in order. InputError if one is not finite."""
        file, offset, dtype = self.places[key]
        file.seek(offset)
        for piece in pieces:
            if piece.is_floating_point() and not torch.isfinite(piece).all():
                raise InputError(f"found NaN or infinite values in {key}, expected finite weights: repair the teacher")
            file.write(_bytes(piece.to(dtype).contiguous()))
        self.left.discard(key)

    def close(self) -> None:
        self.files.close()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensor: Tensor):
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class Replay:
    """A model on the meta device of which one block at a time has weights: the blocks before it put out what they once did."""

    def __init__(self, model: Any, reader: Reader, layers: str, dtype: torch.dtype):
        self.model, self.reader, self.dtype = model, reader, dtype
        self.base, self.blocks = model.base_model, model.base_model.get_submodule(layers)
        prefix = name_prefix(model)
        self.layers, self.outputs, self.key = layers, {}, b""
        self.embedding = model.get_input_embeddings()
        if type(self.embedding) is not nn.Embedding:
            raise InputError(f"found {type(self.embedding).__name__} as input embedding, expected Embedding: convert in memory")
        for module in model.modules():  # buffers that no file has, such as rotary frequencies
            names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
            for name in names:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            if names:
                model._init_weights(module)
        inside = {id(p) for p in (*self.blocks.parameters(), *self.embedding.parameters())}
        for name, parameter in list(self.base.named_parameters()):
            if id(parameter) not in inside:
                self._place(name, reader.read(prefix + name))
        self.embedding_key = next(prefix + name for name, p in self.base.named_parameters() if p is self.embedding.weight)
        self.embedding.forward = self._embed
        self.embedding.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # says where token ids are to be

    def _embed(self, ids: Tensor) -> Tensor:
        self.key = str(tuple(ids.shape)).encode() + ids.contiguous().numpy().tobytes()
        if self.key in self.outputs:  # what the first block is given is not looked at any more
            return torch.zeros(*ids.shape, self.embedding.embedding_dim, dtype=self.dtype)
        unique, inverse = ids.unique(return_inverse=True)
        return self.reader.rows(self.embedding_key, unique).to(self.dtype)[inverse]

    def _place(self, name: str, tensor: Tensor | None) -> None:
        parent, _, leaf = name.rpartition(".")
        module = self.base.get_submodule(parent)
        if tensor is None:
            tensor = module._parameters[leaf].to("meta")
        module._parameters[leaf] = nn.Parameter(tensor if tensor.is_meta else tensor.to(self.dtype), requires_grad=False)

    def names(self, number: int) -> list[str]:
        """Names of the tensors of a block, under the base model."""
        return [f"{self.layers}.{number}.{name}" for name, _ in self.blocks[number].named_parameters()]

    @contextmanager
    def block(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """The block with these weights, by name under the base model, while the context is open."""
        for name, tensor in tensors.items():
            self._place(name, tensor)
        try:
            yield
        finally:
            for name in tensors:
                with suppress(AttributeError):  # of the FFN that was replaced
                    self._place(name, None)

    def advance(self, number: int, batches: list[Tensor]) -> None:
        """Keep what block ``number`` puts out when the model reads each of ``batches`` (rows, length), and let it put out that
        from then on."""
        outputs: dict[bytes, Any] = {}

        def stop(module, args, output):
            outputs[self.key] = output
            raise _Done

        hook = self.blocks[number].register_forward_hook(stop)
        for ids in batches:
            with suppress(_Done):
                self.base(input_ids=ids, use_cache=False)
        hook.remove()
        self.outputs = outputs
        self.blocks[number].forward = lambda *args, **kwargs: self.outputs[self.key]


class _Done(Exception):
    """The forward pass has come as far as it is needed."""


def read_ahead(reader: Reader, groups: list[list[str]]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each group by name; while one is at work, the next is read."""
    with ThreadPoolExecutor(1) as pool:
        following = None
        for number in range(len(groups)):
            current = following or pool.submit(lambda keys: {key: reader.read(key) for key in keys}, groups[number])
            tensors = current.result()
            last = number + 1 == len(groups)
            following = None if last else pool.submit(lambda keys: {key: reader.read(key) for key in keys}, groups[number + 1])
            yield tensors
