"""Simplex maps: from log-kernels to the shares π of a readout.

Every map takes ``(..., prototypes)`` float32 or float64 scores and returns shares of the same shape, π ≥ 0 and
Σπ = 1. They are computed in the dtype they are given: callers pass at least float32, since thresholds
found in half precision are wrong.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

import torch
from torch import Tensor

SIMPLEX_MAPS: dict = {}
"""Every registered map by name: ``f(scores, top_k) -> shares``."""

FLOOR = -1e4
"""Score given to a unit that does not fire, below the row's best: no map gives it a share in float32."""


def register_simplex_map(name):
    """Decorator: make ``f(scores: Tensor, top_k: int | None) -> Tensor`` available as ``name``."""

    def register(function):
        SIMPLEX_MAPS[name] = function
        return function

    return register


def compute_shares(
    name: str, log_kernel: Tensor, temperature: Tensor | float, top_k: int | None = None
) -> Tensor:
    """π = map(log κ / τ); all zero, with zero gradients, where no unit fires (log κ = −inf throughout).

    Args:
        name: a registered simplex map.
        log_kernel: (..., prototypes), float32 or float64, −inf where κ = 0.
        temperature: τ > 0. Toward 0 the shares become one-hot, toward infinity uniform over the support.
        top_k: how many prototypes ``top-k`` keeps; None for the other maps.
    """
    fires = log_kernel != -torch.inf
    finite = log_kernel.where(fires, torch.zeros_like(log_kernel))
    best = log_kernel.detach().amax(-1, keepdim=True)
    best = best.where(best != -torch.inf, torch.zeros_like(best))
    counted = fires | ~fires.any(
        -1, keepdim=True
    )  # a row where nothing fires: equal scores, zeroed below
    scores = ((finite - best) / temperature).where(counted, torch.full_like(finite, FLOOR))
    return SIMPLEX_MAPS[name](scores.clamp_min(FLOOR), top_k) * fires


def top_k_mask(scores: Tensor, top_k: int) -> Tensor:
    """True at the ``top_k`` largest scores of each row (all of them if there are fewer)."""
    chosen = scores.topk(min(top_k, scores.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


@register_simplex_map("softmax")
def softmax(scores, top_k=None):
    """exp(s) / Σ exp(s)."""
    return scores.softmax(-1)


@register_simplex_map("top-k")
def top_k(scores, top_k):
    """Softmax over the ``top_k`` largest scores, exactly zero elsewhere."""
    return scores.masked_fill(~top_k_mask(scores, top_k), -torch.inf).softmax(-1)


@register_simplex_map("threshold")
def threshold(scores, top_k=None):
    """Softmax over the prototypes whose kernel passes the layer's threshold; the readout has struck out the others."""
    return scores.softmax(-1)


@register_simplex_map("sparsemax")
def sparsemax(scores, top_k=None):
    """Euclidean projection onto the simplex (Martins & Astudillo 2016, arXiv:1602.02068, algorithm 1)."""
    with torch.no_grad():
        ordered, rank = _descending(scores)
        thresholds = (ordered.cumsum(-1) - 1) / rank
        threshold = _last_in_support(thresholds, ordered > thresholds)
        support = (scores > threshold).to(scores.dtype)
    weights = support / support.sum(-1, keepdim=True)
    return (scores - _with_gradient(threshold, scores, weights)).relu()


@register_simplex_map("entmax-1.5")
def entmax15(scores, top_k=None):
    """α-entmax at α = 1.5 (Peters et al. 2019, arXiv:1905.05702, algorithm 2)."""
    scores = scores / 2
    with torch.no_grad():
        ordered, rank = _descending(scores)
        mean = ordered.cumsum(-1) / rank
        variance = (ordered.square().cumsum(-1) / rank - mean.square()).clamp_min(0)
        thresholds = mean - (1 / rank - variance).clamp_min(0).sqrt()
        threshold = _last_in_support(thresholds, thresholds <= ordered)
        root = (scores - threshold).relu()
    weights = root / root.sum(-1, keepdim=True)
    return (scores - _with_gradient(threshold, scores, weights)).relu().square()


def _descending(scores):
    """Scores in descending order and their ranks 1, 2, …; those far below the best cannot matter and are
    raised to 4 below it, so that cumulative sums lose no digits to them."""
    ordered = scores.sort(-1, descending=True).values
    ordered = torch.maximum(ordered, ordered[..., :1] - 4)
    return ordered, torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)


def _last_in_support(thresholds, inside):
    return thresholds.gather(-1, inside.sum(-1, keepdim=True) - 1)


def _with_gradient(threshold, scores, weights):
    """The threshold, with its exact derivative dτ/ds = ``weights`` by the implicit function theorem."""
    return threshold + (weights * (scores - scores.detach())).sum(-1, keepdim=True)
