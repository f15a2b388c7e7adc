"""Find the edit: the prototype to rewrite, or the one to add, that makes a token likely here and changes little elsewhere."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from ..conversion.sampling import read_ffn_inputs
from .attribution import final_norm, frozen_norm
from .contexts import Contexts
from .editing import Addition, Edit, Effect, edited, effect, predictions
from .tracing import Trace, ffn_readout, unembedding

RARELY = (0.999, 0.99, 0.9)
"""Shares of a text's tokens on which a new prototype's score is below zero: the first at which it takes part where it should."""
LENGTHS = 12
"""Lengths of its row that are tried, from the layer's median on, each √2 times the one before."""
STEPS = 8
"""Halvings in the search for the smallest edit."""
LOUDEST = 256.0
"""No edit writes more than so many times the residual stream's own norm."""


@torch.no_grad()
def addition(trace: Trace, path: str, write: Tensor, ids: Tensor, position: int = -1) -> Addition:
    """A new prototype for the FFN at ``path`` that fires at ``position`` of ``trace``, rarely on the text ``ids`` (rows, length), and
    there writes ``write`` (hidden_size,): with a score x·w + b, w points from the text's mean input to this one and b leaves 999 of
    1000 of the text's tokens below zero (99 of 100 or 9 of 10 where that is too few to take part); without, w is this input. Its
    length is the first at which it is as loud as the others that fire, or the loudest.

    Raises:
        InputError: the input is too ordinary along its own direction, or the layer is no kernel readout with fixed values.
    """
    model, x = trace.model, trace.ffn_inputs[path][trace.at(position)].float()
    ffn = model.base_model.get_submodule(path)
    if not hasattr(ffn, "input_prototypes"):
        raise InputError(
            f"found {type(ffn).__name__} at {path}, expected a kernel readout: convert the model"
        )

    def loudness(row: Tensor, bias: float) -> tuple[float, float]:
        with edited(model, Addition(path, row, bias, write)):
            c = ffn_readout(model, path, x.to(trace.ffn_inputs[path])[None]).coefficients[0].float()
        fires = c[:-1][c[:-1] > 0]
        return c[-1].item(), fires.mean().item() if len(fires) else 0.0

    if not ffn.kernel.uses_bias:
        return Addition(path, x, 0.0, write / loudness(x, 0.0)[0])
    inputs = torch.cat(list(read_ffn_inputs(model, path, ids))).float()
    row = (
        nn.functional.normalize(x - inputs.mean(0), dim=0)
        * ffn.input_prototypes.weight.float().norm(dim=-1).median()
    )
    for share in RARELY:
        bias, best = -(inputs @ row).quantile(share).item(), (0.0, 0.0)
        for stretch in (2 ** (step / 2) for step in range(LENGTHS)):
            own, others = loudness(row * stretch, bias * stretch)
            best = max(best, (own, stretch))
            if own >= others:
                break
        loudest, stretch = best
        if loudest > 0 and row @ x + bias > 0:
            return Addition(path, row * stretch, bias * stretch, write / loudest)
    raise InputError(
        f"found position {position} too ordinary at {path}: its input is hardly further out than {RARELY[-1]:.0%} of the text's; "
        "choose another layer or position"
    )


@torch.no_grad()
def raise_token(
    trace: Trace,
    token: int,
    used: dict[str, Contexts],
    others: Tensor,
    probability: float = 0.5,
    candidates: int = 4,
) -> tuple[Edit, Effect] | None:
    """The edit of one prototype (or hidden unit) that brings ``token`` to ``probability`` after the prompt of ``trace`` and disturbs
    ``others`` (rows, length) least, among the ``candidates`` most selective ones; None if none gets there.

    A row gets the token's unembedding direction (through the frozen final norm) added, as much as is needed. Selective are those
    that fire here and rarely elsewhere: small Σc²/tokens over c² at the prompt's end, ``used`` being the contexts on ordinary text.
    """
    found = []
    for path, entry in used.items():
        c = ffn_readout(trace.model, path, trace.ffn_inputs[path][-1:]).coefficients[0].double()
        noise = (entry.squares / entry.tokens) / c.square().where(c != 0, torch.nan)
        found += [
            (score, path, i, c[i].item())
            for i, score in enumerate(noise.tolist())
            if score == score
        ]
    direction = _toward(trace, token)
    chosen = [
        Edit(path, prototype, write=direction / c)
        for _, path, prototype, c in sorted(found, key=lambda f: f[0])[:candidates]
    ]
    return _cheapest(trace, token, chosen, others, probability)


@torch.no_grad()
def raise_token_by_addition(
    trace: Trace, token: int, ids: Tensor, others: Tensor, probability: float = 0.5
) -> tuple[Addition, Effect] | None:
    """As :func:`raise_token`, by one new prototype in whichever layer disturbs ``others`` least; ``ids`` is the ordinary text on which
    it is to be silent (:func:`addition`)."""
    direction, chosen = _toward(trace, token), []
    for path in trace.ffn_inputs:
        with suppress(
            InputError
        ):  # this layer does not tell the context from ordinary text; another may
            chosen.append(addition(trace, path, direction, ids))
    return _cheapest(trace, token, chosen, others, probability)


def _toward(trace: Trace, token: int) -> Tensor:
    """(hidden_size,) float32 of length one: what raises the logit of ``token`` most at the prompt's end."""
    u = unembedding(trace.model)[token].double()
    direction, _ = frozen_norm(final_norm(trace.model), trace.states[-1][-1].double(), u)
    return nn.functional.normalize(direction, dim=0).float()


def _cheapest(trace: Trace, token: int, chosen: list, others: Tensor, probability: float) -> Any:
    """Of ``chosen``, each with its write made as small as reaches ``probability``, the one that disturbs ``others`` least."""
    model, best, plain = trace.model, None, predictions(trace.model, others)
    length = trace.states[-1][-1].norm().item()
    for change in chosen:

        def louder(amount: float, change: Any = change) -> Any:
            return replace(change, write=change.write * amount)

        amount = _least(
            lambda amount: _probability(model, louder(amount), trace.ids, token) >= probability,
            length,
        )
        if amount is None:
            continue
        result = effect(model, [louder(amount)], trace.ids, token, others, plain)
        if best is None or result.collateral_kl < best[1].collateral_kl:
            best = louder(amount), result
    return best


def _probability(model: Any, change: Edit | Addition, context: Tensor, token: int) -> float:
    with edited(model, change):
        return (
            model(input_ids=context[None], use_cache=False)
            .logits[0, -1]
            .float()
            .softmax(-1)[token]
            .item()
        )


def _least(enough, unit: float) -> float | None:
    """The least amount, to 2^−STEPS of it, that is enough; None if LOUDEST · ``unit`` is not."""
    low, high = 0.0, unit / 8
    while not enough(high):
        low, high = high, high * 2
        if high > LOUDEST * unit:
            return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
