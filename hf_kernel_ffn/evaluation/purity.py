"""What the tokens that fire a unit most have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from ..conversion.ridge import CHUNK

TOP = 20
"""Tokens that stand for a unit's contexts."""

Coefficients = Callable[[Tensor], Tensor]
"""Coefficients (tokens, units) of an FFN at inputs (tokens, hidden_size)."""


@torch.no_grad()
def top_tokens(coefficients: Coefficients, inputs: Tensor, top: int = TOP) -> tuple[Tensor, Tensor]:
    """Find where each unit fires most.

    Args:
        coefficients: is given CHUNK or fewer tokens at a time.
        inputs: (tokens, hidden_size).

    Returns:
        (units, top) each: the largest |coefficients|, descending, float32, and their places in
        ``inputs``, int64.

    Raises:
        InputError: unless 2 ≤ ``top`` ≤ tokens.
    """
    if not 2 <= top <= len(inputs):
        raise InputError(
            f"found {len(inputs)} tokens for top={top}, expected 2 ≤ top ≤ tokens: "
            "give a longer text"
        )
    best_values = torch.empty(0)
    best_places = torch.empty(0)
    for number, chunk in enumerate(inputs.split(CHUNK)):
        values, places = coefficients(chunk).float().abs().T.topk(min(top, len(chunk)))
        places = places + number * CHUNK
        if number > 0:
            values = torch.cat([best_values, values], 1)
            places = torch.cat([best_places, places], 1)
        best_values, order = values.topk(min(top, values.shape[1]))
        best_places = places.gather(1, order)
    return best_values, best_places


def context_purity(
    coefficients: Coefficients, inputs: Tensor, tokens: Tensor, top: int = TOP
) -> dict:
    """Measure what the tokens that fire a unit most have in common.

    Args:
        inputs: (tokens, hidden_size).
        tokens: (tokens,) the ids at ``inputs``.

    Returns:
        :func:`score_purity` of :func:`top_tokens`; ``dead``, how many units never fire; ``rare``,
        how many fire on fewer than ``top`` tokens. Both are left out: fewer tokens are purer by
        chance alone.

    Raises:
        InputError: as :func:`top_tokens`.
    """
    values, places = top_tokens(coefficients, inputs, top)
    is_dead = values[:, 0] == 0
    is_full = values[:, -1] > 0
    return {
        **score_purity(places[is_full], inputs, tokens),
        "dead": int(is_dead.sum()),
        "rare": int((~is_dead & ~is_full).sum()),
    }


@torch.no_grad()
def score_purity(places: Tensor, inputs: Tensor, tokens: Tensor) -> dict[str, float | None]:
    """Measure what sets of tokens have in common.

    Args:
        places: (sets, top) places in ``inputs`` (tokens, hidden_size) and ``tokens`` (tokens,).

    Returns:
        means over the sets, None if there is none: ``token``, the share of a set's most common
        token id; ``cosine``, the mean pairwise cosine of its inputs, centred on all of them.
    """
    if not len(places):
        return {"token": None, "cosine": None}
    ids = tokens[places]
    mean = inputs.float().mean(0)
    top = places.shape[1]

    cosine = 0.0
    for some_places in places.split(max(1, CHUNK // top)):
        directions = nn.functional.normalize(inputs[some_places].float() - mean, dim=-1)
        own = directions.square().sum((1, 2))  # ‖Σu‖² holds each u with itself too
        pairs = directions.sum(1).square().sum(-1) - own
        cosine += pairs.sum().item() / (top * (top - 1)) / len(places)
    commonest = ids.mode(-1, keepdim=True).values
    return {"token": (ids == commonest).double().mean().item(), "cosine": cosine}
