#!/usr/bin/env python3
"""Pack a saved model for a machine that takes few bytes at a time, and put it together there.

    python scripts/benchmarks/pack_model.py pack runs/smollm2 .model_parts --bytes 58000000
    python scripts/benchmarks/pack_model.py join .model_parts runs/smollm2

A model that was dequantised holds, in every block of 32 values, multiples of one step (8-bit), or
those plus an offset (4-bit): steps, offsets and whole numbers are found again and stored in place
of the values. What is not so is stored as bytes. `join` compares every tensor by its sha256.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 32
"""Values that share a step."""
NUDGES = sorted(range(-11, 12), key=abs)
"""Units in the last place by which the step may differ from what a block's range says."""
WEIGHTS = "model.safetensors"
NAMES = "abcdefgh"
"""Of the folders of parts, in order."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Blocks:
    """A tensor as steps, offsets and whole numbers, a row per block; ``offset`` None: all zero."""

    step: Tensor
    offset: Tensor | None
    numbers: Tensor

    def values(self) -> Tensor:
        """(blocks, BLOCK) bfloat16, computed in float32 as a reader of GGUF files does."""
        product = self.step.float()[:, None] * self.numbers.float()
        if self.offset is not None:
            product = product + self.offset.float()[:, None]
        return product.bfloat16()


@app.command()
def pack(
    model: Annotated[Path, typer.Argument(help="folder of a saved model")],
    out: Annotated[Path, typer.Argument(help="folder for the folders of parts")],
    most: Annotated[int, typer.Option("--bytes", min=1, help="of a part at most")] = 58_000_000,
) -> None:
    """Write MODEL as a few parts: OUT/a/part, OUT/b/part, ..."""
    buffer = io.BytesIO()
    index: dict[str, dict] = {}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for name, tensor in load_file(model / WEIGHTS).items():
            form, planes = encode(tensor)
            index[name] = {
                "form": form,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "sha256": digest(tensor),
            }
            for number, plane in enumerate(planes):
                archive.writestr(f"tensors/{name}/{number}", to_bytes(plane))
        for file in sorted(model.iterdir()):
            if file.is_file() and file.name != WEIGHTS:
                archive.write(file, f"files/{file.name}")
        archive.writestr("index.json", json.dumps(index))

    data = buffer.getvalue()
    for name, start in zip(NAMES, range(0, len(data), most)):
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "part").write_bytes(data[start : start + most])
        typer.echo(f"{out / name}: {len(data[start : start + most]):,} bytes")


@app.command()
def join(
    parts: Annotated[Path, typer.Argument(help="folder of the folders of parts")],
    model: Annotated[Path, typer.Argument(help="folder for the model")],
) -> None:
    """Put the model together that `pack` took apart, and compare every tensor by its sha256."""
    data = b"".join(file.read_bytes() for file in sorted(parts.glob("*/part")))
    model.mkdir(parents=True, exist_ok=True)
    tensors = {}
    with open_archive(data, parts) as archive:
        for name in archive.namelist():
            if name.startswith("files/"):
                (model / name.removeprefix("files/")).write_bytes(archive.read(name))
        for name, entry in json.loads(archive.read("index.json")).items():
            tensors[name] = decode(entry, list(read_planes(archive, name)))
            if digest(tensors[name]) != entry["sha256"]:
                raise typer.BadParameter(f"found {name} other than it was packed, expected it so")
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    typer.echo(f"{len(tensors)} tensors in {model}, each as it was")


def open_archive(data: bytes, parts: Path) -> zipfile.ZipFile:
    """What the parts hold, joined in ``data``; BadParameter if some of them are missing."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        is_whole = min(entry.header_offset for entry in archive.infolist()) == 0
    except (zipfile.BadZipFile, ValueError):
        is_whole = False
    if not is_whole:
        raise typer.BadParameter(f"found some parts of a model in {parts}, expected all of them")
    return archive


def encode(tensor: Tensor) -> tuple[str, list[Tensor]]:
    """The name of the form that ``tensor`` is stored in, and what is stored."""
    if tensor.dtype == torch.bfloat16 and tensor.numel() % BLOCK == 0:
        rows = tensor.reshape(-1, BLOCK)
        four = find_blocks(rows, 15)
        if four is not None and four.offset is not None:
            codes = four.numbers.to(torch.uint8)
            return "4-bit", [four.step, four.offset, codes[:, ::2] + 16 * codes[:, 1::2]]
        eight = find_blocks(rows, 127)
        if eight is not None:
            return "8-bit", [eight.step, eight.numbers.to(torch.int8)]
    bytes_of_values = tensor.contiguous().view(torch.uint8).reshape(-1, tensor.element_size())
    return "bytes", list(bytes_of_values.T.contiguous())


def decode(entry: dict, planes: list[bytes]) -> Tensor:
    """The tensor that :func:`encode` stored so."""
    if entry["form"] == "bytes":
        stacked = torch.stack([from_bytes(plane, torch.uint8) for plane in planes], -1)
        values = stacked.contiguous().view(getattr(torch, entry["dtype"]))
        return values.reshape(entry["shape"])
    step = from_bytes(planes[0], torch.float16)
    if entry["form"] == "8-bit":
        numbers = from_bytes(planes[1], torch.int8).reshape(-1, BLOCK)
        return Blocks(step, None, numbers).values().reshape(entry["shape"])
    codes = from_bytes(planes[2], torch.uint8).reshape(-1, BLOCK // 2)
    numbers = torch.stack([codes % 16, codes // 16], -1).flatten(1)
    offset = from_bytes(planes[1], torch.float16)
    return Blocks(step, offset, numbers).values().reshape(entry["shape"])


def find_blocks(values: Tensor, largest: int) -> Blocks | None:
    """Steps and numbers up to ``largest`` that give ``values`` (blocks, BLOCK) bit for bit; None if
    some block has none. With 15 there is an offset, with 127 the numbers have signs."""
    exact = values.double()
    has_offset = largest == 15
    low = exact.amin(1) if has_offset else torch.zeros(len(values), dtype=torch.float64)
    reach = exact.amax(1) - low if has_offset else exact.abs().amax(1)
    first = (reach / largest).half()
    found = Blocks(first.clone(), torch.zeros_like(first), torch.zeros(values.shape))
    waiting = torch.arange(len(values))
    for nudge in NUDGES:
        step = (first[waiting].view(torch.int16) + nudge).view(torch.half)
        relative = (exact[waiting] - low[waiting, None]) / step.double()[:, None]
        numbers = relative.nan_to_num(0.0, 0.0, 0.0).round().clamp(-largest, largest)
        offset = None
        if has_offset:
            offset = find_offsets(exact[waiting], step.double()[:, None] * numbers)
        tried = Blocks(step, offset, numbers)
        same = (tried.values().view(torch.int16) == values[waiting].view(torch.int16)).all(1)
        done = waiting[same]
        found.step[done] = step[same]
        found.numbers[done] = numbers[same].float()
        if offset is not None and found.offset is not None:
            found.offset[done] = offset[same]
        waiting = waiting[~same]
        if not len(waiting):
            return Blocks(found.step, found.offset if has_offset else None, found.numbers)
    return None


def find_offsets(exact: Tensor, products: Tensor) -> Tensor:
    """(blocks,) float16: what to add to ``products`` so that all round to the bfloat16 ``exact``,
    where there is such a number."""
    half_unit = torch.exp2(exact.abs().clamp_min(1e-38).log2().floor() - 8)
    low = (exact - half_unit - products).amax(1)
    high = (exact + half_unit - products).amin(1)
    return ((low + high) / 2).half()


def read_planes(archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    """What is stored of the tensor ``name``, in order."""
    names = set(archive.namelist())
    number = 0
    while f"tensors/{name}/{number}" in names:
        yield archive.read(f"tensors/{name}/{number}")
        number += 1


def to_bytes(tensor: Tensor) -> bytes:
    """The numbers of ``tensor`` as they lie in memory."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    """(numbers,) that :func:`to_bytes` wrote."""
    return torch.frombuffer(bytearray(data), dtype=dtype)


def digest(tensor: Tensor) -> str:
    """The sha256 of the numbers of ``tensor``."""
    return hashlib.sha256(to_bytes(tensor)).hexdigest()


if __name__ == "__main__":
    app()
