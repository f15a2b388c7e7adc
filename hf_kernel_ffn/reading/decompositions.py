"""Other mixtures of the same output: what of a decomposition is forced, and what only the mechanism chose.

With more prototypes than dimensions a point of their hull may be mixed in many ways. Carathéodory (1911): some mixture needs at most
d + 1 of them. That none of this changes the output is why a share is a fact about the readout that made it (Bouhsine 2026, "The Readout
is a Convex Combination of Prototypes"). But a mixture of few may be the only one, even over all prototypes: sparse nonnegative
solutions are unique where the hull is neighbourly (Donoho & Tanner 2005, PNAS 102:9446). :func:`share_spread` tells. The total Σc is
kept throughout: what is asked is how the same mass could have been shared out. Results are on the CPU, where the solver is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.record import Readout
from .prices import minimise, span
from .regimes import shares
from .rows import Rows

EXACT = 1e-6
"""Furthest that a decomposition's output may be from the record's, relative to Σπ‖v‖; those found are about 1e-14 from it."""
FORCED = 1e-6
"""A share whose largest and smallest possible values are this close is forced; shares this close are equal."""
TRIES = 4
"""Directions tried for each alternative wanted: two may end in one vertex."""


class _Mixtures(NamedTuple):
    """All shares π with Σπ = 1 and the same Σπv: {π ≥ 0, equalities @ π[kept] = targets}."""

    own: Tensor
    """(P,) the record's."""
    dictionary: Tensor
    """(P, d)."""
    kept: Tensor
    """(n,) rows of the dictionary that may take part."""
    equalities: Tensor
    """(rank + 1, n)."""
    targets: Tensor
    """(rank + 1,)."""


@torch.no_grad()
def caratheodory(readout: Readout, place: int = -1) -> Tensor:
    """(P,) float64 coefficients with the same Σ c v and the same Σ c as those at ``place`` of (tokens, P), at most d + 1 of them not
    zero, all among the record's own. Intensity and output stay, only the choice is another. Needs no solver.

    Raises:
        InputError: the record is signed, nothing fires there, or the output was not reached to 1e-6.
    """
    mixtures = _mixtures(readout, place, support=True)
    equalities, rank = mixtures.equalities, len(mixtures.targets)
    x, alive = (
        mixtures.own[mixtures.kept].clone(),
        torch.zeros_like(mixtures.kept, dtype=torch.bool),
    )
    for some in mixtures.kept.new_tensor(range(len(x))).split(
        rank
    ):  # in portions: a null space of all would be n² large
        alive[some] = True
        active = alive.nonzero()[:, 0]
        x[active] = _eliminate(x[active], equalities[:, active])
        alive = x > 0
    return _exact(mixtures, x) * readout.coefficients[place].double().sum().item()


@torch.no_grad()
def alternatives(
    readout: Readout, place: int = -1, count: int = 5, seed: int = 0, support: bool = False
) -> Tensor:
    """(count or fewer, P) float64 shares that give the same Σπv as those at ``place`` of (tokens, P), all different: the record's own
    in row 0, then vertices of the set of all such shares, in random directions. One row: the decomposition is the only one. Fewer
    than ``count``: the set has few vertices.

    Args:
        support: only prototypes that fire may take part; for an attention head those are the tokens that the position sees.

    Raises:
        InputError: the record is signed, nothing fires there, or the solver missed the output.
    """
    mixtures = _mixtures(readout, place, support)
    generator, found = torch.Generator().manual_seed(seed), [mixtures.own]
    for attempt in range(TRIES * (count - 1)):
        if len(found) == count or (attempt == 2 and len(found) == 1):
            break  # enough; or the same shares are least and most in a random direction: with probability one there are no others
        if attempt % 2 == 0:
            cost = torch.randn(len(mixtures.own), generator=generator, dtype=torch.float64)
        other = _vertex(mixtures, cost if attempt % 2 == 0 else -cost)
        if all((other - known).abs().max() > FORCED for known in found):
            found.append(other)
    return torch.stack(found)


class Spread(NamedTuple):
    """What one prototype's share could be without changing the output."""

    name: str
    prototype: int
    """Row of the dictionary."""
    share: float
    """Its own."""
    least: float
    most: float
    """Over all decompositions of the same output."""
    forced: bool
    """least and most are one number: the share can be read off the output."""


@torch.no_grad()
def share_spread(
    readout: Readout, place: int = -1, top: int = 10, support: bool = False
) -> Rows[Spread]:
    """How far the largest ``top`` shares at ``place`` of (tokens, P) are free, by two linear programmes each (seconds for a thousand
    prototypes). Arguments and errors as for :func:`alternatives`."""
    mixtures, found = _mixtures(readout, place, support), Rows[Spread]()
    for i in mixtures.own.argsort(descending=True, stable=True)[:top].tolist():
        own = mixtures.own[i].item()
        if own == 0:
            break
        cost = torch.zeros_like(mixtures.own)
        cost[i] = 1.0
        ends = [_vertex(mixtures, sign * cost)[i].item() for sign in (1, -1)]
        least, most = min(own, *ends), max(own, *ends)
        found.append(Spread(readout.names[i], i, own, least, most, most - least <= FORCED))
    return found


def _mixtures(readout: Readout, place: int, support: bool) -> _Mixtures:
    own, v = shares(readout)[place].cpu(), readout.dictionary.double().cpu()
    if not (own > 0).any():
        raise InputError(
            f"found nothing firing at place {place}, expected a mixture: choose another token"
        )
    kept = (own > 0).nonzero()[:, 0] if support else torch.arange(len(own))
    # In coordinates of the rows' own span, at unit size: a head's rows span head_dim dimensions; the solver's tolerance is absolute.
    centred = v - own @ v
    centred = centred / centred.square().mean().sqrt().clamp_min(1e-300)
    coordinates = centred[kept] @ span(centred[kept]).T
    ones = own.new_ones(1, len(kept))
    targets = torch.cat([coordinates.new_zeros(coordinates.shape[1]), ones[0, :1]])
    return _Mixtures(own, v, kept, torch.cat([coordinates.T, ones]), targets)


def _eliminate(x: Tensor, equalities: Tensor) -> Tensor:
    """x ≥ 0 (n,) with the same ``equalities`` (m, n) @ x and at most m numbers that are not zero: a step along a null vector until one
    number is zero, then only null vectors that leave it so (Carathéodory's own proof, on an orthonormal basis)."""
    null = torch.linalg.qr(equalities.T, mode="complete").Q[:, len(equalities) :].contiguous()
    free = torch.ones_like(x, dtype=torch.bool)
    while null.shape[1]:
        step = null[:, 0]
        reach = (x / step).where(free & (step > 1e-14), torch.inf)
        first = int(reach.argmin())
        x = (x - reach[first] * step).clamp_min(0) * free
        x[first], free[first] = 0.0, False
        # Householder: all of the row's length into the first null vector, which is dropped.
        mirror = null[first].clone()
        mirror[0] += mirror.norm().copysign(mirror[0])
        mirror /= mirror.norm()
        null = null.addr_(null @ mirror, mirror, alpha=-2)[:, 1:]
    return x


def _vertex(mixtures: _Mixtures, cost: Tensor) -> Tensor:
    """(P,) the shares of the least ``cost`` (P,)."""
    size = len(mixtures.kept)
    x = minimise(
        cost[mixtures.kept], mixtures.equalities, mixtures.targets * size
    )  # shares near one: tolerances are absolute
    return _exact(mixtures, mixtures.own.new_zeros(size) if x is None else x / size)


def _exact(mixtures: _Mixtures, x: Tensor) -> Tensor:
    """(P,) the shares ``x`` (n,) with their rounding put right over those that are not zero."""
    basis = (x > 1e-9 * x.max()).nonzero()[:, 0]
    some = mixtures.equalities[:, basis]
    rounding = mixtures.targets - some @ x[basis]
    exact = x[basis] + torch.linalg.lstsq(some, rounding[:, None], driver="gelsd").solution[:, 0]
    found = torch.zeros_like(mixtures.own)
    found[mixtures.kept[basis]] = exact.clamp_min(0)
    off = ((found - mixtures.own) @ mixtures.dictionary).norm() / (
        mixtures.own @ mixtures.dictionary.norm(dim=-1)
    )
    if not (
        off <= EXACT
        and abs(found.sum().item() - 1) <= EXACT
        and (found > 0).sum() <= len(mixtures.targets)
    ):
        raise InputError(
            f"found no decomposition to {EXACT:g} of the output (the nearest is {off:.1g} off), expected one: its prototypes are "
            "too nearly dependent; choose another token or support=True"
        )
    return found
