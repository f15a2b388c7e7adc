"""What looks like an FFN in a model, found by shapes alone, against what the table of architectures describes."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint_code.errors import InputError
from .lookup import StockFFN, find_stock_ffns
from .registry import get_architecture, get_architecture_of_model
from .weights import read_stock_weights

ATTENTION = re.compile(r"att(entio)?n|mixer|conv|pool|embed|head|router|rel_pos", re.IGNORECASE)
"""Names of modules whose projections are no FFN's."""


class Candidate(NamedTuple):
    """Two projections or more that lead from a width to another and back."""

    path: str
    """Under the base model, of the smallest module that holds all of them."""
    up: tuple[str, ...]
    """Paths of what leads there."""
    down: str
    """Path of what leads back."""
    sizes: tuple[int, int]
    """The outer width, and the inner one."""


def candidates(base: nn.Module) -> list[Candidate]:
    """Whatever looks like an FFN in the blocks of ``base``: one per projection back to the width of the residual stream."""
    found = []
    for path, block in _outer_blocks(base):
        projections = {
            name: size for name, size in _projections(block) if not ATTENTION.search(name)
        }
        streams = _stream_widths(base, block)
        for down, (inner, outer) in projections.items():
            if outer not in streams:
                continue
            ups = [
                up
                for up, (a, b) in projections.items()
                if a == outer != inner and b in (inner, 2 * inner) and up != down
            ]
            if not ups:
                continue
            near = max(_common(up, down) for up in ups)
            ups = [up for up in ups if _common(up, down) == near]
            place = ".".join(down.split(".")[:near])
            whole = tuple(f"{path}.{up}" for up in ups)
            found.append(
                Candidate(f"{path}.{place}".rstrip("."), whole, f"{path}.{down}", (outer, inner))
            )
    return found


def _outer_blocks(base: nn.Module) -> list[tuple[str, nn.Module]]:
    """The members of every list of modules that is not inside another's member."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            path.startswith(f"{outer}.") for outer, _ in found
        ):
            found += [(f"{path}.{name}", block) for name, block in module.named_children()]
    return found


def _projections(block: nn.Module) -> list[tuple[str, tuple[int, int]]]:
    """(in, out) of every projection, by its path in ``block``, tensors of stacked experts among them."""
    found = []
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, Conv1D) and isinstance(weight, Tensor):
            found.append((name, (weight.shape[0], weight.shape[1])))
        elif isinstance(weight, Tensor) and weight.ndim == 2 and isinstance(module, nn.Linear):
            found.append((name, (weight.shape[1], weight.shape[0])))
        for part, tensor in module.named_parameters(recurse=False):
            if tensor.ndim == 3 and "weight" not in part:
                found.append((f"{name}.{part}".lstrip("."), (tensor.shape[2], tensor.shape[1])))
    return found


def _stream_widths(base: Any, block: nn.Module) -> set[int]:
    """What may be the width of the residual stream in ``block``: that of its norms, or what the config says."""
    norms = [
        module
        for name, module in block.named_modules()
        if re.search(r"norm|ln_", name, re.I) and not ATTENTION.search(name)
    ]
    sizes = {
        norm.weight.numel() for norm in norms if isinstance(getattr(norm, "weight", None), Tensor)
    }
    return sizes or {base.config.hidden_size}


def _common(one: str, other: str) -> int:
    """How many names two paths begin with in common."""
    count = 0
    for a, b in zip(one.split(".")[:-1], other.split(".")[:-1]):
        if a != b:
            break
        count += 1
    return count


def find_undescribed_ffns(base: nn.Module, ffns: dict[str, StockFFN]) -> list[Candidate]:
    """The candidates that none of ``ffns`` covers."""
    covered = {f"{ffn.host_path}.{ffn.shape.down}".lstrip(".") for ffn in ffns.values()}
    return [found for found in candidates(base) if found.down not in covered]


def refuse_undescribed_ffns(model: Any, ffns: dict[str, StockFFN]) -> None:
    """InputError if ``model`` has something like an FFN that is none of ``ffns``."""
    others = find_undescribed_ffns(model.base_model, ffns)
    if others:
        raise InputError(
            f"found {len(others)} FFNs that the entry for {model.config.model_type!r} does not describe, the first {others[0].path}, "
            "expected none: describe them, or name the layers to convert"
        )


def explain_ffns(model: Any) -> list[dict[str, str]]:
    """One row for each FFN of a stock ``model`` (its weights may be on the meta device): ``path``, ``sizes``, ``activation``, and
    ``entry``, the table's entry and the names by which it matches, or what no entry describes.

    Raises:
        InputError: nothing in the model looks like an FFN.
    """
    rows: list[dict[str, str]] = []
    try:
        get_architecture(model.config.model_type)
        ffns, failed = find_stock_ffns(model, get_architecture_of_model(model)), ""
    except InputError as error:
        ffns, failed = {}, str(error)
    for path, ffn in ffns.items():
        shape, weights = ffn.shape, read_stock_weights(model, ffn)
        roles = {
            "W_in": shape.up,
            "gate": shape.gate
            or (f"half {shape.gate_half}" if shape.gate_half is not None else None),
        }
        described = ", ".join(
            f"{role} {name}" for role, name in {**roles, "W_out": shape.down}.items() if name
        )
        rows.append(
            {
                "path": path,
                "sizes": f"{weights.up.shape[1]} → {weights.up.shape[0]}",
                "activation": type(weights.activation).__name__,
                "entry": f"{shape.model_type}: {described}",
            }
        )
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in find_undescribed_ffns(model.base_model, ffns):
        groups[candidate.path].append(candidate)
    for path, some in groups.items():
        outer, inner = some[0].sizes
        parts = ", ".join(name for found in some for name in (*found.up, found.down))
        rows.append(
            {
                "path": path,
                "sizes": f"{outer} → {inner}",
                "activation": "?",
                "entry": failed or f"no entry for {parts}",
            }
        )
    if not rows:
        raise InputError(
            failed
            or f"found nothing like an FFN in a {type(model).__name__}, expected blocks that have one"
        )
    return rows
