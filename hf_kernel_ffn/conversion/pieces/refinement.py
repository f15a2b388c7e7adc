"""Pieces moved to where they fit better: damped Gauss-Newton steps on angles, shifts and amounts.

Levenberg 1944 and Marquardt 1963, for many small problems side by side: u units, P pieces each, n
tokens. K numbers of a piece move: its amount, its shift and, in a plane, its angle.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint_code.kernels import Kernel
from .planes import Pieces, Planes, compute_scores, typical_size

STEPS = 16
"""Steps for pieces in a plane. On SmolLM2 eight take the unexplained variance to a quarter, and
sixteen take off another third, for three seconds a layer. Pieces along one row gain a fifth and
are left as pursuit found them."""
DAMPING = 0.03
"""Where a unit's damping starts, in units of its squared slopes."""
DAMPING_BOUNDS = (1e-5, 1e3)
RELAX = 3.0
"""What the damping is divided by after a step that lowers the error."""
TIGHTEN = 5.0
"""What it is multiplied by after one that does not and is taken back."""
LARGEST_TURN = 0.3
"""Radians that a piece turns in one step."""


class Problem(NamedTuple):
    """Weighted least squares of u units at n tokens."""

    kernel: Kernel
    parameters: dict[str, Tensor]
    kernel_scale: float
    """What kernels are multiplied by."""
    planes: Planes
    target: Tensor
    """(u, n) what each unit wants, times ``scale``."""
    scale: Tensor
    """(u, n) square roots of the tokens' weights, times u·x where values are a product."""
    price: Tensor
    """(u,) of a squared amount."""


class State(NamedTuple):
    """Where u units stand, and their normal equations there."""

    pieces: Pieces
    error: Tensor
    """(u,)"""
    gram: Tensor
    """(u, K·P, K·P) of the slopes, scaled to norm one."""
    pull: Tensor
    """(u, K·P) of the slopes with what is left of the target."""
    size: Tensor
    """(u, K·P) norms of the slopes."""


def refine_pieces(problem: Problem, pieces: Pieces, steps: int = STEPS) -> Pieces:
    """``pieces`` (P, u) after ``steps``; a unit's error never rises."""
    state = _linearise(problem, pieces)
    units = len(state.error)
    damping = torch.full((units,), DAMPING, device=state.error.device)
    for _ in range(steps):
        gram = state.gram.double()
        gram.diagonal(dim1=1, dim2=2).add_(damping[:, None])
        solution = torch.linalg.solve(gram, state.pull.double()[..., None])[..., 0]
        step = (solution.to(state.size.dtype) / state.size).view(units, -1, len(pieces.shift))
        tried = _linearise(problem, _move_pieces(problem, state.pieces, step))
        better = tried.error < state.error
        state = _choose_per_unit(better, tried, state)
        damping = torch.where(better, damping / RELAX, damping * TIGHTEN).clamp(*DAMPING_BOUNDS)
    return state.pieces


def _linearise(problem: Problem, pieces: Pieces) -> State:
    slopes, value = _compute_slopes(problem, pieces)
    left = problem.target - value
    gram = slopes @ slopes.transpose(1, 2)
    pull = (slopes @ left[..., None])[..., 0]

    amount = pieces.amount.T
    count = amount.shape[1]
    gram.diagonal(dim1=1, dim2=2)[:, :count] += problem.price[:, None]
    pull[:, :count] -= problem.price[:, None] * amount
    error = left.square().sum(1) + (problem.price[:, None] * amount.square()).sum(1)
    size = gram.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-20)
    return State(pieces, error, gram / size[:, None] / size[:, :, None], pull / size, size)


def _compute_slopes(problem: Problem, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """(u, K·P, n) slopes of the units' values by amounts, shifts and angles, and the values (u, n).

    The distance is held fixed: it moves a kernel far less than the score does.
    """
    scale = problem.scale[:, None]
    amount = pieces.amount.T[..., None]
    value, slope = _differentiate_kernel(problem, pieces)
    by_amount = value * scale
    by_shift = slope * scale * amount
    parts = [by_amount, by_shift]
    if pieces.beta is not None:
        ratio = _coordinate_ratio(problem)[:, None, None]
        assert problem.planes.second is not None
        turn = problem.planes.second[:, None] * (pieces.alpha.T[..., None] * ratio)
        turn = turn - problem.planes.first[:, None] * (pieces.beta.T[..., None] / ratio)
        parts.append(by_shift * turn)
    return torch.cat(parts, 1), (by_amount * amount).sum(1)


def _differentiate_kernel(problem: Problem, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """κ and dκ/ds, (u, P, n) each."""
    score, distance2 = compute_scores(problem.kernel, problem.planes, pieces)
    with torch.enable_grad():
        score.requires_grad_(True)
        value = problem.kernel.value(score, distance2, **problem.parameters)
        (slope,) = torch.autograd.grad(value.sum(), score)
    return value.detach() * problem.kernel_scale, slope * problem.kernel_scale


def thin_problem(problem: Problem, every: int) -> Problem:
    """``problem`` at every ``every``-th token, at the same price."""
    return problem._replace(
        planes=problem.planes.select_tokens(slice(None, None, every)),
        target=problem.target[:, ::every],
        scale=problem.scale[:, ::every],
        price=problem.price / every,
    )


def _move_pieces(problem: Problem, pieces: Pieces, step: Tensor) -> Pieces:
    """``pieces`` after ``step`` (u, K, P)."""
    amount = pieces.amount + step[:, 0].T
    shift = pieces.shift + step[:, 1].T
    if pieces.beta is None:
        return pieces._replace(amount=amount, shift=shift)

    turn = step[:, 2].T.clamp(-LARGEST_TURN, LARGEST_TURN)
    ratio = _coordinate_ratio(problem)
    alpha = pieces.alpha * turn.cos() - pieces.beta / ratio * turn.sin()
    beta = pieces.beta * turn.cos() + pieces.alpha * ratio * turn.sin()
    return Pieces(alpha, beta, shift, amount)


def _coordinate_ratio(problem: Problem) -> Tensor:
    """(u,) spread of g·x over that of u·x: what makes angles of the plane comparable."""
    assert problem.planes.second is not None
    return typical_size(problem.planes.first) / typical_size(problem.planes.second)


def _choose_per_unit(better: Tensor, tried: State, state: State) -> State:
    """Per unit ``tried`` where it is ``better`` (u,), else ``state``."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)

    pieces = Pieces(
        *(
            None if new is None or old is None else torch.where(better, new, old)
            for new, old in zip(tried.pieces, state.pieces, strict=True)
        )  # type: ignore[arg-type]
    )
    return State(
        pieces=pieces,
        error=choose(tried.error, state.error),
        gram=choose(tried.gram, state.gram),
        pull=choose(tried.pull, state.pull),
        size=choose(tried.size, state.size),
    )
