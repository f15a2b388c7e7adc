"""How a model's FFNs are found by its family's entry."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.experts import KernelExperts
from .registry import get_architecture
from .table import Architecture


@dataclass(frozen=True)
class StockFFN:
    """One FFN of a teacher.

    Calling it maps (..., hidden_size) to (..., hidden_size), without dropout on what it writes.
    """

    path: str
    """Under the base model, where the readout goes."""
    shape: Architecture
    """The table's entry, or the variant of it, that describes this FFN."""
    host: nn.Module
    """The module that holds its parts."""
    host_path: str
    """Of ``host``, under the base model."""
    number: int
    """Of its block among all blocks, which is how layers are counted."""
    expert: int | None = None
    """Its number among the experts in ``host``; None if the FFN is no expert."""

    @property
    def absorbed(self) -> tuple[str, ...]:
        """Paths of what the readout makes needless.

        These are the activation, the output projection and the hidden dropout of a split FFN.
        """
        if not self.shape.split:
            return ()
        names = (self.shape.act, self.shape.down, self.shape.hidden_dropout)
        return tuple(join_path(self.host_path, name) for name in names if name)

    @property
    def output_path(self) -> str:
        """Path of the module whose output is the FFN's."""
        return join_path(self.host_path, self.shape.down) if self.shape.split else self.host_path

    def norm(self, base: nn.Module) -> nn.Module | None:
        """Return the norm under ``base`` whose output is the FFN's input.

        None if the entry does not describe it.
        """
        if self.shape.ffn_norm is None:
            return None
        block_path = self.host_path.removesuffix(self.shape.ffn).rstrip(".")
        return base.get_submodule(join_path(block_path, self.shape.ffn_norm))

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the FFN writes for ``x`` (..., hidden_size)."""
        if self.expert is not None:
            return self._run_expert(x, self.expert)
        if not self.shape.split:
            return self.host(x)

        up = get_attribute_at(self.host, self.shape.up)
        act = get_attribute_at(self.host, str(self.shape.act))
        down = get_attribute_at(self.host, self.shape.down)
        return down(act(up(x)))

    def _run_expert(self, x: Tensor, expert: int) -> Tensor:
        """Return what ``expert`` writes for ``x``: every token is routed to it with weight 1."""
        tokens = x.flatten(0, -2)
        experts = torch.full((len(tokens), 1), expert, device=x.device)
        weights = torch.ones_like(experts, dtype=x.dtype)
        # forward(): a hook on the host may be what calls this.
        return self.host.forward(tokens, experts, weights).view(x.shape)


def find_stock_ffns(model: PreTrainedModel, architecture: Architecture) -> dict[str, StockFFN]:
    """Return every FFN of a stock ``model`` that the entry describes.

    Returns:
        the FFNs by their path under the base model, in layer order.

    Raises:
        InputError: the model has none of the entry's stacks of blocks, or a block in which a part
            is missing; it is named.
    """
    ffns: dict[str, StockFFN] = {}
    for number, (path, block) in enumerate(_list_blocks(model.base_model, architecture)):
        shape = _find_shape(block, architecture)
        if shape is None:
            raise InputError(
                f"found no {_find_missing_part(block, architecture)!r} in {path} of a "
                f"{type(model).__name__}, expected what the entry for "
                f"{architecture.model_type!r} describes: run hf-kernel-ffn families --explain on it"
            )
        for ffn in _list_ffns_in_block(block, path, shape, number):
            ffns[ffn.path] = ffn
    return ffns


def find_stock_ffn(model: PreTrainedModel, path: str) -> StockFFN:
    """Return the stock FFN at ``path`` of a stock ``model``, or of a converted one that kept it.

    Raises:
        InputError: there is none.
    """
    architecture = get_architecture(get_family_name(model))
    for number, (block_path, block) in enumerate(_list_blocks(model.base_model, architecture)):
        for shape in architecture.shapes():
            may_hold_it = path.startswith(join_path(block_path, shape.ffn))
            if not may_hold_it or _find_missing_part(block, shape) is not None:
                continue
            for ffn in _list_ffns_in_block(block, block_path, shape, number):
                if ffn.path == path:
                    return ffn
    raise InputError(
        f"found no FFN of a {architecture.model_type!r} at {path!r}: "
        "see hf-kernel-ffn families --explain"
    )


def get_family_name(model: PreTrainedModel) -> str:
    """Return the stock model_type of a stock or converted ``model``."""
    entry = getattr(model.config, "kernel_ffn", None)
    return model.config.model_type if entry is None else entry["family"]


def find_ffn_paths(model: PreTrainedModel, architecture: Architecture) -> list[str]:
    """Return the path of every FFN of a stock or converted ``model``, in layer order.

    Paths are those under the base model.
    """
    if getattr(model.config, "kernel_ffn", None) is None:
        return list(find_stock_ffns(model, architecture))

    converted = list(get_attribute_at(model.config, "kernel_ffn_layers")())
    paths: list[str] = []
    for block_path, block in _list_blocks(model.base_model, architecture):
        in_block = [path for path in converted if path.startswith(f"{block_path}.")]
        shape = None if in_block else _find_shape(block, architecture)
        if shape is not None:
            ffns = _list_ffns_in_block(block, block_path, shape, number=0)
            in_block = [ffn.path for ffn in ffns]
        paths += in_block
    return paths


def find_stacks(base: nn.Module, architecture: Architecture) -> list[str]:
    """Return the paths of the lists of blocks that ``base`` has."""
    return [path for stack in architecture.stacks for path in _expand_path(base, stack)]


def join_path(*names: str) -> str:
    """Join attribute names, empty ones left out, to one path."""
    return ".".join(name for name in names if name)


def get_attribute_at(owner: object, path: str) -> Any:
    """Return the attribute of ``owner`` at a dotted ``path``; AttributeError if there is none."""
    return reduce(getattr, path.split("."), owner) if path else owner


def parse_layers(layers: str, count: int) -> list[int]:
    """Return the layer numbers that ``layers``, such as ``"0-5,7"``, names, in order.

    Raises:
        InputError: it is malformed, or a number is outside 0 … count − 1.
    """
    numbers: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise InputError(f"found layers {layers!r}, expected numbers and ranges such as 0-5,7")

        first = int(match[1])
        last = int(match[2] or match[1])
        if first > last or last >= count:
            raise InputError(
                f"found layers {part.strip()!r}, expected numbers from 0 to {count - 1}: "
                f"the model has {count} layers"
            )
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def choose_layers(layers: str, ffns: Mapping[str, StockFFN]) -> list[int]:
    """Return the layer numbers that ``layers`` names, in order.

    Args:
        layers: numbers and ranges such as ``"0-5,7"``, or a pattern such as ``"text_model.*"``:
            then the layers with an FFN whose path matches.

    Raises:
        InputError: it is malformed or outside the model, or no path matches.
    """
    if "*" not in layers:
        count = len({ffn.number for ffn in ffns.values()})
        return parse_layers(layers, count)

    numbers = sorted({ffn.number for path, ffn in ffns.items() if fnmatchcase(path, layers)})
    if not numbers:
        raise InputError(
            f"found layers {layers!r}, expected a pattern that some FFN's path matches, "
            f"such as {next(iter(ffns))}"
        )
    return numbers


def _list_blocks(base: nn.Module, architecture: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and block of every stack that is there; InputError if there is none."""
    count = 0
    for path in find_stacks(base, architecture):
        for name, block in base.get_submodule(path).named_children():
            count += 1
            yield f"{path}.{name}", block
    if not count:
        raise InputError(
            f"found no blocks at {' or '.join(architecture.stacks)} in a {type(base).__name__}, "
            f"expected those of a {architecture.model_type!r}: "
            "run hf-kernel-ffn families --explain on it"
        )


def _find_shape(block: nn.Module, architecture: Architecture) -> Architecture | None:
    """Return the first of the entry and its variants of which ``block`` has every part, or None."""
    for shape in architecture.shapes():
        if _find_missing_part(block, shape) is None:
            return shape
    return None


def _find_missing_part(block: nn.Module, shape: Architecture) -> str | None:
    """Return the first part of an FFN of ``shape`` that ``block`` lacks, or None."""
    parts = (shape.up, shape.gate, shape.down, shape.act)
    for name in (shape.ffn, *(join_path(shape.ffn, part) for part in parts if part)):
        try:
            attribute = get_attribute_at(block, name)
        except AttributeError:
            return name
        if isinstance(attribute, KernelExperts):
            return name
    return None


def _list_ffns_in_block(
    block: nn.Module, block_path: str, shape: Architecture, number: int
) -> list[StockFFN]:
    """Return the FFNs of a block: one, or one for each expert."""
    host = get_attribute_at(block, shape.ffn)
    host_path = join_path(block_path, shape.ffn)
    if shape.experts:
        return [
            StockFFN(
                path=f"{host_path}.{expert}",
                shape=shape,
                host=host,
                host_path=host_path,
                number=number,
                expert=expert,
            )
            for expert in range(len(get_attribute_at(host, shape.down)))
        ]
    path = join_path(host_path, shape.up) if shape.split else host_path
    return [StockFFN(path=path, shape=shape, host=host, host_path=host_path, number=number)]


def _expand_path(base: nn.Module, path: str) -> list[str]:
    """Return every path under ``base`` that matches ``path``, in which * is any child."""
    paths = [""]
    for name in path.split("."):
        longer: list[str] = []
        for parent in paths:
            children = [child for child, _ in base.get_submodule(parent).named_children()]
            longer += [join_path(parent, child) for child in children if name in ("*", child)]
        paths = longer
    return paths
