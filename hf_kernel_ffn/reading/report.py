"""One prompt as one self-contained HTML page: what every FFN wrote at every token, next to its attention and its teacher.

:func:`report_data` turns traces into plain numbers, :func:`write_report` puts them into the page (``report.html``).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.linears import get_effective_weight
from ..checkpoint_code.record import Readout
from ..storage.files import write_text
from .decompositions import alternatives as alternative_shares
from .model_parts import get_layer_number, is_kernel_ffn
from .naming import written
from .regimes import mixtures, regime
from .tracing import Trace

Namer = Callable[[str, list[int], Tensor], list[list[str]]]
"""(path of the FFN, N rows of its dictionary by number, those rows (N, hidden_size)) -> the tokens that each row promotes."""
KERNELS = ("exponential", "gaussian", "imq", "yat", "half-yat", "exponential-yat")
"""Kernels that the page can evaluate."""
PICTURED = 48_000
"""Prototypes, over all layers, that get into the pictures: 37 bytes each, the rest of the page fits beside them in 5 MB."""
TEMPLATE = Path(__file__).with_name("report.html")


@torch.no_grad()
def report_data(
    student: Trace,
    teacher: Trace | None = None,
    *,
    tokenizer: Any = None,
    top: int = 48,
    alternatives: dict[str, Tensor] | None = None,
    namer: Namer | None = None,
) -> dict:
    """What the page of a prompt shows, as JSON types.

    Args:
        student: the trace to read, of a stock or a converted model.
        teacher: another model's trace of the same tokens and positions, to stand beside it.
        tokenizer: names the tokens that a prototype promotes by the logit lens, if there is no ``namer``.
        top: coefficients kept per layer and token, by |c|‖v‖; of the others, number and mass.
        alternatives: by an FFN's path, (count, prototypes) shares that all give the output of the last position kept, row 0 the
            layer's own.
        namer: batched, to be quick over a large vocabulary; see :data:`Namer`.

    Raises:
        InputError: the traces are of different tokens, positions or layers, or alternatives do not fit a layer.
    """
    if teacher is not None and not (
        torch.equal(student.ids.cpu(), teacher.ids.cpu())
        and student.positions == teacher.positions
        and len(student.ffn_inputs) == len(teacher.ffn_inputs)
    ):
        raise InputError(
            "found a teacher's trace of other tokens, positions or layers than the student's, expected the same: trace both over one prompt"
        )
    unknown = set(alternatives or {}) - set(student.ffn_inputs)
    if unknown:
        raise InputError(
            f"found alternatives for {sorted(unknown)[0]!r}, expected paths among {', '.join(student.ffn_inputs)}"
        )
    vocabulary: dict[str, int] = {}
    room = PICTURED
    layers = []
    for number, path in enumerate(student.ffn_inputs):
        record = student.ffn(path)
        picture = _picture(
            student.model.base_model.get_submodule(path), student.ffn_inputs[path], record, room
        )
        room -= len(record.dictionary) if "output" in picture else 0
        others = (
            None
            if path not in (alternatives or {})
            else _alternatives(path, record, (alternatives or {})[path], top)
        )
        attention = _attention(student.attention[number], student.positions)
        layers.append(
            {"path": path, "attention": attention, "picture": picture, "alternatives": others}
        )
    return {
        "tokens": student.tokens,
        "positions": student.positions,
        "layers": layers,
        "student": _side(
            student, top, namer or logit_lens(student.model, tokenizer), vocabulary, layers
        ),
        "teacher": None
        if teacher is None
        else _side(teacher, top, namer or logit_lens(teacher.model, tokenizer), vocabulary, []),
        "vocabulary": list(vocabulary),
    }


def other_mixtures(trace: Trace, count: int, seed: int = 0) -> dict[str, Tensor]:
    """For :func:`report_data`: up to ``count`` other mixtures of the last kept position's output, by the path of every layer that has
    shares and any."""
    found = {}
    for path in trace.ffn_inputs if count else ():
        record = trace.ffn(path)
        if regime(record).has_shares and (record.coefficients[-1] > 0).any():
            rows = alternative_shares(record, -1, count + 1, seed)
            if len(rows) > 1:
                found[path] = rows
    return found


def write_report(file: str | Path, data: dict) -> None:
    """The page of ``data`` (from :func:`report_data`) at ``file``, whole or not at all; it needs no network."""
    # "<" could end the script element or open a comment in it; in JSON it stands in strings only
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace(
        "<", "\\u003c"
    )
    write_text(file, TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text, 1))


def logit_lens(model: Any, tokenizer: Any, count: int = 4) -> Namer:
    """A namer by the ``count`` tokens that a dictionary row promotes most; names nothing without a ``tokenizer``."""

    def name(path: str, indices: list[int], rows: Tensor) -> list[list[str]]:
        if tokenizer is None:
            return [[] for _ in indices]
        return [
            [token for token, _ in write.promoted]
            for write in written(model, tokenizer, rows, count)
        ]

    return name


def _side(
    trace: Trace, top: int, namer: Namer, vocabulary: dict[str, int], shared: list[dict]
) -> dict:
    """One model: its layers' regimes, cells and prototypes by name."""
    layers = []
    for number, path in enumerate(trace.ffn_inputs):
        record = trace.ffn(path)
        what, v = regime(record), record.dictionary.double()
        cells = _cells(record, top, what.has_shares)
        support = _support(trace.model.base_model.get_submodule(path), trace.ffn_inputs[path])
        for cell, numbers in zip(cells, support):
            cell["support"] = numbers
        seen = {i for cell in cells for i in cell["i"]}
        if shared and shared[number]["alternatives"]:
            seen |= set(shared[number]["alternatives"]["order"])
        used = sorted(seen)
        promoted = namer(path, used, v[used]) if used else []
        layers.append(
            {
                "layer": get_layer_number(path), "path": path, "regime": what.name, "shares": what.has_shares, "size": len(v), "cells": cells,
                "prototypes": {
                    i: [record.names[i], [vocabulary.setdefault(token, len(vocabulary)) for token in tokens]]
                    for i, tokens in zip(used, promoted)
                },
            }
        )  # fmt: skip
    kind, name = type(trace.model).__name__, getattr(trace.model.config, "_name_or_path", "") or ""
    return {"model": f"{Path(name).name} ({kind})" if name else kind, "layers": layers}


def _cells(record: Readout, top: int, has_shares: bool) -> list[dict]:
    """Per token the largest coefficients, what is left, and what the mixture is like."""
    c, v = record.coefficients.double(), record.dictionary.double()
    mass, y = c.abs() * v.norm(dim=-1), c @ v
    along = c * (torch.nn.functional.normalize(y, dim=-1) @ v.T)
    order = mass.argsort(dim=-1, descending=True, stable=True)[:, :top]
    cells = []
    for row, mixture in enumerate(mixtures(record)):
        kept = [i for i in order[row].tolist() if c[row, i] != 0]
        cells.append(
            {
                "i": kept,
                "c": [_short(x) for x in c[row, kept].tolist()],
                "a": [_short(x, 3) for x in along[row, kept].tolist()],
                "sum": _short(c[row].sum().item(), 6),
                "rest": [
                    mixture.active - len(kept),
                    _short((mass[row].sum() - mass[row, kept].sum()).clamp_min(0).item()),
                ],
                "active": mixture.active,
                "intensity": _short(mixture.intensity),
                "entropy": _short(mixture.entropy),
                "written": _short(mixture.written),
                "coherence": _short(mixture.coherence),
                "effective": _short(mixture.effective),
                "diagnosis": mixture.diagnosis,
            }
        )
        if not has_shares:
            cells[-1]["restAlong"] = _short((along[row].sum() - along[row, kept].sum()).item())
    return cells


def _support(ffn: Any, inputs: Tensor) -> list[list[float] | None]:
    """Per token log Σκ and minus the distance to the nearest input prototype; None from an FFN without a kernel."""
    if not is_kernel_ffn(ffn):
        return [None] * len(inputs)
    score, distance2 = ffn.scores(inputs)
    log_mass = ffn.kernel.log(score, distance2, **ffn.kernel_parameters()).double().logsumexp(-1)
    rows = get_effective_weight(ffn.input_prototypes, inputs)[0].double()
    nearest = -torch.cdist(inputs.double(), rows).min(-1).values
    return [
        [_short(a) if math.isfinite(a) else -1e9, _short(b)]
        for a, b in zip(log_mass.tolist(), nearest.tolist())
    ]  # JSON has no infinity


def _picture(ffn: Any, inputs: Tensor, record: Readout, room: int) -> dict:
    """The paired picture of a layer: the plane of its inputs, with which the page evaluates the kernel exactly, and the plane
    of its outputs. Of a layer that has none, the ``reason``."""
    settings = getattr(getattr(ffn, "config", None), "settings", None)
    if settings is None or not hasattr(ffn, "kernel_parameters"):
        return {
            "reason": "This FFN is no kernel readout: its coefficients are signed and have no hull."
        }
    if settings.values == "gated":
        return {
            "reason": "The values are gated: each output prototype changes with the input, so there is no fixed hull."
        }
    if settings.kernel not in KERNELS:
        return {"reason": f"The page cannot evaluate the kernel {settings.kernel!r}."}
    if settings.simplex not in ("softmax", "top-k", "threshold", "sparsemax", "entmax-1.5"):
        return {"reason": f"The page cannot evaluate the simplex map {settings.simplex!r}."}
    if len(record.dictionary) > room:
        return {
            "reason": "Left out to keep the file small: the layers before it have many prototypes."
        }
    weight, bias = get_effective_weight(ffn.input_prototypes, inputs)
    x, w, c, v = (
        inputs.double(),
        weight.double(),
        record.coefficients.double(),
        record.dictionary.double(),
    )
    mean, axes, explained = _plane(x)
    outputs = _plane(c @ v)[1]
    total = c.sum(-1, keepdim=True)
    plain = settings.coefficients_are_kernel
    columns = [
        w @ mean,
        w @ axes[0],
        w @ axes[1],
        torch.zeros_like(w[:, 0]) if bias is None else bias.double(),
    ]
    picture = {
        "kernel": settings.kernel,
        "parameters": {name: float(value) for name, value in ffn.kernel_parameters().items()},
        "simplex": settings.simplex,
        "topK": ffn.top_k,
        "logThreshold": float(ffn.log_threshold()) if settings.simplex == "threshold" else None,
        "temperature": 1.0 if plain else float(ffn.positive("temperature")),
        "intensity": settings.intensity,
        "scale": float(ffn.positive("scale"))
        if settings.intensity == "mass"
        else float(ffn.reference.get("scale", 1.0)),
        "gate": None,
        "mean": [float(mean @ mean), float(mean @ axes[0]), float(mean @ axes[1])],
        "explained": explained,
        "input": _base64(
            torch.stack([*columns, w.square().sum(-1)], 1)
        ),  # m, p, q, b, ‖w‖² of every prototype
        "tokens": _base64((x - mean) @ axes.T),
        "output": _base64(v @ outputs.T),
        "points": _base64((c / total.where(total > 0, 1.0)) @ v @ outputs.T),
    }
    if settings.intensity == "gate":
        gate, shift = get_effective_weight(ffn.gate, inputs)
        along = gate.double()[0] @ torch.stack([mean, *axes], 1)
        picture["gate"] = [
            float(along[0] + (0.0 if shift is None else shift.double()[0])),
            float(along[1]),
            float(along[2]),
        ]
    return picture


def _plane(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """The mean (d,) of x (rows, d), its first two principal directions (2, d), and their share of the variance."""
    mean = x.mean(0)
    padded = torch.cat([x - mean, x.new_zeros(2, x.shape[1])])  # two directions even of one row
    _, lengths, axes = torch.linalg.svd(padded, full_matrices=False)
    variance = lengths.square()
    return mean, axes[:2], float(variance[:2].sum() / variance.sum().clamp_min(1e-300))


def _alternatives(path: str, record: Readout, rows: Tensor, top: int) -> dict:
    """Sparse shares of each decomposition, and how far from one another their outputs are."""
    if rows.ndim != 2 or rows.shape[1] != len(record.dictionary) or (rows < 0).any():
        raise InputError(
            f"found alternatives of shape {tuple(rows.shape)} for {path}, expected nonnegative shares "
            f"(count, {len(record.dictionary)}): take them from decompositions of this layer"
        )
    rows = rows.double().cpu()
    outputs = rows @ record.dictionary.double().cpu()
    sparse = []
    for row in rows:
        used = (row > 1e-9).nonzero().flatten().tolist()
        sparse.append([used, [_short(x, 8) for x in row[used].tolist()]])
    spread = (outputs - outputs[0]).norm(dim=-1).max() / outputs[0].norm().clamp_min(1e-300)
    order = rows.mean(0).argsort(descending=True)[:top].tolist()
    return {
        "rows": sparse,
        "order": [i for i in order if rows[:, i].any()],
        "spread": _short(spread.item(), 2),
    }


def _attention(weights: Tensor, positions: list[int]) -> dict:
    """Heads' weights (heads, P, T) over the positions kept, row i the first i + 1 of them and then all other tokens together, as
    bytes 255·√weight: the root keeps the digits of small ones."""
    kept = weights.double().cpu()[:, :, positions]
    others = (weights.double().cpu().sum(-1) - kept.sum(-1)).clamp_min(0)
    rows = [torch.cat([kept[:, i, : i + 1], others[:, i, None]], 1) for i in range(len(positions))]
    packed = (torch.cat(rows, 1).clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    return {"heads": len(weights), "weights": base64.b64encode(packed.numpy().tobytes()).decode()}


def _base64(numbers: Tensor) -> str:
    """Little-endian float32 numbers, row by row."""
    return base64.b64encode(numbers.detach().cpu().numpy().astype("<f4").tobytes()).decode()


def _short(x: float, digits: int = 4) -> float:
    return float(f"{x:.{digits}g}")
