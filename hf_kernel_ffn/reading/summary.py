"""One token of a pass in plain values: what ``hf-kernel-ffn read`` prints and writes as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from .attribution import KINDS, logit_split
from .model_parts import get_layer_number
from .naming import written
from .regimes import contributions, mixtures, regime
from .support import Support, Supported
from .tracing import Trace

NEXT = 5
"""Likely next tokens that are given."""
CARRIED = 10
"""Prototypes whose part of the logit is summed up."""


def summary(
    trace: Trace,
    tokenizer: PreTrainedTokenizerBase,
    position: int = -1,
    *,
    layers: Sequence[int] | None = None,
    top: int = 10,
    support: Support | None = None,
) -> dict:
    """Read everything about ``position`` into JSON types.

    Args:
        layers: numbers of the layers to read; None: all. Regimes are of all positions that the
            trace kept.
        top: contributions per layer, and parts of the logit.
        support: adds how well each layer covers its input, in percent of ordinary text.

    Returns:
        ``position``; ``token``; ``next``, the likely next tokens with their probabilities;
        ``layers``, each with its regime, the figures of its mixture, and its largest contributions
        with what they write; and ``logit``, the gap between the two likeliest tokens, split
        exactly. Where it cannot be split, its ``reason`` says why, there are no parts, and the
        remainder is all of it.

    Raises:
        InputError: as :meth:`Trace.at`.
    """
    place = trace.at(position)
    position = trace.positions[place]
    best = trace.logits[place].float().softmax(-1).topk(NEXT)
    covered: dict[str, Supported] = {}
    if support is not None:
        covered = {row.path: row for row in support.percentiles(trace) if row.position == position}
    paths = [
        path for path in trace.ffn_inputs if layers is None or get_layer_number(path) in layers
    ]
    first, second = best.indices[:2].tolist()
    return {
        "position": position,
        "token": trace.tokens[position],
        "next": [
            (tokenizer.decode([token]), probability)
            for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
        "layers": [
            _summarise_layer(trace, tokenizer, path, place, top=top, covered=covered.get(path))
            for path in paths
        ],
        "logit": {
            "token": tokenizer.decode([first]),
            "against": tokenizer.decode([second]),
            **_summarise_logit(trace, first, second, place, top=top),
        },
    }


def _summarise_layer(
    trace: Trace,
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    place: int,
    *,
    top: int,
    covered: Supported | None,
) -> dict:
    """What the FFN at ``path`` did at one place of the trace."""
    record = trace.ffn(path)
    mixture = mixtures(record)[place]
    parts = contributions(record, place, top)
    writes = written(trace.model, tokenizer, record.dictionary[[part.prototype for part in parts]])

    entry: dict = {
        "layer": get_layer_number(path),
        "path": path,
        "regime": regime(record).name,
        **mixture._asdict(),
    }
    del entry["position"]
    mass = mixture.positive_mass + mixture.negative_mass
    entry["negative_mass_share"] = mixture.negative_mass / mass if mass else 0.0
    if covered is not None:
        entry["support"] = {"nearest": covered.nearest, "mass": covered.mass}
    entry["contributions"] = [
        {**part._asdict(), "writes": str(write)} for part, write in zip(parts, writes, strict=True)
    ]
    return entry


def _summarise_logit(trace: Trace, token: int, against: int, place: int, *, top: int) -> dict:
    """The gap between the logits of two tokens, split as far as the model allows it."""
    try:
        split = logit_split(trace, token, against, trace.positions[place])
    except InputError as error:
        logits = trace.logits[place].double()
        value = (logits[token] - logits[against]).item()
        return {
            "value": value,
            "parts": [],
            "kinds": {kind: 0.0 for kind in KINDS if kind != "linear"},
            "remainder": value,
            "carried_by_10": 0.0,
            "reason": str(error),
        }
    return {
        "value": split.value,
        "parts": [part._asdict() for part in split.parts[:top]],
        "kinds": split.kinds(),
        "remainder": split.remainder,
        "carried_by_10": split.carried(CARRIED),
    }
