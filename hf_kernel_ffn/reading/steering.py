"""Find the edit that makes a token likely here and changes little elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..conversion.sampling import read_ffn_inputs
from .contexts import Contexts
from .editing import Addition, Change, Edit, Effect, edited, effect, predictions
from .model_parts import (
    ffn_readout,
    find_ffn_module,
    get_final_norm,
    get_unembedding,
    is_kernel_ffn,
)
from .norms import linearise_norm
from .tracing import Trace

RARELY = (0.999, 0.99, 0.9)
"""Shares of a text's tokens on which a new prototype's score is below zero. The first is taken at
which it takes part where it should."""
LENGTHS = 12
"""Lengths of its row that are tried, from the layer's median on, each √2 times the one before."""
STEPS = 8
"""Halvings in the search for the smallest edit."""
FIRST_TRY = 1 / 8
"""The first edit that is tried writes so many times the residual stream's own norm."""
LOUDEST = 256.0
"""No edit writes more than so many times the residual stream's own norm."""

AnyChange = TypeVar("AnyChange", Edit, Addition)


@torch.no_grad()
def addition(
    trace: Trace, path: str, write: Tensor, ids: Tensor, *, position: int = -1
) -> Addition:
    """Make a prototype for the FFN at ``path`` that fires at ``position`` of ``trace`` and rarely
    elsewhere.

    With a score x·w + b, w points from the text's mean input to this one, and b leaves 999 of 1000
    of the text's tokens below zero (99 of 100 or 9 of 10 where that is too few to take part). Its
    length is the first at which it is as loud as the others that fire, or the loudest. Without a
    bias, w is this input.

    Args:
        write: (hidden_size,) what it writes at ``position``.
        ids: (rows, length) token ids of ordinary text.

    Raises:
        InputError: the input is too ordinary along its own direction, or the layer is no kernel
            readout with fixed values.
    """
    model = trace.model
    state = trace.ffn_inputs[path][trace.at(position)].float()
    ffn = find_ffn_module(model, path)
    if not is_kernel_ffn(ffn):
        raise InputError(
            f"found {type(ffn).__name__} at {path}, expected a kernel readout: convert the model"
        )
    if not ffn.kernel.uses_bias:
        candidate = Addition(path, state, 0.0, write)
        return _scale_write(candidate, 1 / _measure_loudness(trace, state, candidate).added)

    inputs = torch.cat(list(read_ffn_inputs(model, path, ids))).float()
    median_length = ffn.input_prototypes.weight.float().norm(dim=-1).median()
    row = nn.functional.normalize(state - inputs.mean(0), dim=0) * median_length
    for share in RARELY:
        bias = -(inputs @ row).quantile(share).item()
        candidate, loudest = _find_loudest_stretch(trace, state, Addition(path, row, bias, write))
        if loudest > 0 and row @ state + bias > 0:
            return replace(candidate, write=write / loudest)
    raise InputError(
        f"found position {position} too ordinary at {path}: its input is hardly further out than "
        f"{RARELY[-1]:.0%} of the text's; choose another layer or position"
    )


class _Loudness(NamedTuple):
    """Coefficients at one input."""

    added: float
    """Of the new prototype."""
    others: float
    """Mean of the others that fire."""


def _measure_loudness(trace: Trace, state: Tensor, candidate: Addition) -> _Loudness:
    """How loud a new prototype would be at the input ``state`` (hidden_size,)."""
    inputs = state.to(trace.ffn_inputs[candidate.path])[None]
    with edited(trace.model, candidate):
        record = ffn_readout(trace.model, candidate.path, inputs)
    coefficients = record.coefficients[0].float()
    others = coefficients[:-1]
    firing = others[others > 0]
    return _Loudness(coefficients[-1].item(), firing.mean().item() if len(firing) else 0.0)


def _find_loudest_stretch(
    trace: Trace, state: Tensor, candidate: Addition
) -> tuple[Addition, float]:
    """Stretch a new prototype's row and bias until it is as loud as the others at ``state``.

    Returns:
        The first stretch of ``candidate`` that is, or the loudest; and its coefficient, 0 where
        none fires.
    """
    loudest = 0.0
    best = candidate
    for step in range(LENGTHS):
        factor = 2 ** (step / 2)
        stretched = replace(candidate, when=candidate.when * factor, bias=candidate.bias * factor)
        loudness = _measure_loudness(trace, state, stretched)
        if loudness.added >= loudest:
            loudest = loudness.added
            best = stretched
        if loudness.added >= loudness.others:
            break
    return best, loudest


@torch.no_grad()
def raise_token(
    trace: Trace,
    token: int,
    used: Mapping[str, Contexts],
    others: Tensor,
    *,
    probability: float = 0.5,
    candidates: int = 4,
) -> tuple[Edit, Effect] | None:
    """Find the edit of one prototype (or hidden unit) that makes ``token`` likely after the prompt
    of ``trace``.

    A row gets the token's unembedding direction (through the frozen final norm) added, as much
    as is needed. Selective are rows that fire here and rarely elsewhere: small Σc²/tokens over
    c² at the prompt's end.

    Args:
        used: the contexts of FFNs on ordinary text, by path.
        others: (rows, length) token ids of text that should stay as it is.
        probability: that the token is to reach.
        candidates: so many most selective rows are tried.

    Returns:
        The edit that disturbs ``others`` least, and its effect; None if none gets there.
    """
    rated: list[tuple[float, str, int, float]] = []
    for path, on_text in used.items():
        record = ffn_readout(trace.model, path, trace.ffn_inputs[path][-1:])
        coefficients = record.coefficients[0].double()
        here = coefficients.square().where(coefficients != 0, torch.nan)
        noise = (on_text.squares / on_text.tokens) / here
        rated += [
            (noise[prototype].item(), path, prototype, coefficients[prototype].item())
            for prototype in (~noise.isnan()).nonzero()[:, 0].tolist()
        ]
    rated.sort(key=lambda row: row[0])
    direction = _find_direction(trace, token)
    edits = [
        Edit(path, prototype, write=direction / coefficient)
        for _, path, prototype, coefficient in rated[:candidates]
    ]
    return _choose_cheapest(trace, token, edits, others=others, probability=probability)


@torch.no_grad()
def raise_token_by_addition(
    trace: Trace, token: int, ids: Tensor, others: Tensor, *, probability: float = 0.5
) -> tuple[Addition, Effect] | None:
    """As :func:`raise_token`, by one new prototype in whichever layer disturbs ``others`` least.

    Args:
        ids: (rows, length) token ids of ordinary text on which it is to be silent
            (:func:`addition`).
    """
    direction = _find_direction(trace, token)
    additions = []
    for path in trace.ffn_inputs:
        # A layer that does not tell the context from ordinary text is left out; another may.
        with suppress(InputError):
            additions.append(addition(trace, path, direction, ids))
    return _choose_cheapest(trace, token, additions, others=others, probability=probability)


def _find_direction(trace: Trace, token: int) -> Tensor:
    """(hidden_size,) float32 of length one: what raises the logit of ``token`` most at the
    prompt's end."""
    row = get_unembedding(trace.model)[token]
    direction, _ = linearise_norm(get_final_norm(trace.model), trace.states[-1][-1], row)
    return nn.functional.normalize(direction, dim=0).float()


def _choose_cheapest(
    trace: Trace,
    token: int,
    changes: Sequence[AnyChange],
    *,
    others: Tensor,
    probability: float,
) -> tuple[AnyChange, Effect] | None:
    """Of ``changes``, each as small as reaches ``probability``, the one that disturbs ``others``
    least."""
    model = trace.model
    plain = predictions(model, others)
    stream_norm = trace.states[-1][-1].norm().item()

    best: tuple[AnyChange, Effect] | None = None
    for change in changes:
        smallest = _make_least(trace, token, change, probability=probability, unit=stream_norm)
        if smallest is None:
            continue
        result = effect(model, [smallest], trace.ids, token, others=others, plain=plain)
        if best is None or result.collateral_kl < best[1].collateral_kl:
            best = smallest, result
    return best


def _make_least(
    trace: Trace, token: int, change: AnyChange, *, probability: float, unit: float
) -> AnyChange | None:
    """``change`` with as little of its write as reaches ``probability``; None if none does."""

    def is_enough(amount: float) -> bool:
        louder = _scale_write(change, amount)
        return _read_probability(trace.model, louder, trace.ids, token) >= probability

    amount = _find_least_amount(is_enough, unit)
    return None if amount is None else _scale_write(change, amount)


def _scale_write(change: AnyChange, amount: float) -> AnyChange:
    """``change`` with ``amount`` times its write."""
    assert change.write is not None
    return replace(change, write=change.write * amount)


def _read_probability(model: PreTrainedModel, change: Change, context: Tensor, token: int) -> float:
    """Probability of ``token`` after ``context`` (T,) in the changed model."""
    with edited(model, change):
        logits = model(input_ids=context[None], use_cache=False).logits[0, -1]
    return logits.float().softmax(-1)[token].item()


def _find_least_amount(is_enough: Callable[[float], bool], unit: float) -> float | None:
    """The least amount, to 2^−STEPS of it, that is enough; None if LOUDEST · ``unit`` is not."""
    low = 0.0
    high = FIRST_TRY * unit
    while not is_enough(high):
        low = high
        high = 2 * high
        if high > LOUDEST * unit:
            return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high
