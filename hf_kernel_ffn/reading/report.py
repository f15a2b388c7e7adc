"""One prompt as one self-contained HTML page.

It shows what every FFN wrote at every token, next to its attention and its teacher.
:func:`report_data` turns traces into plain numbers, :func:`write_report` puts them into the page
(``report.html``).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.linears import get_effective_weight
from ..checkpoint_code.record import Readout
from ..evaluation.spike_units import list_spike_units
from ..storage.files import write_text
from .decompositions import alternatives as alternative_shares
from .model_parts import get_layer_number, is_kernel_ffn
from .naming import written
from .picture import make_picture
from .regimes import Mixture, mixtures, regime
from .tracing import Trace

Namer = Callable[[str, list[int], Tensor], list[list[str]]]
"""(path of the FFN, N rows of its dictionary by number, those rows (N, hidden_size)) -> the tokens
that each row promotes."""
PICTURED = 48_000
"""Prototypes, over all layers, that get into the pictures: 37 bytes each, the rest of the page
fits beside them in 5 MB."""
NO_MASS = -1e9
"""Stands for a log-mass of −∞: JSON has no infinity."""
USED = 1e-9
"""A share below this is not written into the page."""
TEMPLATE = Path(__file__).with_name("report.html")


@torch.no_grad()
def report_data(
    student: Trace,
    teacher: Trace | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    top: int = 48,
    alternatives: Mapping[str, Tensor] | None = None,
    namer: Namer | None = None,
) -> dict:
    """Put together what the page of a prompt shows, as JSON types.

    Args:
        student: the trace to read, of a stock or a converted model.
        teacher: another model's trace of the same tokens and positions, to stand beside it.
        tokenizer: names the tokens that a prototype promotes by the logit lens, if there is no
            ``namer``.
        top: coefficients kept per layer and token, by |c|‖v‖; of the others, number and mass.
        alternatives: by an FFN's path, (count, prototypes) shares that all give the output of the
            last position kept, row 0 the layer's own.
        namer: batched, to be quick over a large vocabulary; see :data:`Namer`.

    Raises:
        InputError: the traces are of different tokens, positions or layers, or alternatives do not
            fit a layer.
    """
    alternatives = alternatives or {}
    _require_same_prompt(student, teacher)
    unknown = sorted(set(alternatives) - set(student.ffn_inputs))
    if unknown:
        raise InputError(
            f"found alternatives for {unknown[0]!r}, expected paths among "
            f"{', '.join(student.ffn_inputs)}"
        )
    layers = _describe_layers(student, alternatives, top)
    shown_anyway = {
        layer["path"]: layer["alternatives"]["order"] for layer in layers if layer["alternatives"]
    }
    vocabulary: dict[str, int] = {}

    def describe(trace: Trace, shown: Mapping[str, list[int]]) -> dict:
        chosen_namer = namer or logit_lens(trace.model, tokenizer)
        return _describe_model(
            trace, top=top, namer=chosen_namer, vocabulary=vocabulary, shown_anyway=shown
        )

    return {
        "tokens": student.tokens,
        "positions": student.positions,
        "layers": layers,
        "student": describe(student, shown_anyway),
        "teacher": None if teacher is None else describe(teacher, {}),
        "vocabulary": list(vocabulary),
    }


def other_mixtures(trace: Trace, count: int, seed: int = 0) -> dict[str, Tensor]:
    """For :func:`report_data`: up to ``count`` other mixtures of the last kept position's output.

    By the path of every layer that has shares and any other mixture.
    """
    by_path: dict[str, Tensor] = {}
    if not count:
        return by_path
    for path in trace.ffn_inputs:
        record = trace.ffn(path)
        if regime(record).has_shares and (record.coefficients[-1] > 0).any():
            rows = alternative_shares(record, -1, count + 1, seed=seed)
            if len(rows) > 1:
                by_path[path] = rows
    return by_path


def write_report(file: str | Path, data: dict) -> None:
    """Write the page of ``data`` (from :func:`report_data`) to ``file``, whole or not at all.

    The page needs no network.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # "<" could end the script element or open a comment in it; in JSON it stands in strings only.
    text = text.replace("<", "\\u003c")
    write_text(file, TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text, 1))


def logit_lens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, count: int = 4
) -> Namer:
    """Make a namer by the ``count`` tokens that a dictionary row promotes most.

    Without a ``tokenizer`` it names nothing.
    """

    def name_rows(path: str, indices: list[int], rows: Tensor) -> list[list[str]]:
        if tokenizer is None:
            return [[] for _ in indices]
        return [
            [token for token, _ in write.promoted]
            for write in written(model, tokenizer, rows, count)
        ]

    return name_rows


def _require_same_prompt(student: Trace, teacher: Trace | None) -> None:
    """InputError unless both traces can stand side by side."""
    if teacher is None:
        return
    is_same = (
        torch.equal(student.ids.cpu(), teacher.ids.cpu())
        and student.positions == teacher.positions
        and len(student.ffn_inputs) == len(teacher.ffn_inputs)
    )
    if not is_same:
        raise InputError(
            "found a teacher's trace of other tokens, positions or layers than the student's, "
            "expected the same: trace both over one prompt"
        )


def _describe_layers(student: Trace, alternatives: Mapping[str, Tensor], top: int) -> list[dict]:
    """Per layer what is shown once: attention, picture, and other decompositions."""
    room = PICTURED
    layers = []
    for number, (path, inputs) in enumerate(student.ffn_inputs.items()):
        record = student.ffn(path)
        ffn = student.model.base_model.get_submodule(path)
        picture = make_picture(ffn, inputs, record, room)
        if "output" in picture:
            room -= len(record.dictionary)
        others = None
        if path in alternatives:
            others = _describe_alternatives(path, record, alternatives[path], top)
        attention = _encode_attention(student.attention[number], student.positions)
        layers.append(
            {"path": path, "attention": attention, "picture": picture, "alternatives": others}
        )
    return layers


def _describe_model(
    trace: Trace,
    *,
    top: int,
    namer: Namer,
    vocabulary: dict[str, int],
    shown_anyway: Mapping[str, list[int]],
) -> dict:
    """One model: its layers' regimes, cells and prototypes by name.

    Args:
        vocabulary: numbers of the tokens that are named, added to.
        shown_anyway: by path, prototypes that are named though no cell has them.
    """
    layers = []
    for path, inputs in trace.ffn_inputs.items():
        record = trace.ffn(path)
        layer_regime = regime(record)
        dictionary = record.dictionary.double()
        cells = _describe_cells(record, top, layer_regime.has_shares)
        ffn = trace.model.base_model.get_submodule(path)
        for cell, support in zip(cells, _measure_support(ffn, inputs), strict=True):
            cell["support"] = support
        for place, units in list_spike_units(record).items():
            cells[place]["spike"] = [[unit, _shorten(share, 3)] for unit, share in units]

        shown = set(shown_anyway.get(path, ()))
        shown.update(prototype for cell in cells for prototype in cell["i"])
        indices = sorted(shown)
        promoted = namer(path, indices, dictionary[indices]) if indices else []
        prototypes = {
            index: [
                record.names[index],
                [vocabulary.setdefault(token, len(vocabulary)) for token in tokens],
            ]
            for index, tokens in zip(indices, promoted, strict=True)
        }
        layers.append(
            {
                "layer": get_layer_number(path),
                "path": path,
                "regime": layer_regime.name,
                "shares": layer_regime.has_shares,
                "size": len(dictionary),
                "cells": cells,
                "prototypes": prototypes,
            }
        )
    return {"model": _name_model(trace.model), "layers": layers}


def _name_model(model: PreTrainedModel) -> str:
    """The folder or repository that ``model`` came from, and its class."""
    kind = type(model).__name__
    name = getattr(model.config, "_name_or_path", "") or ""
    return f"{Path(name).name} ({kind})" if name else kind


def _describe_cells(record: Readout, top: int, has_shares: bool) -> list[dict]:
    """Per token the largest coefficients, what is left, and what the mixture is like."""
    coefficients = record.coefficients.double()
    dictionary = record.dictionary.double()
    mass = coefficients.abs() * dictionary.norm(dim=-1)
    direction = nn.functional.normalize(coefficients @ dictionary, dim=-1)
    along = coefficients * (direction @ dictionary.T)
    order = mass.argsort(dim=-1, descending=True, stable=True)[:, :top]

    cells = []
    for row, mixture in enumerate(mixtures(record)):
        kept = [index for index in order[row].tolist() if coefficients[row, index] != 0]
        cell = _describe_cell(coefficients[row], along[row], mass[row], kept=kept, mixture=mixture)
        if not has_shares:
            cell["restAlong"] = _shorten((along[row].sum() - along[row, kept].sum()).item())
        cells.append(cell)
    return cells


def _describe_cell(
    coefficients: Tensor, along: Tensor, mass: Tensor, *, kept: list[int], mixture: Mixture
) -> dict:
    """One token of a layer: (P,) coefficients, contributions along the output, and masses."""
    rest = (mass.sum() - mass[kept].sum()).clamp_min(0).item()
    return {
        "i": kept,
        "c": [_shorten(number) for number in coefficients[kept].tolist()],
        "a": [_shorten(number, 3) for number in along[kept].tolist()],
        "sum": _shorten(coefficients.sum().item(), 6),
        "rest": [mixture.active - len(kept), _shorten(rest)],
        "active": mixture.active,
        "intensity": _shorten(mixture.intensity),
        "entropy": _shorten(mixture.entropy),
        "written": _shorten(mixture.written),
        "coherence": _shorten(mixture.coherence),
        "effective": _shorten(mixture.effective),
        "diagnosis": mixture.diagnosis,
    }


def _measure_support(ffn: nn.Module, inputs: Tensor) -> list[list[float] | None]:
    """Per token log Σκ and minus the distance to the nearest input prototype.

    None from an FFN without a kernel.
    """
    if not is_kernel_ffn(ffn):
        return [None] * len(inputs)
    score, distance2 = ffn.scores(inputs)
    log_kernel = ffn.kernel.log(score, distance2, **ffn.kernel_parameters())
    log_mass = log_kernel.double().logsumexp(-1)
    rows = get_effective_weight(ffn.input_prototypes, inputs)[0].double()
    nearest = -torch.cdist(inputs.double(), rows).min(-1).values
    return [
        [_shorten(mass) if math.isfinite(mass) else NO_MASS, _shorten(distance)]
        for mass, distance in zip(log_mass.tolist(), nearest.tolist(), strict=True)
    ]


def _describe_alternatives(path: str, record: Readout, rows: Tensor, top: int) -> dict:
    """Sparse shares of each decomposition, and how far from one another their outputs are."""
    if rows.ndim != 2 or rows.shape[1] != len(record.dictionary) or (rows < 0).any():
        raise InputError(
            f"found alternatives of shape {tuple(rows.shape)} for {path}, expected nonnegative "
            f"shares (count, {len(record.dictionary)}): take them from decompositions of this layer"
        )
    rows = rows.double().cpu()
    outputs = rows @ record.dictionary.double().cpu()
    sparse = []
    for row in rows:
        used = (row > USED).nonzero().flatten().tolist()
        sparse.append([used, [_shorten(share, 8) for share in row[used].tolist()]])

    furthest = (outputs - outputs[0]).norm(dim=-1).max()
    spread = furthest / outputs[0].norm().clamp_min(1e-300)
    order = rows.mean(0).argsort(descending=True)[:top].tolist()
    return {
        "rows": sparse,
        "order": [index for index in order if rows[:, index].any()],
        "spread": _shorten(spread.item(), 2),
    }


def _encode_attention(weights: Tensor, positions: list[int]) -> dict:
    """Heads' weights (heads, P, T) over the positions kept, as bytes 255·√weight in base64.

    Row i has the first i + 1 positions and then all other tokens together. The root keeps the
    digits of small weights.
    """
    all_weights = weights.double().cpu()
    kept = all_weights[:, :, positions]
    others = (all_weights.sum(-1) - kept.sum(-1)).clamp_min(0)
    rows = [torch.cat([kept[:, i, : i + 1], others[:, i, None]], 1) for i in range(len(positions))]
    packed = (torch.cat(rows, 1).clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    return {"heads": len(weights), "weights": base64.b64encode(packed.numpy().tobytes()).decode()}


def _shorten(number: float, digits: int = 4) -> float:
    """``number`` to so many significant digits."""
    return float(f"{number:.{digits}g}")
