"""One prompt as one self-contained HTML page.

It shows what every FFN wrote at every token, next to its attention and its teacher.
:func:`report_data` turns traces into plain numbers, :func:`write_report` puts them into the page
(``report.html``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from ..evaluation.spike_units import list_spike_units
from .decompositions import alternatives as alternative_shares
from .model_parts import get_layer_number
from .naming import written
from .pages import fill_page, shorten
from .picture import make_picture
from .regimes import regime
from .report_layer import (
    describe_alternatives,
    describe_cells,
    encode_attention,
    measure_support,
)
from .tracing import Trace

Namer = Callable[[str, list[int], Tensor], list[list[str]]]
"""(path of the FFN, N rows of its dictionary by number, those rows (N, hidden_size)) -> the tokens
that each row promotes."""
PICTURED = 48_000
"""Prototypes, over all layers, that get into the pictures: 37 bytes each, the rest of the page
fits beside them in 5 MB."""
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
    fill_page(file, TEMPLATE, data)


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
            others = describe_alternatives(path, record, alternatives[path], top)
        attention = encode_attention(student.attention[number], student.positions)
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
        cells = describe_cells(record, top, layer_regime.has_shares)
        ffn = trace.model.base_model.get_submodule(path)
        for cell, support in zip(cells, measure_support(ffn, inputs), strict=True):
            cell["support"] = support
        for place, units in list_spike_units(record).items():
            cells[place]["spike"] = [[unit, shorten(share, 3)] for unit, share in units]

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
