"""Which kernels stand in for a unit: orthogonal matching pursuit over candidates in its plane.

Pati, Rezaiifar and Krishnaprasad 1993; the columns chosen are swept out of the others (orthogonal
least squares), so that each step takes the candidate that leaves the least error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checkpoint_code.kernels import Kernel
from .planes import Pieces, Planes, typical_size

OUTWARD_KNOTS = (0.0, 0.2, 0.4, 0.7, 1.0, 1.4, 1.8, 2.3, 3.0, 4.0, 6.0, 9.0, 14.0, 25.0)
"""Where pieces along one row start, in typical sizes of its product. Both sides start at zero or
beyond and grow outward: as near as pieces that start anywhere, with less cancellation between
them."""
SHIFTS = (-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)
"""Shifts of pieces anywhere in the plane, in the same unit."""
ANGLES = 12
"""Directions of pieces in the plane, evenly spaced."""
UNBOUNDED = (0, len(OUTWARD_KNOTS))
"""The line candidates that start at zero, one a side: every unit takes both. A unit whose sample
lies on one side would otherwise write nothing on the other."""
COLLINEAR = 1e-3
"""A candidate is passed over when less than this share of it is new beside those chosen. At 1e-4
twins are taken whose difference is anything off the sample."""
JITTER = 1e-6
"""Added to the squared norms, one each, of the columns that are fitted together."""
PLANE_PRICE = 3e-7
"""Price of a squared amount, in energies of a piece with a typical score at every token. It
silences pieces that fire barely and at a few tokens: without it they get amounts of ten
thousand."""
LINE_PRICE = 1e-9
"""The same of pieces along one row, which design points hold already."""
FAR_KNOT = 4.0
"""Where a knot stands that no token reaches, in largest products of the unit with its row."""


def make_line_candidates(first: Tensor) -> Pieces:
    """Pieces relu(±g·x + b), b ≤ 0; ``first`` (u, n) the products with the rows g."""
    size = typical_size(first)
    table = [(side, -knot) for side in (1.0, -1.0) for knot in OUTWARD_KNOTS]
    side, shift = first.new_tensor(table).T[..., None]
    alpha = side.expand(-1, len(size))
    return Pieces(alpha, None, shift * size, torch.zeros_like(alpha))


def make_knot_candidates(first: Tensor) -> Pieces:
    """Pieces with knots on either side of zero, the farthest first; ``first`` (u, n) the products
    with the rows g, design points among them."""
    size = typical_size(first)
    far = FAR_KNOT * first.abs().amax(1).clamp_min(1e-6)
    knots = torch.cat([far[None], first.new_tensor(OUTWARD_KNOTS[1:])[:, None] * size])
    knot = torch.cat([knots, -knots])
    one = torch.ones_like(knot)
    zero = torch.zeros_like(knot)
    return Pieces(alpha=one, beta=None, shift=zero, amount=zero, knot=knot)


def make_plane_candidates(first: Tensor, second: Tensor) -> Pieces:
    """Pieces in ``ANGLES`` directions of the plane, its coordinates scaled to a like spread."""
    size = typical_size(first)
    ratio = size / typical_size(second)
    table = [
        (2 * math.pi * (number + 0.5) / ANGLES, shift)
        for number in range(ANGLES)
        for shift in SHIFTS
    ]
    angle, shift = first.new_tensor(table).T[..., None]
    alpha = angle.cos().expand(-1, len(size))
    return Pieces(alpha, angle.sin() * ratio, shift * size, torch.zeros_like(alpha))


def choose_pieces(
    *,
    candidates: Pieces,
    values: Tensor,
    target: Tensor,
    price: Tensor,
    count: int,
    first: Sequence[int] = (),
) -> Pieces:
    """The ``count`` candidates of each unit that fit its target best, with their amounts.

    Args:
        candidates: (C, u) each.
        values: (u, C, n) their kernels, times the square roots of the tokens' weights; overwritten.
        target: (u, n) what the unit wants, times the same.
        price: (u,) of a squared amount.
        first: numbers of candidates that every unit takes before it chooses.
    """
    size = (values.square().sum(-1) + price[:, None].clamp_min(1e-30)).sqrt()
    values.div_(size[..., None])
    gram = values @ values.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).fill_(1)
    cross = (values @ target[..., None])[..., 0]
    index, amount = pursue(gram, cross, count, first)
    return candidates.choose(index.T, (amount / size.gather(1, index)).T)


def pursue(
    gram: Tensor, cross: Tensor, count: int, first: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """(u, count) numbers of the columns chosen, and their amounts, fitted together.

    ``gram`` (u, C, C) and ``cross`` (u, C) of columns of norm one with each other and the target.
    The columns ``first`` are taken before any is chosen.
    """
    rest = gram.clone()
    left = cross.clone()
    units = torch.arange(len(gram), device=gram.device)
    chosen = []
    for number in range(count):
        new = rest.diagonal(dim1=1, dim2=2)
        gain = torch.where(new > COLLINEAR, left.square() / new.clamp_min(COLLINEAR), -1.0)
        best = gain.argmax(1)
        if number < len(first):
            best = torch.full_like(best, first[number])
        chosen.append(best)
        length = new[units, best].clamp_min(COLLINEAR).sqrt()
        direction = rest[units, best] / length[:, None]
        explained = left[units, best] / length
        left.sub_(direction * explained[:, None])
        rest.baddbmm_(direction[:, :, None], direction[:, None], alpha=-1)
        rest[units, best, best] = 0

    index = torch.stack(chosen, 1)
    small = gram[units[:, None, None], index[:, :, None], index[:, None]].double()
    small.diagonal(dim1=1, dim2=2).add_(JITTER)
    amounts = torch.linalg.solve(small, cross.gather(1, index).double()[..., None])[..., 0]
    return index, amounts.to(gram.dtype)


def price_of_amounts(kernel: Kernel, planes: Planes, scale: Tensor, *, in_plane: bool) -> Tensor:
    """(u,) the price of a squared amount; ``scale`` (u, n) square roots of the tokens' weights."""
    degree = kernel.degree or 1
    price = PLANE_PRICE if in_plane else LINE_PRICE
    return price * typical_size(planes.first).pow(2 * degree) * scale.square().sum(1)
