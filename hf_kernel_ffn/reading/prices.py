"""What it costs to write in a direction with nonnegative coefficients, and the linear programmes
behind it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError, MissingPackage
from ..checkpoint_code.record import Readout
from .rows import Rows

RANK = 1e-6
"""Singular values of a dictionary below this share of the largest are rounding: a head's float32
rows span head_dim dimensions."""
OUTSIDE_SPAN = 10 * RANK
"""A unit vector further than this from a dictionary's span cannot be written."""
TAKES_PART = 1e-9
"""Coefficients below this are rounding of the solver."""


class Price(NamedTuple):
    """The least mass Σ c_i‖v_i‖ that writes a unit vector in one direction; at least one, by
    the triangle inequality."""

    direction: int
    """Row of the directions."""
    nonnegative: float
    """With c ≥ 0; infinite if the direction is outside of the cone of the dictionary."""
    signed: float
    """With signs free; infinite if it is outside of the dictionary's span."""
    ratio: float
    """nonnegative / signed: what nonnegativity costs."""
    prototypes: int
    """How many take part in the cheapest nonnegative writing."""


@torch.no_grad()
def write_price(dictionary: Readout | Tensor, directions: Tensor) -> Rows[Price]:
    """Price what each of ``directions`` costs to write, dearest first.

    Two linear programmes each, min Σ c_i‖v_i‖ subject to Vᵀc = u, with c ≥ 0 and with free
    signs: half a second each at 1024 prototypes of width 192.

    Args:
        dictionary: a record, or its rows (P, d).
        directions: (count, d), taken at unit length; :func:`principal_directions` of a layer's
            outputs are the ones that matter to it.

    Raises:
        InputError: a direction is zero or of another width.
        MissingPackage: scipy is not installed.
    """
    rows = dictionary.dictionary if isinstance(dictionary, Readout) else dictionary
    rows = rows.detach().double()
    targets = directions.detach().double()
    if (
        targets.ndim != 2
        or targets.shape[1] != rows.shape[1]
        or not (targets.norm(dim=-1) > 0).all()
    ):
        raise InputError(
            f"found directions of shape {tuple(targets.shape)}, expected rows of {rows.shape[1]} "
            "numbers, none of them zero"
        )
    # At unit length: the price of a row is then one.
    unit_rows = nn.functional.normalize(rows[rows.norm(dim=-1) > 0], dim=-1)
    basis = span(unit_rows)
    coordinates = unit_rows @ basis.T
    units = nn.functional.normalize(targets, dim=-1)

    prices: list[Price] = []
    for number, unit in enumerate(units):
        target = basis @ unit
        if (unit - target @ basis).norm() > OUTSIDE_SPAN:
            prices.append(Price(number, math.inf, math.inf, math.inf, 0))
            continue
        if number and (unit + units[number - 1]).norm() < RANK:
            signed = prices[-1].signed  # of the opposite direction: the same
        else:
            signed = _price_with_signs(coordinates, target, number)
        prices.append(_price_nonnegative(coordinates, target, number, signed))
    return Rows(sorted(prices, key=lambda price: -price.nonnegative))


def _price_nonnegative(coordinates: Tensor, target: Tensor, number: int, signed: float) -> Price:
    """The price of ``target`` (rank,) by nonnegative coefficients of ``coordinates`` (P, rank)."""
    cheapest = minimise(torch.ones(len(coordinates)), coordinates.T, target)
    if cheapest is None:
        return Price(number, math.inf, signed, math.inf, 0)
    price = cheapest.sum().item()
    return Price(number, price, signed, price / signed, int((cheapest > TAKES_PART).sum()))


def _price_with_signs(coordinates: Tensor, target: Tensor, number: int) -> float:
    """The price of ``target`` (rank,) where rows may be taken with either sign."""
    both_signs = torch.cat([coordinates, -coordinates])
    cheapest = minimise(torch.ones(len(both_signs)), both_signs.T, target)
    if cheapest is None:
        raise InputError(
            f"found no writing of direction {number}, which the dictionary spans: scale the "
            "dictionary"
        )
    return cheapest.sum().item()


def principal_directions(outputs: Tensor, count: int = 8) -> Tensor:
    """(2·count, d) unit vectors: plus and minus each of the first principal directions of
    ``outputs`` (tokens, d) around their mean (fewer if the outputs span fewer), as +1, −1, +2,
    −2, …"""
    centred = outputs.detach().double().flatten(0, -2)
    first = span(centred - centred.mean(0))[:count]
    return torch.stack([first, -first], 1).flatten(0, 1)


def span(rows: Tensor) -> Tensor:
    """(rank, d) orthonormal rows that span those of ``rows`` (n, d), most important first."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors[values > RANK * values[:1].clamp_min(1e-300)]


def minimise(cost: Tensor, equalities: Tensor, targets: Tensor) -> Tensor | None:
    """Find the least ``cost`` (n,) over {x ≥ 0, ``equalities`` (m, n) x = ``targets`` (m,)}.

    Returns:
        (n,) float64: a vertex of that set, by the dual simplex; None if the set is empty.

    Raises:
        MissingPackage: scipy is not installed.
        InputError: the solver gives up.
    """
    try:
        from scipy.optimize import linprog
    except ImportError as error:
        raise MissingPackage(
            "linear programmes need scipy: pip install 'hf-kernel-ffn[read]'"
        ) from error
    result = linprog(
        cost.double().cpu().numpy(),
        A_eq=equalities.double().cpu().numpy(),
        b_eq=targets.double().cpu().numpy(),
        method="highs-ds",
    )
    if result.status == 2:
        return None
    if result.status != 0:
        raise InputError(
            "found no solution of a linear programme, expected one: the solver says "
            f"{result.message!r}"
        )
    return torch.from_numpy(result.x).to(equalities.device)
