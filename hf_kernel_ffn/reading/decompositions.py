"""Other mixtures of the same output: what of a decomposition is forced, and what the mechanism
chose.

With more prototypes than dimensions a point of their hull may be mixed in many ways. Carathéodory
(1911): some mixture needs at most d + 1 of them. That none of this changes the output is why a
share is a fact about the readout that made it (Bouhsine 2026, "The Readout is a Convex Combination
of Prototypes"). But a mixture of few may be the only one, even over all prototypes: sparse
nonnegative solutions are unique where the hull is neighbourly (Donoho & Tanner 2005, PNAS
102:9446). :func:`share_spread` tells. The total Σc is kept throughout: what is asked is how the
same mass could have been shared out. Results are on the CPU, where the solver is.
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
"""Furthest that a decomposition's output may be from the record's, relative to Σπ‖v‖; those
found are about 1e-14 from it."""
FORCED = 1e-6
"""A share whose largest and smallest possible values are this close is forced; shares this close
are equal."""
TRIES = 4
"""Directions tried for each alternative wanted: two may end in one vertex."""
ZERO = 1e-9
"""A share below this part of the largest is the solver's rounding of zero."""
LEVEL = 1e-14
"""A step that moves a share by less than this leaves it as it is."""


class _Mixtures(NamedTuple):
    """All shares π with Σπ = 1 and the same Σπv.

    They are {π ≥ 0, equalities @ π[kept] = targets}.
    """

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
    """Find coefficients with the same Σ c v and the same Σ c, of which at most d + 1 are not zero.

    All are among the record's own. Intensity and output stay, only the choice is another. Needs no
    solver.

    Args:
        place: row of the record's coefficients (tokens, P).

    Returns:
        (P,) float64.

    Raises:
        InputError: the record is signed, nothing fires there, or the output was not reached to
            1e-6.
    """
    mixtures = _read_mixtures(readout, place, support=True)
    own = mixtures.own[mixtures.kept].clone()
    alive = torch.zeros_like(mixtures.kept, dtype=torch.bool)
    # In portions: a null space of all prototypes would be n² large.
    for portion in torch.arange(len(own)).split(len(mixtures.targets)):
        alive[portion] = True
        active = alive.nonzero()[:, 0]
        own[active] = _eliminate(own[active], mixtures.equalities[:, active])
        alive = own > 0
    return _make_exact(mixtures, own) * readout.coefficients[place].double().sum().item()


@torch.no_grad()
def alternatives(
    readout: Readout, place: int = -1, count: int = 5, *, seed: int = 0, support: bool = False
) -> Tensor:
    """Find other shares that give the same Σπv.

    They are vertices of the set of all such shares, in random directions.

    Args:
        place: row of the record's coefficients (tokens, P).
        support: only prototypes that fire may take part; for an attention head those are the tokens
            that the position sees.

    Returns:
        (count or fewer, P) float64, all different, the record's own in row 0. One row: the
        decomposition is the only one. Fewer than ``count``: the set has few vertices.

    Raises:
        InputError: the record is signed, nothing fires there, or the solver missed the output.
    """
    mixtures = _read_mixtures(readout, place, support)
    generator = torch.Generator().manual_seed(seed)
    different = [mixtures.own]
    for _ in range(TRIES * (count - 1) // 2):
        direction = torch.randn(len(mixtures.own), generator=generator, dtype=torch.float64)
        for cost in (direction, -direction):
            if len(different) == count:
                return torch.stack(different)
            vertex = _find_vertex(mixtures, cost)
            if all((vertex - known).abs().max() > FORCED for known in different):
                different.append(vertex)
        if len(different) == 1:
            # The same shares are least and most in a random direction: with probability one there
            # are no others.
            break
    return torch.stack(different)


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
    """Find how far the largest ``top`` shares at ``place`` of (tokens, P) are free.

    By two linear programmes each (seconds for a thousand prototypes). Arguments and errors as for
    :func:`alternatives`.
    """
    mixtures = _read_mixtures(readout, place, support)
    table = Rows[Spread]()
    for prototype in mixtures.own.argsort(descending=True, stable=True)[:top].tolist():
        share = mixtures.own[prototype].item()
        if share == 0:
            break
        cost = torch.zeros_like(mixtures.own)
        cost[prototype] = 1.0
        ends = [_find_vertex(mixtures, sign * cost)[prototype].item() for sign in (1, -1)]
        least = min(share, *ends)
        most = max(share, *ends)
        is_forced = most - least <= FORCED
        name = readout.names[prototype]
        table.append(Spread(name, prototype, share, least, most, is_forced))
    return table


def _read_mixtures(readout: Readout, place: int, support: bool) -> _Mixtures:
    """The set of all mixtures with the output at ``place``; InputError if nothing fires there."""
    own = shares(readout)[place].cpu()
    dictionary = readout.dictionary.double().cpu()
    if not (own > 0).any():
        raise InputError(
            f"found nothing firing at place {place}, expected a mixture: choose another token"
        )
    kept = (own > 0).nonzero()[:, 0] if support else torch.arange(len(own))
    # In coordinates of the rows' own span, at unit size: a head's rows span head_dim dimensions;
    # the solver's tolerance is absolute.
    centred = dictionary - own @ dictionary
    centred = centred / centred.square().mean().sqrt().clamp_min(1e-300)
    coordinates = centred[kept] @ span(centred[kept]).T
    ones = own.new_ones(1, len(kept))
    targets = torch.cat([coordinates.new_zeros(coordinates.shape[1]), ones[0, :1]])
    return _Mixtures(own, dictionary, kept, torch.cat([coordinates.T, ones]), targets)


def _eliminate(x: Tensor, equalities: Tensor) -> Tensor:
    """Shares with the same ``equalities`` (m, n) @ x, of which at most m are not zero.

    A step along a null vector until one share is zero, then only null vectors that leave it so:
    Carathéodory's own proof, on an orthonormal basis.

    Args:
        x: (n,) shares, none negative.
    """
    null = torch.linalg.qr(equalities.T, mode="complete").Q[:, len(equalities) :].contiguous()
    free = torch.ones_like(x, dtype=torch.bool)
    while null.shape[1]:
        step = null[:, 0]
        reach = (x / step).where(free & (step > LEVEL), torch.inf)
        first = int(reach.argmin())
        x = (x - reach[first] * step).clamp_min(0) * free
        x[first] = 0.0
        free[first] = False
        # Householder: all of the row's length into the first null vector, which is dropped.
        mirror = null[first].clone()
        mirror[0] += mirror.norm().copysign(mirror[0])
        mirror /= mirror.norm()
        null = null.addr_(null @ mirror, mirror, alpha=-2)[:, 1:]
    return x


def _find_vertex(mixtures: _Mixtures, cost: Tensor) -> Tensor:
    """(P,) the shares of the least ``cost`` (P,)."""
    size = len(mixtures.kept)
    # Shares near one: the solver's tolerances are absolute.
    scaled = minimise(cost[mixtures.kept], mixtures.equalities, mixtures.targets * size)
    x = mixtures.own.new_zeros(size) if scaled is None else scaled / size
    return _make_exact(mixtures, x)


def _make_exact(mixtures: _Mixtures, x: Tensor) -> Tensor:
    """(P,) the shares ``x`` (n,) with their rounding put right over those that are not zero."""
    basis = (x > ZERO * x.max()).nonzero()[:, 0]
    columns = mixtures.equalities[:, basis]
    rounding = mixtures.targets - columns @ x[basis]
    correction = torch.linalg.lstsq(columns, rounding[:, None], driver="gelsd").solution[:, 0]
    exact = torch.zeros_like(mixtures.own)
    exact[mixtures.kept[basis]] = (x[basis] + correction).clamp_min(0)

    moved = ((exact - mixtures.own) @ mixtures.dictionary).norm()
    off = moved / (mixtures.own @ mixtures.dictionary.norm(dim=-1))
    is_decomposition = (
        off <= EXACT
        and abs(exact.sum().item() - 1) <= EXACT
        and (exact > 0).sum() <= len(mixtures.targets)
    )
    if not is_decomposition:
        raise InputError(
            f"found no decomposition to {EXACT:g} of the output (the nearest is {off:.1g} off), "
            "expected one: its prototypes are too nearly dependent; choose another token or "
            "support=True"
        )
    return exact
