"""Orthogonal matching pursuit (Pati et al. 1993) for many targets at once."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-4
"""Added to the diagonal of every system of unit columns, since candidates may be all but equal."""
SMALLEST_NORM = 1e-15
"""Columns shorter than this are divided by this: a column of zeros is never worth choosing."""
SMALLEST_IMPORTANCE = 1e-30
"""A target whose tokens weigh less than this in all is fitted as if they weighed this much."""


def select_columns(
    columns: Tensor,
    target: Tensor,
    importance: Tensor | None,
    *,
    pieces: int,
    allowed_first: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choose columns one by one, all fitted anew, for the least squared error of the target.

    Args:
        columns: (candidates, tokens, units); each unit has columns of its own.
        target: (tokens, units).
        importance: (tokens, units) weights of the squared errors; None: all alike, and a constant
            is free.
        pieces: how many columns each unit gets.
        allowed_first: (candidates,) which of them may be chosen first.

    Returns:
        amounts and numbers of the columns chosen, (units, pieces) each.
    """
    if importance is None:
        weight = torch.ones_like(target)
        columns = columns - columns.mean(1, keepdim=True)
        target = target - target.mean(0)
    else:
        weight = importance
    weight = (weight / weight.sum(0).clamp_min(SMALLEST_IMPORTANCE)).sqrt()
    columns = columns * weight
    norms = columns.square().sum(1).sqrt().clamp_min(SMALLEST_NORM)
    cross = ((columns * (target * weight)).sum(1) / norms).T
    norms = norms.T
    units, count = cross.shape

    if pieces > 1:
        columns = columns.permute(2, 1, 0) / norms[:, None]
        gram = columns.transpose(1, 2) @ columns
    else:  # no more than the diagonal is read
        gram = torch.eye(count, device=cross.device).expand(units, -1, -1)

    solution, chosen = _pursue(gram, cross, pieces, allowed_first)
    return solution / norms.gather(1, chosen), chosen


def _pursue(
    gram: Tensor, cross: Tensor, pieces: int, allowed_first: Tensor
) -> tuple[Tensor, Tensor]:
    """Amounts of the unit columns chosen, and their numbers, (units, pieces) each.

    Args:
        gram: (units, candidates, candidates) products of the unit columns.
        cross: (units, candidates) their products with the target.
    """
    units, count = cross.shape
    every_unit = torch.arange(units, device=cross.device)
    every_candidate = torch.arange(count, device=cross.device).expand(units, -1)[..., None]
    chosen = torch.zeros(units, 0, dtype=torch.int64, device=cross.device)
    amounts = cross.new_zeros(units, 0)
    for _ in range(pieces):
        # One system per unit and candidate: those chosen before, and the candidate.
        before = chosen[:, None].expand(-1, count, -1)
        index = torch.cat([before, every_candidate], -1)
        solution, explained = _refit(gram, cross, index)
        if not chosen.shape[1]:
            explained = explained.masked_fill(~allowed_first, -torch.inf)
        best = explained.argmax(1)
        chosen = index[every_unit, best]
        amounts = solution[every_unit, best]
    return amounts, chosen


def _refit(gram: Tensor, cross: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the n columns ``index`` (units, candidates, n) together.

    Returns:
        their amounts (units, candidates, n), and how much of the target they explain (units,
        candidates).
    """
    units, _, n = index.shape
    unit = torch.arange(units, device=index.device)[:, None, None, None]
    products = gram[unit, index[..., :, None], index[..., None, :]]
    products = products + DAMPING * torch.eye(n, device=products.device)
    right_side = cross[unit[..., 0], index]
    solution = torch.linalg.solve(products, right_side)
    return solution, (solution * right_side).sum(-1)
