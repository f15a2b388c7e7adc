"""Simplex maps: from log-kernels to the shares π of a readout.

Every map takes ``(..., prototypes)`` float32 or float64 scores and returns shares of the same
shape, π ≥ 0 and Σπ = 1. They are computed in the dtype they are given: callers pass at least
float32, since thresholds found in half precision are wrong.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SimplexMap = Callable[[Tensor, int | None], Tensor]
"""``f(scores, top_k) -> shares``."""

SIMPLEX_MAPS: dict[str, SimplexMap] = {}
"""Every registered map by name."""

FLOOR = -1e4
"""Score given to a unit that does not fire, below the row's best: it gets no share in float32."""
OUT_OF_REACH = 4
"""A score this far below the row's best has no share in a sparsemax or entmax-1.5."""


def register_simplex_map(name: str) -> Callable[[SimplexMap], SimplexMap]:
    """Decorator: make ``f(scores: Tensor, top_k: int | None) -> Tensor`` available as ``name``."""

    def register(function: SimplexMap) -> SimplexMap:
        SIMPLEX_MAPS[name] = function
        return function

    return register


def compute_shares(
    name: str, log_kernel: Tensor, temperature: Tensor | float, top_k: int | None = None
) -> Tensor:
    """π = map(log κ / τ); all zero, with zero gradients, where no unit fires.

    Args:
        name: a registered simplex map.
        log_kernel: (..., prototypes), float32 or float64, −inf where κ = 0.
        temperature: τ > 0. Toward 0 the shares become one-hot, toward infinity uniform over the
            support.
        top_k: how many prototypes ``top-k`` keeps; None for the other maps.
    """
    fires = log_kernel != -torch.inf
    finite = log_kernel.where(fires, torch.zeros_like(log_kernel))
    best = log_kernel.detach().amax(-1, keepdim=True)
    best = best.where(best != -torch.inf, torch.zeros_like(best))
    # A row where nothing fires: equal scores, zeroed below.
    counted = fires | ~fires.any(-1, keepdim=True)
    scores = ((finite - best) / temperature).where(counted, torch.full_like(finite, FLOOR))
    return SIMPLEX_MAPS[name](scores.clamp_min(FLOOR), top_k) * fires


def top_k_mask(scores: Tensor, top_k: int) -> Tensor:
    """True at the ``top_k`` largest scores of each row (all of them if there are fewer)."""
    indices = scores.topk(min(top_k, scores.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, True)


@register_simplex_map("softmax")
def softmax(scores: Tensor, top_k: int | None = None) -> Tensor:
    """exp(s) / Σ exp(s)."""
    return scores.softmax(-1)


@register_simplex_map("top-k")
def top_k(scores: Tensor, top_k: int | None) -> Tensor:
    """Softmax over the ``top_k`` largest scores, exactly zero elsewhere."""
    if top_k is None:
        raise TypeError("the simplex map 'top-k' needs to know how many prototypes it keeps")
    return scores.masked_fill(~top_k_mask(scores, top_k), -torch.inf).softmax(-1)


@register_simplex_map("threshold")
def threshold(scores: Tensor, top_k: int | None = None) -> Tensor:
    """Softmax over the prototypes that pass the layer's threshold; the readout cut the others."""
    return scores.softmax(-1)


@register_simplex_map("sparsemax")
def sparsemax(scores: Tensor, top_k: int | None = None) -> Tensor:
    """Euclidean projection onto the simplex (Martins & Astudillo 2016, arXiv:1602.02068).

    By its algorithm 1.
    """
    with torch.no_grad():
        ordered, rank = _sort_descending(scores)
        candidates = (ordered.cumsum(-1) - 1) / rank
        cut = _take_last_in_support(candidates, ordered > candidates)
        support = (scores > cut).to(scores.dtype)
    weights = support / support.sum(-1, keepdim=True)
    return (scores - _with_gradient(cut, scores, weights)).relu()


@register_simplex_map("entmax-1.5")
def entmax15(scores: Tensor, top_k: int | None = None) -> Tensor:
    """α-entmax at α = 1.5 (Peters et al. 2019, arXiv:1905.05702, algorithm 2)."""
    scores = scores / 2
    with torch.no_grad():
        ordered, rank = _sort_descending(scores)
        mean = ordered.cumsum(-1) / rank
        variance = (ordered.square().cumsum(-1) / rank - mean.square()).clamp_min(0)
        candidates = mean - (1 / rank - variance).clamp_min(0).sqrt()
        cut = _take_last_in_support(candidates, candidates <= ordered)
        root = (scores - cut).relu()
    weights = root / root.sum(-1, keepdim=True)
    return (scores - _with_gradient(cut, scores, weights)).relu().square()


def _sort_descending(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in descending order, and their ranks 1, 2, ….

    Those far below the best cannot matter; they are raised, so that cumulative sums lose no
    digits to them.
    """
    ordered = scores.sort(-1, descending=True).values
    ordered = torch.maximum(ordered, ordered[..., :1] - OUT_OF_REACH)
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    return ordered, rank


def _take_last_in_support(candidates: Tensor, inside: Tensor) -> Tensor:
    """The candidate (..., 1) of the last rank that is ``inside`` the support."""
    return candidates.gather(-1, inside.sum(-1, keepdim=True) - 1)


def _with_gradient(cut: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
    """The threshold ``cut``, with its exact derivative by the scores.

    By the implicit function theorem that is ``weights``.
    """
    return cut + (weights * (scores - scores.detach())).sum(-1, keepdim=True)
