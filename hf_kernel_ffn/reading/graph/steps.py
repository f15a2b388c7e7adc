"""From scores to a coefficient: what each score is multiplied by, and what no score accounts for.

A unit's coefficient is a function of one or two scores, and no linear one. A step writes it as

    c = slope_1 · score_1 + slope_2 · score_2 + constant + rest

``half`` starts from all scores at zero. Of one score it is the secant, slope = (c(s) − c(0)) / s.
Of two it is the mean over both orders in which they can be switched on, their Shapley value:

    slope_1 · s_1 = ½ [c(s_1, s_2) − c(0, s_2) + c(s_1, 0) − c(0, 0)]

and likewise for s_2; constant = c(0, 0), rest = 0. For act(g) · u with act(0) = 0 both scores get
half of the coefficient: the half rule of RelP (Jafari et al. 2025, arXiv:2508.21258).

``derivative`` takes the slopes to be derivatives; what they miss is the rest, called curvature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .forms import Form

RULES = ("half", "derivative")
"""How a coefficient may be split over its scores."""
ROUNDING = 1e-3
"""Where a form is further than this share from the layer's own coefficient, it is another one, and
the difference is no rounding."""


class Step(NamedTuple):
    """A coefficient as a linear function of its scores; (tokens, units) each."""

    slopes: tuple[Tensor, ...]
    """What multiplies each score; 0 where the score is."""
    constant: Tensor
    """The coefficient at the baseline, all scores zero."""
    rest: Tensor
    """What is left of the coefficient."""


def take_step(form: Form, scores: list[Tensor], coefficients: Tensor, rule: str = "half") -> Step:
    """The step of ``rule`` from ``scores`` to ``coefficients``, (tokens, units) each.

    Where coefficients follow from no score, all of them is the rest.
    """
    evaluate = form.evaluate
    zero = torch.zeros_like(coefficients)
    if evaluate is None:
        return Step(tuple(zero for _ in scores), zero, coefficients)
    if rule == "derivative":
        slopes = _differentiate(form, scores)
        explained = sum((slope * score for slope, score in zip(slopes, scores, strict=True)), zero)
        return Step(slopes, zero, coefficients - explained)

    nothing = evaluate(*(zero for _ in scores)).to(zero.dtype)
    whole = evaluate(*scores).to(zero.dtype)
    if len(scores) == 1:
        effects = [whole - nothing]
    else:
        first_alone = evaluate(scores[0], zero).to(zero.dtype)
        second_alone = evaluate(zero, scores[1]).to(zero.dtype)
        effects = [
            (whole - second_alone + first_alone - nothing) / 2,
            (whole - first_alone + second_alone - nothing) / 2,
        ]
    slopes = tuple(
        torch.where(score != 0, effect / score.where(score != 0, 1.0), 0.0)
        for effect, score in zip(effects, scores, strict=True)
    )
    rest = coefficients - whole
    is_rounding = rest.abs() <= ROUNDING * coefficients.abs()
    return Step(slopes, nothing, rest.masked_fill(is_rounding, 0.0))


def _differentiate(form: Form, scores: list[Tensor]) -> tuple[Tensor, ...]:
    """The derivative of the coefficients by each score."""
    assert form.evaluate is not None
    with torch.enable_grad():
        leaves = [score.detach().requires_grad_() for score in scores]
        total = form.evaluate(*leaves).sum()
        return torch.autograd.grad(total, leaves)
