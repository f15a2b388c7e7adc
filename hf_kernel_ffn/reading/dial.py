"""Temperature from one-hot to centroid, and the three retrieval regimes on the way.

A softmax over stored prototypes and a weighted readout are one retrieval step of a modern Hopfield
network, whose fixed points are a single pattern, a metastable average over a few, or the global
mean (Ramsauer et al. 2020, arXiv:2008.02217).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.record import Readout
from .regimes import shares
from .rows import Rows

TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)
MOST = 0.9
"""The mass by which patterns count as retrieved: Ramsauer et al. count the fewest patterns that
hold 90% of the softmax's mass."""
GLOBAL = 0.5
"""It is the global mean if no fewer than this part of the patterns hold that mass (a uniform
mixture needs 90% of them)."""
SUM_TOLERANCE = 1e-3
"""How far the sum of shares may be from one."""


class Dial(NamedTuple):
    """One token's mixture at one temperature."""

    temperature: float
    entropy: float
    """Nats."""
    effective: float
    """1/Σπ²."""
    largest: float
    """The largest share."""
    retrieval: str
    """single, metastable or global mean, by :func:`retrieval`."""
    from_top: float
    """‖Σπv − v_top‖ over ‖v_top − centroid‖: 0 at the top prototype, 1 at the
    centroid; zero where the two are one point."""
    from_centroid: float
    """‖Σπv − centroid‖ over the same: 1 and 0."""


@torch.no_grad()
def dial(
    readout: Readout,
    place: int = -1,
    temperatures: Sequence[float] = TEMPERATURES,
    support: bool = False,
) -> Rows[Dial]:
    """Turn the temperature of one token's mixture, of a kernel readout or an attention head.

    Shares are ∝ c^(1/τ) on the support. At τ = 1 they are the record's own; toward 0 the top
    prototype (or the mean of those that tie), toward infinity the support's centroid. For a
    softmax this is the layer's own temperature, relative to the one it has; a truncated map would
    change its support as well.

    Args:
        place: row of the coefficients (tokens, prototypes).
        support: only prototypes that fire count as stored patterns; for an attention head those are
            the tokens that the position sees. Otherwise all do, and a mixture of few prototypes is
            metastable at best, however flat.

    Raises:
        InputError: the record is signed, nothing fires at this token, or a temperature is not
            positive.
    """
    if (readout.coefficients < 0).any():
        raise InputError(
            "found a signed record, expected nonnegative coefficients: an untouched FFN has no "
            "temperature; read a converted layer or an attention head"
        )
    if not temperatures or not all(0 < temperature < math.inf for temperature in temperatures):
        raise InputError(
            f"found temperatures {list(temperatures)}, expected positive finite numbers"
        )
    own_shares = shares(readout)[place]
    fires = own_shares > 0
    if not fires.any():
        raise InputError(
            f"found nothing firing at place {place}, expected a mixture: choose another token"
        )
    dictionary = readout.dictionary.double()[fires]
    logs = own_shares[fires].log()
    top = dictionary[logs.argmax()]
    centroid = dictionary.mean(0)
    scale = (top - centroid).norm()

    table = Rows[Dial]()
    for temperature in temperatures:
        turned = ((logs - logs.max()) / temperature).softmax(-1)
        patterns = turned
        if not support:
            patterns = torch.zeros_like(own_shares).masked_scatter(fires, turned)
        point = turned @ dictionary
        table.append(
            Dial(
                temperature=temperature,
                entropy=-torch.special.xlogy(turned, turned).sum().item(),
                effective=1 / turned.square().sum().item(),
                largest=turned.max().item(),
                retrieval=retrieval(patterns),
                from_top=_measure_distance(point, top, scale),
                from_centroid=_measure_distance(point, centroid, scale),
            )
        )
    return table


def _measure_distance(point: Tensor, end: Tensor, scale: Tensor) -> float:
    """Distance between two points over ``scale``; zero where that is zero."""
    return ((point - end).norm() / scale).nan_to_num(0.0).item()


def retrieval(shares: Tensor) -> str:
    """Say which of a Hopfield network's three kinds of fixed point a mixture is like.

    Args:
        shares: (patterns,), nonnegative and summing to one.

    Returns:
        ``single`` if one pattern holds :data:`MOST` of the mass, ``global mean`` if it takes at
        least :data:`GLOBAL` of all patterns to hold it, else ``metastable``.

    Raises:
        InputError: the shares are no mixture.
    """
    exact = shares.double()
    if exact.ndim != 1 or (exact < 0).any() or abs(exact.sum().item() - 1) > SUM_TOLERANCE:
        raise InputError(
            f"found shares of shape {tuple(exact.shape)} and sum {exact.sum():.4g}, expected one "
            "mixture, (patterns,) and sum 1"
        )
    if exact.max() >= MOST:
        return "single"
    held = exact.sort(descending=True).values.cumsum(0)
    needed = 1 + int((held < MOST - 1e-9).sum())
    return "global mean" if needed >= GLOBAL * len(exact) else "metastable"
