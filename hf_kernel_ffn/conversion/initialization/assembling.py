"""From the rows that an initialiser offers to the prototypes of a readout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checkpoint_code.kernels import Kernel, get_kernel
from ...checkpoint_code.settings import KernelFFNConfig, needs_both_signs
from ...families.weights import FFNWeights
from .prototypes import Prototypes, initial_kernel_parameters
from .unit_pieces import Candidates, RowSource, choose_signs, fit_unit_pieces

QUIETEST = 1e-3
"""Rows are shortened no further than for an output prototype this share of the mean length: a
silent unit can wake again."""
COLUMNS_AT_ONCE = 64
"""Columns of W_out's transpose whose squares are summed together."""


def assemble_prototypes(
    weights: FFNWeights, settings: KernelFFNConfig, inputs: Tensor, source: RowSource
) -> Prototypes:
    """Fit pieces of kernel to every unit, and lay their prototypes out one piece after the other.

    Args:
        weights: float32.
        settings: resolved.
        inputs: (tokens, d) float32 sample on which the units are fitted.
        source: what the initialiser offers as input prototypes.
    """
    kernel = get_kernel(settings.kernel)
    signs = choose_signs(needs_both_signs(settings, weights.gate is not None))
    expansion = settings.expansion or len(signs)
    pieces = math.ceil(expansion / len(signs))
    parameters = _choose_parameters(kernel, source, weights, signs[0], inputs)

    candidates = Candidates(inputs, source, kernel=kernel, parameters=parameters, signs=signs)
    parts = []
    for piece in fit_unit_pieces(weights, settings, candidates, pieces):
        for sign in signs:
            rows, bias, _ = source(slice(None), piece.ratio, sign)
            if kernel.uses_bias:
                bias = bias + piece.shift * (inputs @ rows.T).std(0)
            parts.append((rows, bias, piece.amount if sign >= 0 else -piece.amount))

    prototypes = _join_parts(parts, weights, parameters, kernel if source.length is None else None)
    keep = round(expansion * len(weights.up))
    if keep == len(prototypes.rows):
        return prototypes
    return _keep_loudest(prototypes, kernel, inputs, keep)


def mean_length(inputs: Tensor) -> Tensor:
    """Return the root mean square length () of ``inputs`` (tokens, d)."""
    return inputs.square().sum(-1).mean().sqrt()


def _choose_parameters(
    kernel: Kernel, source: RowSource, weights: FFNWeights, sign: float, inputs: Tensor
) -> dict[str, float]:
    """What the parameters of ``kernel``, if it has any, start from at the rows of ratio 1."""
    if not kernel.parameters:
        return {}
    rows, bias, stretch = source(slice(None), weights.up.new_ones(len(weights.up)), sign)
    return initial_kernel_parameters(kernel, rows, bias, stretch, inputs)


def _join_parts(
    parts: list[tuple[Tensor, Tensor, Tensor]],
    weights: FFNWeights,
    parameters: dict[str, float],
    growing: Kernel | None,
) -> Prototypes:
    """Prototypes of ``parts``: rows (units, d), biases and amounts (units,) each.

    Where the kernel ``growing`` grows with its rows, output prototypes all get one length: then κ
    alone tells the loud contributions, which sparse maps keep.
    """
    bias = torch.cat([part[1] for part in parts])
    amount = torch.cat([part[2] for part in parts])
    scale = amount.abs().median().clamp_min(torch.finfo(torch.float32).tiny).item()
    factor = amount / scale
    stretch = torch.ones_like(amount)
    if growing is not None and growing.degree:
        loudness = _row_lengths(weights.down).repeat(len(parts)) * factor.abs()
        loudness = (loudness / loudness.mean()).clamp_min(QUIETEST)
        factor = factor / loudness
        stretch = loudness ** (1 / growing.degree)
        bias = bias * stretch

    # A matrix of all rows is the largest thing there is: each is made once, and lies in memory as
    # the teacher's does.
    rows = _scale_and_join([part[0] for part in parts], stretch)
    dictionary = _scale_and_join([weights.down] * len(parts), factor)
    numbers = torch.arange(1, len(weights.up) + 1, device=rows.device).repeat(len(parts))
    units = numbers * torch.where(amount < 0, -1, 1)
    return Prototypes(rows, bias, dictionary, units.to(torch.int32), parameters, scale)


def _scale_and_join(parts: list[Tensor], factor: Tensor) -> Tensor:
    """``parts`` (rows, d) below each other, each row times its ``factor`` (all rows,)."""
    factors = factor.split([len(part) for part in parts])
    scaled = [part * share[:, None] for part, share in zip(parts, factors, strict=True)]
    return scaled[0] if len(scaled) == 1 else torch.cat(scaled)


def _row_lengths(rows: Tensor) -> Tensor:
    """Norms (rows,) of ``rows`` (rows, d).

    They may lie in memory column by column, over which a norm is slow.
    """
    squares = [part.square().sum(-1) for part in rows.split(COLUMNS_AT_ONCE, dim=1)]
    return sum(squares, start=torch.zeros_like(squares[0])).sqrt()


def _keep_loudest(prototypes: Prototypes, kernel: Kernel, inputs: Tensor, keep: int) -> Prototypes:
    """The ``keep`` prototypes that write most over the sample.

    That is root mean square coefficient times norm of the output prototype.
    """
    dot = inputs @ prototypes.rows.T
    distance2 = None
    if kernel.uses_distance:
        input_square = inputs.square().sum(-1, keepdim=True)
        row_square = prototypes.rows.square().sum(-1)
        distance2 = (input_square + row_square - 2 * dot).clamp_min(0)
    score = dot + prototypes.bias if kernel.uses_bias else dot
    parameters = {name: torch.as_tensor(value) for name, value in prototypes.parameters.items()}
    coefficients = kernel.value(score, distance2, **parameters)

    loudness = coefficients.square().mean(0).sqrt() * prototypes.dictionary.norm(dim=-1)
    kept = loudness.topk(keep).indices.sort().values
    return prototypes._replace(
        rows=prototypes.rows[kept],
        bias=prototypes.bias[kept],
        dictionary=prototypes.dictionary[kept],
        units=prototypes.units[kept],
    )
