"""One token of a pass, read in plain values: what ``hf-kernel-ffn read`` prints and writes as JSON."""

from __future__ import annotations

from typing import Any

from .attribution import logit_split
from .naming import written
from .regimes import contributions, mixtures, regime
from .support import Support
from .tracing import Trace, get_layer_number

NEXT = 5
"""Likely next tokens that are given."""


def summary(
    trace: Trace,
    tokenizer: Any,
    position: int = -1,
    layers: list[int] | None = None,
    top: int = 10,
    support: Support | None = None,
) -> dict:
    """Everything about ``position`` as JSON has it: ``token``, ``next`` (the likely next tokens with their probabilities),
    ``layers`` (regime, the figures of a mixture, the ``top`` contributions with what they write, and support in percent of
    ordinary text if ``support`` is given) and ``logit``: the gap between the two likeliest tokens, split exactly.

    Regimes are of all positions that the trace kept. InputError as :meth:`Trace.at`.
    """
    place = trace.at(position)
    best = trace.logits[place].float().softmax(-1).topk(NEXT)
    first, second = best.indices[:2].tolist()
    split = logit_split(trace, first, second, trace.positions[place])
    covered = (
        {}
        if support is None
        else {s.path: s for s in support.percentiles(trace) if s.position == trace.positions[place]}
    )
    entries = []
    for path in trace.ffn_inputs:
        if layers is not None and get_layer_number(path) not in layers:
            continue
        record = trace.ffn(path)
        mixture, what = mixtures(record)[place], regime(record)
        parts = contributions(record, place, top)
        writes = written(
            trace.model, tokenizer, record.dictionary[[part.prototype for part in parts]]
        )
        entry: dict = {"layer": get_layer_number(path), "path": path, "regime": what.name}
        entry |= {k: v for k, v in mixture._asdict().items() if k != "position"}
        mass = mixture.positive_mass + mixture.negative_mass
        entry["negative_mass_share"] = mixture.negative_mass / mass if mass else 0.0
        if path in covered:
            entry["support"] = {"nearest": covered[path].nearest, "mass": covered[path].mass}
        entry["contributions"] = [
            {**part._asdict(), "writes": str(write)} for part, write in zip(parts, writes)
        ]
        entries.append(entry)
    return {
        "position": trace.positions[place],
        "token": trace.tokens[trace.positions[place]],
        "next": [(tokenizer.decode([i]), p) for i, p in zip(best.indices.tolist(), best.values.tolist())],
        "layers": entries,
        "logit": {
            "token": tokenizer.decode([split.token]), "against": tokenizer.decode([split.against]), "value": split.value,
            "parts": [part._asdict() for part in split.parts[:top]], "kinds": split.kinds(), "remainder": split.remainder,
            "carried_by_10": split.carried(10),
        },
    }  # fmt: skip
