"""What it costs to write in a direction with nonnegative coefficients, and the linear programmes behind it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.record import Readout
from .rows import Rows

RANK = 1e-6
"""Singular values of a dictionary below this share of the largest are rounding: a head's float32 rows span head_dim dimensions."""


class Price(NamedTuple):
    """The least mass Σ c_i‖v_i‖ that writes a unit vector in one direction; at least one, by the triangle inequality."""

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
    """What each of ``directions`` (count, d) costs to write, dearest first: two linear programmes each,
    min Σ c_i‖v_i‖ subject to Vᵀc = u, with c ≥ 0 and with free signs (half a second each at 1024 prototypes of width 192).

    Args:
        dictionary: a record, or its rows (P, d).
        directions: taken at unit length; :func:`principal_directions` of a layer's outputs are the ones that matter to it.

    Raises:
        InputError: a direction is zero or of another width, or scipy is not installed.
    """
    v = (dictionary.dictionary if isinstance(dictionary, Readout) else dictionary).detach().double()
    u = directions.detach().double()
    if u.ndim != 2 or u.shape[1] != v.shape[1] or not (u.norm(dim=-1) > 0).all():
        raise InputError(
            f"found directions of shape {tuple(u.shape)}, expected rows of {v.shape[1]} numbers, none of them zero"
        )
    v = nn.functional.normalize(
        v[v.norm(dim=-1) > 0], dim=-1
    )  # the price of a unit vector is then one
    basis = span(v)
    coordinates, found = v @ basis.T, []
    u = nn.functional.normalize(u, dim=-1)
    for number, one in enumerate(u):
        target = basis @ one
        if (one - target @ basis).norm() > 10 * RANK:
            found.append(Price(number, math.inf, math.inf, math.inf, 0))
            continue
        c = minimise(torch.ones(len(v)), coordinates.T, target)
        if number and (one + u[number - 1]).norm() < RANK:
            free = found[-1].signed  # of the opposite direction: the same
        else:
            signed = minimise(
                torch.ones(2 * len(v)), torch.cat([coordinates, -coordinates]).T, target
            )
            if signed is None:
                raise InputError(
                    f"found no writing of direction {number}, which the dictionary spans: scale the dictionary"
                )
            free = signed.sum().item()
        price = math.inf if c is None else c.sum().item()
        found.append(
            Price(number, price, free, price / free, 0 if c is None else int((c > 1e-9).sum()))
        )
    return Rows(sorted(found, key=lambda row: -row.nonnegative))


def principal_directions(outputs: Tensor, count: int = 8) -> Tensor:
    """(2·count, d) unit vectors: plus and minus each of the first principal directions of ``outputs`` (tokens, d) around their mean
    (fewer if the outputs span fewer), as +1, −1, +2, −2, …"""
    centred = outputs.detach().double().flatten(0, -2)
    first = span(centred - centred.mean(0))[:count]
    return torch.stack([first, -first], 1).flatten(0, 1)


def span(rows: Tensor) -> Tensor:
    """(rank, d) orthonormal rows that span those of ``rows`` (n, d), most important first."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors[values > RANK * values[:1].clamp_min(1e-300)]


def minimise(cost: Tensor, equalities: Tensor, targets: Tensor) -> Tensor | None:
    """(n,) float64: a vertex of {x ≥ 0, equalities (m, n) x = targets (m,)} with the least cost (n,), by the dual simplex; None if
    there is no such x. InputError if scipy is not installed or the solver gives up."""
    try:
        from scipy.optimize import linprog
    except ImportError as error:
        raise InputError(
            "linear programmes need scipy: pip install 'hf-kernel-ffn[read]'"
        ) from error
    arrays = [tensor.double().cpu().numpy() for tensor in (cost, equalities, targets)]
    result = linprog(arrays[0], A_eq=arrays[1], b_eq=arrays[2], method="highs-ds")
    if result.status == 2:
        return None
    if result.status != 0:
        raise InputError(
            f"found no solution of a linear programme, expected one: the solver says {result.message!r}"
        )
    return torch.from_numpy(result.x).to(equalities.device)
