"""What looks like an FFN in a model, found by shapes alone, beside what the table describes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint_code.errors import InputError
from .lookup import StockFFN, find_stock_ffns, get_attribute_at, join_path
from .registry import get_architecture, get_architecture_of_model
from .table import Architecture
from .weights import read_stock_weights

NOT_AN_FFN = re.compile(r"att(entio)?n|mixer|conv|pool|embed|head|router|rel_pos", re.IGNORECASE)
"""Names of modules whose projections are no FFN's."""
NORM = re.compile(r"norm|ln_", re.IGNORECASE)
"""Names of norms."""


class Candidate(NamedTuple):
    """What looks like an FFN: projections from one width to another, and one back."""

    path: str
    """Under the base model, of the smallest module that holds all of them."""
    up: tuple[str, ...]
    """Paths of the projections to the inner width: one, or two if there is a gate."""
    down: str
    """Path of the projection back."""
    sizes: tuple[int, int]
    """The outer width, and the inner one."""


class _Projection(NamedTuple):
    """A weight matrix in a block."""

    input_size: int
    output_size: int


def find_candidates(base: nn.Module) -> list[Candidate]:
    """Return what looks like an FFN in the blocks of ``base``.

    There is one candidate for every projection back to the width of the residual stream.
    """
    return [
        candidate
        for path, block in _list_outer_blocks(base)
        for candidate in _find_candidates_in_block(base, block, path)
    ]


def find_undescribed_ffns(base: nn.Module, ffns: Mapping[str, StockFFN]) -> list[Candidate]:
    """Return the candidates that none of ``ffns`` covers."""
    covered = {join_path(ffn.host_path, ffn.shape.down) for ffn in ffns.values()}
    return [candidate for candidate in find_candidates(base) if candidate.down not in covered]


def refuse_undescribed_ffns(model: PreTrainedModel, ffns: Mapping[str, StockFFN]) -> None:
    """Check that all of ``model`` that looks like an FFN is one of ``ffns``.

    Raises:
        InputError: something is not; the first is named.
    """
    undescribed = find_undescribed_ffns(model.base_model, ffns)
    if undescribed:
        raise InputError(
            f"found {len(undescribed)} FFNs that the entry for {model.config.model_type!r} "
            f"does not describe, the first {undescribed[0].path}, "
            "expected none: describe them, or name the layers to convert"
        )


def explain_ffns(model: PreTrainedModel) -> list[dict[str, str]]:
    """Describe every FFN of a stock ``model``, whose weights may be on the meta device.

    Returns:
        one row for each FFN: ``path``, ``sizes``, ``activation``, and ``entry``: the table's entry
        and the names by which it matches, or what no entry describes.

    Raises:
        InputError: nothing in the model looks like an FFN.
    """
    ffns: dict[str, StockFFN] = {}
    reason = ""
    try:
        get_architecture(model.config.model_type)
        ffns = find_stock_ffns(model, get_architecture_of_model(model))
    except InputError as error:
        reason = str(error)

    rows = [_describe_ffn(model, ffn) for ffn in ffns.values()]

    candidates_by_path: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in find_undescribed_ffns(model.base_model, ffns):
        candidates_by_path[candidate.path].append(candidate)
    for path, candidates in candidates_by_path.items():
        rows.append(_describe_candidates(path, candidates, reason))

    if not rows:
        raise InputError(
            reason
            or f"found nothing like an FFN in a {type(model).__name__}, "
            "expected blocks that have one"
        )
    return rows


def _find_candidates_in_block(base: nn.Module, block: nn.Module, path: str) -> list[Candidate]:
    """Return the candidates in ``block``, which is at ``path`` under ``base``."""
    projections = {
        name: projection
        for name, projection in _list_projections(block)
        if not NOT_AN_FFN.search(name)
    }
    stream_widths = _get_stream_widths(base, block)

    candidates = []
    for name, projection in projections.items():
        if projection.output_size not in stream_widths:
            continue
        ups = _find_ups(projections, name)
        if not ups:
            continue
        depth = _count_common_names(ups[0], name)
        host = ".".join(name.split(".")[:depth])
        candidates.append(
            Candidate(
                path=join_path(path, host),
                up=tuple(join_path(path, up) for up in ups),
                down=join_path(path, name),
                sizes=(projection.output_size, projection.input_size),
            )
        )
    return candidates


def _find_ups(projections: Mapping[str, _Projection], down: str) -> list[str]:
    """Return the names of the projections from which ``down`` leads back.

    Of several that fit by their sizes, those that share the most modules with ``down``.
    """
    inner, outer = projections[down]
    fitting = [
        name
        for name, up in projections.items()
        if name != down
        and up.input_size == outer != inner
        and up.output_size in (inner, 2 * inner)  # twice where it stacks gate and up
    ]
    nearest = max((_count_common_names(name, down) for name in fitting), default=0)
    return [name for name in fitting if _count_common_names(name, down) == nearest]


def _list_outer_blocks(base: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the members, by path, of every list of modules that lies inside no other's member."""
    blocks: list[tuple[str, nn.Module]] = []
    for path, module in base.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        if any(path.startswith(f"{outer}.") for outer, _ in blocks):
            continue
        blocks += [(f"{path}.{name}", block) for name, block in module.named_children()]
    return blocks


def _list_projections(block: nn.Module) -> list[tuple[str, _Projection]]:
    """Return every projection by its path in ``block``, tensors of stacked experts among them."""
    projections = []
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, Conv1D) and isinstance(weight, Tensor):
            projections.append((name, _Projection(weight.shape[0], weight.shape[1])))
        elif isinstance(module, nn.Linear) and isinstance(weight, Tensor) and weight.ndim == 2:
            projections.append((name, _Projection(weight.shape[1], weight.shape[0])))

        for leaf, tensor in module.named_parameters(recurse=False):
            if tensor.ndim == 3 and "weight" not in leaf:
                projection = _Projection(tensor.shape[2], tensor.shape[1])
                projections.append((join_path(name, leaf), projection))
    return projections


def _get_stream_widths(base: nn.Module, block: nn.Module) -> set[int]:
    """Return what may be the width of the residual stream in ``block``: that of its norms.

    Where it has none the config says it.
    """
    weights = [
        getattr(module, "weight", None)
        for name, module in block.named_modules()
        if NORM.search(name) and not NOT_AN_FFN.search(name)
    ]
    widths = {weight.numel() for weight in weights if isinstance(weight, Tensor)}
    return widths or {get_attribute_at(base, "config.hidden_size")}


def _count_common_names(one: str, other: str) -> int:
    """Return how many modules two paths of projections begin with in common."""
    count = 0
    for name, other_name in zip(one.split(".")[:-1], other.split(".")[:-1], strict=False):
        if name != other_name:
            break
        count += 1
    return count


def _describe_ffn(model: PreTrainedModel, ffn: StockFFN) -> dict[str, str]:
    """Return the row of an FFN that an entry describes."""
    weights = read_stock_weights(model, ffn)
    inner, outer = weights.up.shape
    return {
        "path": ffn.path,
        "sizes": f"{outer} → {inner}",
        "activation": type(weights.activation).__name__,
        "entry": f"{ffn.shape.model_type}: {_describe_roles(ffn.shape)}",
    }


def _describe_roles(shape: Architecture) -> str:
    """Return the names of the parts of an FFN, each with the matrix that it holds."""
    roles = {"W_in": shape.up, "gate": shape.gate, "W_out": shape.down}
    if shape.gate_half is not None:
        roles["gate"] = f"half {shape.gate_half}"
    return ", ".join(f"{role} {name}" for role, name in roles.items() if name)


def _describe_candidates(path: str, candidates: list[Candidate], reason: str) -> dict[str, str]:
    """Return the row of what looks like an FFN at ``path``; ``reason``: why no entry was tried."""
    outer, inner = candidates[0].sizes
    names = [name for candidate in candidates for name in (*candidate.up, candidate.down)]
    return {
        "path": path,
        "sizes": f"{outer} → {inner}",
        "activation": "?",
        "entry": reason or f"no entry for {', '.join(names)}",
    }
