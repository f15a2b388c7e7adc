"""How a model's FFNs are found by its family's entry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.experts import KernelExperts
from .registry import get_architecture
from .table import Architecture


@dataclass(frozen=True)
class StockFFN:
    """One FFN of a teacher: calling it maps (..., hidden_size) to (..., hidden_size), without dropout on what it writes."""

    path: str
    """Under the base model, where the readout goes."""
    shape: Architecture
    """The table's entry, or the variant of it, that describes this FFN."""
    host: nn.Module
    """The module that holds its parts."""
    host_path: str
    number: int
    """Of its block among all blocks, which is how layers are counted."""
    expert: int | None = None

    @property
    def absorbed(self) -> tuple[str, ...]:
        """Paths of what the readout makes needless: activation and output projection of a split FFN, and its hidden dropout."""
        if not self.shape.split:
            return ()
        return tuple(
            join_path(self.host_path, name)
            for name in (self.shape.act, self.shape.down, self.shape.hidden_dropout)
            if name
        )

    @property
    def output_path(self) -> str:
        """Path of the module whose output is the FFN's."""
        return join_path(self.host_path, self.shape.down) if self.shape.split else self.host_path

    def norm(self, base: nn.Module) -> nn.Module | None:
        """Under the base model ``base``, the norm whose output is its input; None if the entry does not describe it."""
        if self.shape.ffn_norm is None:
            return None
        return base.get_submodule(
            join_path(self.host_path.removesuffix(self.shape.ffn).rstrip("."), self.shape.ffn_norm)
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self.expert is not None:  # forward(): a hook on the host may be what calls this
            flat = x.flatten(0, -2)
            chosen = torch.full((len(flat), 1), self.expert, device=x.device)
            return self.host.forward(flat, chosen, torch.ones_like(chosen, dtype=x.dtype)).view(
                x.shape
            )
        if not self.shape.split:
            return self.host(x)
        up, act, down = (
            get_attribute_at(self.host, str(name))
            for name in (self.shape.up, self.shape.act, self.shape.down)
        )
        return down(act(up(x)))


def find_stock_ffns(model: Any, architecture: Architecture) -> dict[str, StockFFN]:
    """Every FFN of a stock ``model`` that the entry describes, by path under the base model, in layer order.

    Raises:
        InputError: the model has none of the entry's stacks of blocks, or a block in which a part is missing; it is named.
    """
    found: dict[str, StockFFN] = {}
    for number, (path, block) in enumerate(_blocks(model.base_model, architecture)):
        missing = []
        for shape in architecture.shapes():
            missing.append(_missing(block, shape))
            if missing[-1] is None:
                host, host_path = get_attribute_at(block, shape.ffn), join_path(path, shape.ffn)
                found.update((ffn.path, ffn) for ffn in _ffns(shape, host, host_path, number))
                break
        else:
            raise InputError(
                f"found no {missing[0]!r} in {path} of a {type(model).__name__}, expected what the entry for "
                f"{architecture.model_type!r} describes: run hf-kernel-ffn families --explain on it"
            )
    return found


def find_stock_ffn(model: Any, path: str) -> StockFFN:
    """The FFN at ``path`` of a stock ``model``, or one that a converted model has left as it was."""
    architecture = get_architecture(get_family_name(model))
    for number, (block_path, block) in enumerate(_blocks(model.base_model, architecture)):
        for shape in architecture.shapes():
            host_path = join_path(block_path, shape.ffn)
            if path.startswith(host_path) and _missing(block, shape) is None:
                for ffn in _ffns(shape, get_attribute_at(block, shape.ffn), host_path, number):
                    if ffn.path == path:
                        return ffn
    raise InputError(
        f"found no FFN of a {architecture.model_type!r} at {path!r}: see hf-kernel-ffn families --explain"
    )


def get_family_name(model: Any) -> str:
    """The stock model_type of a stock or converted ``model``."""
    entry = getattr(model.config, "kernel_ffn", None)
    return model.config.model_type if entry is None else entry["family"]


def find_ffn_paths(model: Any, architecture: Architecture) -> list[str]:
    """Path of every FFN under the base model of a stock or converted ``model``, in layer order."""
    converted = getattr(model.config, "kernel_ffn", None)
    if converted is None:
        return list(find_stock_ffns(model, architecture))
    paths: list[str] = []
    for path, block in _blocks(model.base_model, architecture):
        here = [name for name in model.config.kernel_ffn_layers() if name.startswith(f"{path}.")]
        for shape in () if here else architecture.shapes():
            if _missing(block, shape) is None:
                here = [
                    ffn.path
                    for ffn in _ffns(
                        shape, get_attribute_at(block, shape.ffn), join_path(path, shape.ffn), 0
                    )
                ]
                break
        paths += here
    return paths


def _ffns(shape: Architecture, host: Any, host_path: str, number: int) -> Iterator[StockFFN]:
    if shape.experts:
        for expert in range(len(get_attribute_at(host, shape.down))):
            yield StockFFN(f"{host_path}.{expert}", shape, host, host_path, number, expert)
    else:
        yield StockFFN(
            join_path(host_path, shape.up) if shape.split else host_path,
            shape,
            host,
            host_path,
            number,
        )


def _blocks(base: nn.Module, architecture: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of every stack that is there, by path."""
    count = 0
    for path in find_stacks(base, architecture):
        for name, block in base.get_submodule(path).named_children():
            count += 1
            yield f"{path}.{name}", block
    if not count:
        raise InputError(
            f"found no blocks at {' or '.join(architecture.stacks)} in a {type(base).__name__}, expected those of a "
            f"{architecture.model_type!r}: run hf-kernel-ffn families --explain on it"
        )


def find_stacks(base: nn.Module, architecture: Architecture) -> list[str]:
    """Paths of the lists of blocks that ``base`` has."""
    return [path for stack in architecture.stacks for path in _expand(base, stack)]


def _expand(base: nn.Module, path: str) -> list[str]:
    """``path`` with * standing for every child, as far as it exists."""
    paths = [""]
    for name in path.split("."):
        step: list[str] = []
        for above in paths:
            children = [child for child, _ in base.get_submodule(above).named_children()]
            step += [join_path(above, child) for child in children if name in ("*", child)]
        paths = step
    return paths


def _missing(block: nn.Module, shape: Architecture) -> str | None:
    """The first part of ``shape`` that ``block`` lacks."""
    for name in (
        shape.ffn,
        *(
            join_path(shape.ffn, part)
            for part in (shape.up, shape.gate, shape.down, shape.act)
            if part
        ),
    ):
        try:
            part = get_attribute_at(block, name)
        except AttributeError:
            return name
        if isinstance(part, KernelExperts):
            return name
    return None


def join_path(*names: str) -> str:
    """Attribute names, or empty ones, as one path."""
    return ".".join(name for name in names if name)


def get_attribute_at(owner: Any, path: str) -> Any:
    """The attribute of ``owner`` at a dotted ``path``; AttributeError if there is none."""
    return reduce(getattr, path.split("."), owner) if path else owner


def parse_layers(layers: str, count: int) -> list[int]:
    """``"0-5,7"`` as a list of layer numbers; InputError if it is malformed or outside 0 … count − 1."""
    chosen: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise InputError(f"found layers {layers!r}, expected numbers and ranges such as 0-5,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise InputError(
                f"found layers {part.strip()!r}, expected numbers from 0 to {count - 1}: the model has {count} layers"
            )
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def choose_layers(layers: str, ffns: dict[str, StockFFN]) -> list[int]:
    """Layer numbers: ``"0-5,7"``, or those with an FFN whose path matches a pattern such as ``"text_model.*"``."""
    numbers = sorted({ffn.number for ffn in ffns.values()})
    if "*" not in layers:
        return parse_layers(layers, len(numbers))
    chosen = sorted({ffn.number for path, ffn in ffns.items() if fnmatchcase(path, layers)})
    if not chosen:
        raise InputError(
            f"found layers {layers!r}, expected a pattern that some FFN's path matches, such as {next(iter(ffns))}"
        )
    return chosen
