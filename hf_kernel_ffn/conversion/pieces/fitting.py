"""The pieces of all units of an FFN, fitted on a sample of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint_code.errors import InputError
from ...checkpoint_code.kernels import Kernel, get_kernel
from ...checkpoint_code.settings import PIECES, KernelFFNConfig
from ...families.weights import FFNWeights
from .planes import (
    DESIGN_WEIGHT,
    EPSILON_SHARE,
    Pieces,
    Planes,
    compute_kernels,
    see_planes,
    weigh_tokens,
)
from .pursuit import (
    ANGLES,
    OUTWARD_KNOTS,
    SHIFTS,
    UNBOUNDED,
    choose_pieces,
    make_knot_candidates,
    make_line_candidates,
    make_plane_candidates,
    price_of_amounts,
)
from .refinement import Problem, refine_pieces, thin_problem

NUMBERS_AT_ONCE = 2**21
"""Kernel values of candidates that are worked on at once: 8 MiB of float32, about what a cache
holds."""
TOKENS_OF_PURSUIT = 1536
"""Tokens that choose among the candidates in a plane, of which there are many."""
TOKENS_OF_REFINEMENT = 2048
"""Tokens that refine them, in several steps."""
FAR = 16.0
"""Where the products' other factor is clamped, in the layer's largest |u·x| of the sample."""


class FittedPieces(NamedTuple):
    """What a layer of pieces starts from."""

    pieces: Pieces
    """(P, m) each, float32; amounts multiply ``scale`` · κ."""
    parameters: dict[str, float]
    """The kernel's."""
    scale: float
    """Makes kernels of order one at the sample: ε plus the mean of ‖x‖², to half the degree."""
    far: float | None
    """Beyond any u·x of the sample; None without a gate."""


def fit_pieces(weights: FFNWeights, settings: KernelFFNConfig, inputs: Tensor) -> FittedPieces:
    """Kernels for every unit of ``weights`` (float32), by pursuit and, in planes, refinement.

    Args:
        settings: resolved; ``pieces`` says how many, ``values`` whether u·x multiplies them.
        inputs: (n, d) float32 sample of the layer's inputs, all kinds of tokens among them.

    Raises:
        InputError: the kernel reads no score, or has a parameter that nothing here starts.
    """
    kernel = get_kernel(settings.kernel)
    in_plane = weights.gate is not None and settings.values == "fixed"
    if in_plane:
        inputs = inputs[:: max(1, len(inputs) // TOKENS_OF_REFINEMENT)]
    parameters, scale = _start_parameters(kernel, inputs)
    tensors = {name: inputs.new_tensor(value) for name, value in parameters.items()}
    planes = see_planes(weights, inputs)
    outputs = weights.coefficients(inputs) @ weights.down
    token_weights = weigh_tokens(outputs)
    far = None if planes.second is None else FAR * planes.second.abs().max().item()

    candidates = ANGLES * len(SHIFTS) if in_plane else 2 * len(OUTWARD_KNOTS)
    units_at_once = max(1, NUMBERS_AT_ONCE // (candidates * len(inputs)))
    weight = token_weights.expand(len(weights.down), -1)
    planes, share = planes.add_points_around() if in_plane else planes.add_design_points()
    weight = torch.cat([weight, DESIGN_WEIGHT * token_weights.sum() * share], 1)

    pieces = []
    for low in range(0, len(weights.down), units_at_once):
        units = slice(low, low + units_at_once)
        problem = _make_problem(
            weights=weights,
            product=settings.values == "product",
            planes=planes.select_units(units),
            weight=weight[units],
            kernel=kernel,
            parameters=tensors,
            scale=scale,
        )
        pieces.append(_fit_units(problem, in_plane, settings.pieces or PIECES))

    return FittedPieces(_join_units(pieces), parameters, scale, far)


def _join_units(parts: list[Pieces]) -> Pieces:
    """The pieces of all units, from those of some after the others."""
    betas = [part.beta for part in parts if part.beta is not None]
    knots = [part.knot for part in parts if part.knot is not None]
    return Pieces(
        alpha=torch.cat([part.alpha for part in parts], 1),
        beta=torch.cat(betas, 1) if betas else None,
        shift=torch.cat([part.shift for part in parts], 1),
        amount=torch.cat([part.amount for part in parts], 1),
        knot=torch.cat(knots, 1) if knots else None,
    )


def _start_parameters(kernel: Kernel, inputs: Tensor) -> tuple[dict[str, float], float]:
    """The kernel's parameters, and what makes it of order one at ``inputs``."""
    if not kernel.uses_bias:
        raise InputError(
            f"found kernel {kernel.name!r} with tied rows, expected one that reads the score "
            "x·w + b: choose brownian, half-yat, root-half-yat or yat, or rows 'free'"
        )
    square = inputs.square().sum(-1).mean().item()
    parameters = {}
    scale = 1.0
    for name, start in kernel.parameters.items():
        if start == "distance":
            parameters[name] = EPSILON_SHARE * square
            scale = (square + parameters[name]) ** ((kernel.degree or 0) / 2)
        elif isinstance(start, (int, float)):
            parameters[name] = float(start)
        else:
            raise InputError(
                f"found kernel {kernel.name!r} with a {start}, which tied rows have none of: "
                "choose brownian, half-yat, root-half-yat or yat, or rows 'free'"
            )
    return parameters, scale


def _make_problem(
    *,
    weights: FFNWeights,
    product: bool,
    planes: Planes,
    weight: Tensor,
    kernel: Kernel,
    parameters: dict[str, Tensor],
    scale: float,
) -> Problem:
    """What the units of ``planes`` want: their activation, times u·x unless that multiplies the
    kernels. ``weight`` (u, n) of the tokens."""
    target = weights.activation(planes.first)
    token_scale = weight.sqrt()
    in_plane = planes.second is not None and not product
    if planes.second is not None and product:
        token_scale = token_scale * planes.second
    elif planes.second is not None:
        target = target * planes.second
    return Problem(
        kernel=kernel,
        parameters=parameters,
        kernel_scale=scale,
        planes=planes,
        target=target * token_scale,
        scale=token_scale,
        price=price_of_amounts(kernel, planes, token_scale, in_plane=in_plane),
    )


def _fit_units(problem: Problem, in_plane: bool, count: int) -> Pieces:
    """The ``count`` pieces of each unit of ``problem``."""
    planes = problem.planes
    if not in_plane:
        first = UNBOUNDED[: count - 1]
        make = make_knot_candidates if problem.kernel.uses_knot else make_line_candidates
        return _pursue_pieces(problem, make(planes.first), count, first)
    assert planes.second is not None
    candidates = make_plane_candidates(planes.first, planes.second)
    every = max(1, planes.first.shape[1] // TOKENS_OF_PURSUIT)
    pieces = _pursue_pieces(thin_problem(problem, every), candidates, count)
    return refine_pieces(problem, pieces)


def _pursue_pieces(
    problem: Problem, candidates: Pieces, count: int, first: Sequence[int] = ()
) -> Pieces:
    """Choose ``count`` of the ``candidates`` for each unit, those numbered ``first`` before all."""
    values = compute_kernels(problem.kernel, problem.planes, candidates, problem.parameters)
    values = values * (problem.scale * problem.kernel_scale)[:, None]
    return choose_pieces(
        candidates=candidates,
        values=values,
        target=problem.target,
        price=problem.price,
        count=count,
        first=first,
    )
