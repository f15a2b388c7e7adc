"""From a stock FFN's rows and columns to input and output prototypes: single, polarised, data-scale, firing means.

Rows and columns come from the teacher; what the rows' scale, shift and mixing ratio should be is read off a sample
of the layer's own inputs, one unit at a time, by least squares over a short list of candidates.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint_code.kernels import Kernel, get_kernel
from ..checkpoint_code.settings import AT_THE_DATA, KernelFFNConfig, needs_both_signs
from ..families.weights import FFNWeights

SHIFTS = (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Candidates for b, added to the teacher's own bias, in standard deviations of the unit's score; those below zero, where the
kernel fires on less than half of the inputs, only for pieces that are added to another."""
RATIOS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
"""Candidates for r in the polarised rows (gate ± r·up)/2; r = 1 is the identity gu = ((g+u)/2)² − ((g−u)/2)²."""
DISTANCE_SHARE = 0.01
"""ε and c² start at this share of the mean squared distance between inputs and prototypes."""

QUIETEST = 1e-3
"""Rows are shortened no further than for an output prototype this share of the mean length: a silent unit can wake again."""
UNITS_AT_ONCE = 1024
"""Units that are fitted together."""


class Prototypes(NamedTuple):
    """Starting weights of one kernel readout; P prototypes, hidden_size d, all float32."""

    rows: Tensor
    """(P, d) input prototypes w_i."""
    bias: Tensor
    """(P,) b_i."""
    dictionary: Tensor
    """(P, d) output prototypes v_i: columns of W_out, signed and scaled."""
    units: Tensor
    """(P,) ±(1 + teacher unit), int32: the sign with which the unit's column is written."""
    parameters: dict[str, float]
    """The kernel's parameters."""
    scale: float
    """What the kernel is multiplied by where the intensity is its mass."""


def initialise_prototypes(
    weights: FFNWeights, settings: KernelFFNConfig, inputs: Tensor
) -> Prototypes:
    """Prototypes for the FFN ``weights`` (float32) under ``settings`` (resolved by ``with_defaults``).

    Args:
        inputs: (tokens, d) float32 sample of the layer's inputs, on which the per-unit fits are made.
    """
    kernel = get_kernel(settings.kernel)
    length = inputs.square().sum(-1).mean().sqrt() if settings.init in AT_THE_DATA else None
    signs = (1.0, -1.0) if needs_both_signs(settings, weights.gate is not None) else (0.0,)
    expansion = settings.expansion or len(signs)
    pieces, kept = math.ceil(expansion / len(signs)), round(expansion * len(weights.up))
    if length is not None and settings.init == "firing-means":
        means = {sign: _firing_means(weights, settings, sign, inputs, length) for sign in signs}

        def rows_of(units: slice, ratio: Tensor, sign: float) -> tuple[Tensor, Tensor, Tensor]:
            rows, bias, stretch = means[sign]
            return rows[units], bias[units], stretch[units]
    else:

        def rows_of(units: slice, ratio: Tensor, sign: float) -> tuple[Tensor, Tensor, Tensor]:
            return _rows(_some(weights, units), ratio, sign, length)

    every = slice(None)
    parameters = {}
    if kernel.parameters:
        parameters = initial_kernel_parameters(
            kernel, *rows_of(every, weights.up.new_ones(len(weights.up)), signs[0]), inputs
        )

    parts = []
    for amount, ratio, shift in _fit_units(
        weights, settings, kernel, parameters, inputs, signs, pieces, rows_of
    ):
        for sign in signs:
            rows, bias, _ = rows_of(every, ratio, sign)
            if kernel.uses_bias:
                bias = bias + shift * (inputs @ rows.T).std(0)
            parts.append((rows, bias, amount if sign >= 0 else -amount))
    bias, amount = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    scale = amount.abs().median().clamp_min(torch.finfo(torch.float32).tiny).item()
    factor, stretch = amount / scale, torch.ones_like(amount)
    if kernel.degree and length is None:
        # One length for every output prototype: then κ alone tells the loud contributions, which sparse maps keep.
        loudness = _lengths(weights.down).repeat(len(parts)) * factor.abs()
        loudness = (loudness / loudness.mean()).clamp_min(QUIETEST)
        factor, stretch = factor / loudness, loudness ** (1 / kernel.degree)
        bias = bias * stretch
    # A matrix of all rows is the largest thing there is: each is made once, and lies as the teacher's does.
    rows = _joined([part[0] for part in parts], stretch)
    dictionary = _joined([weights.down] * len(parts), factor)
    units = torch.arange(1, len(weights.up) + 1, device=rows.device).repeat(
        len(parts)
    ) * torch.where(amount < 0, -1, 1)
    result = Prototypes(rows, bias, dictionary, units.to(torch.int32), parameters, scale)
    return result if kept == len(rows) else _loudest(result, kernel, inputs, kept)


def _joined(parts: list[Tensor], factor: Tensor) -> Tensor:
    """``parts`` (rows, d) below each other, each row times its ``factor`` (all rows,)."""
    scaled = [
        part * share[:, None]
        for part, share in zip(parts, factor.split([len(part) for part in parts]))
    ]
    return scaled[0] if len(scaled) == 1 else torch.cat(scaled)


def _lengths(rows: Tensor) -> Tensor:
    """Norms (rows,) of ``rows`` (rows, d), which may lie in memory column by column: a norm over those is slow."""
    return sum(part.square().sum(-1) for part in rows.split(64, dim=1)).sqrt()


def _rows(
    weights: FFNWeights, ratio: Tensor, sign: float, length: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (m, d), their biases (m,) and how far they were stretched (m,): polarised by ``ratio`` (m,) if ``sign`` is not
    zero, else the units' own; as long as ``length`` if that is given."""
    zero = weights.up.new_zeros(len(weights.up))
    up_bias = zero if weights.up_bias is None else weights.up_bias
    gate_bias = zero if weights.gate_bias is None else weights.gate_bias
    if weights.gate is None:
        rows, bias = weights.up, up_bias
    elif sign == 0:
        rows, bias = weights.gate, gate_bias
    else:
        rows = torch.addcmul(weights.gate, ratio[:, None], weights.up, value=sign).div_(2)
        bias = (gate_bias + sign * ratio * up_bias) / 2
    if length is None:
        return rows, bias, torch.ones_like(zero)
    stretch = length / rows.norm(dim=-1).clamp_min(1e-12)
    return rows * stretch[:, None], bias * stretch, stretch


def _firing_means(
    weights: FFNWeights, settings: KernelFFNConfig, sign: float, inputs: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_rows`: the mean of the inputs that fire each unit with this sign, by how much it fires, as long as ``length``; the
    bias puts the mean score over the sample at zero, which is mostly what all inputs have in common."""
    if settings.values == "gated":
        fires = weights.activation(weights.pre_activations(inputs)[1]).relu()
    else:
        fires = weights.coefficients(inputs) * (sign or 1.0)
    share = fires.relu() / fires.relu().sum(0).clamp_min(1e-12)
    means = share.T @ inputs
    rows = means * (length / means.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    own = weights.up if weights.gate is None else weights.gate
    return rows, -(rows @ inputs.mean(0)), rows.norm(dim=-1) / own.norm(dim=-1).clamp_min(1e-12)


def _some(weights: FFNWeights, units: slice) -> FFNWeights:
    """A slice of the units."""
    parts: Any = {
        k: w[units]
        for k, w in weights._asdict().items()
        if isinstance(w, Tensor) and k != "down_bias"
    }
    return weights._replace(**parts)


def initial_kernel_parameters(
    kernel: Kernel, rows: Tensor, bias: Tensor, stretch: Tensor, inputs: Tensor
) -> dict[str, float]:
    square = inputs.square().sum(-1).mean() + rows.norm(dim=-1).square().mean()
    starts = {"distance": DISTANCE_SHARE * square.item(), "bandwidth": stretch.mean().item()}
    return {name: starts.get(start, start) for name, start in kernel.parameters.items()}


def _fit_units(
    weights, settings, kernel, parameters, inputs, signs, pieces, rows_of
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each piece of every unit (m,), the amount of kernel, the ratio and the shift whose sum stands in best for the unit's
    coefficient: orthogonal matching pursuit over RATIOS × SHIFTS (Pati et al. 1993). Units are taken in slices, so that memory
    stays bounded."""
    input2 = inputs.square().sum(-1, keepdim=True)
    tensors = {name: torch.as_tensor(value) for name, value in parameters.items()}
    ratios = RATIOS if len(signs) == 2 and settings.init != "firing-means" else (1.0,)
    candidates = [(r, b) for r in ratios for b in (SHIFTS if kernel.uses_bias else (0.0,))]
    found: list[tuple[Tensor, Tensor]] = []
    for low in range(0, len(weights.up), UNITS_AT_ONCE):
        part = slice(low, low + UNITS_AT_ONCE)
        some = _some(weights, part)
        up, gate = some.pre_activations(inputs)
        act, importance = weights.activation(up if gate is None else gate), None
        target = act if gate is None else act * up
        if (
            settings.values == "gated"
        ):  # y = Σ κ_i (u_i·x) v_i: κ stands in for the activation, weighted by (u·x)²
            target, importance = act, up.square()
        columns = []
        for r in dict.fromkeys(ratio for ratio, _ in candidates):
            sides = []
            for sign in signs:
                rows, bias, _ = rows_of(part, torch.full_like(up[0], r), sign)
                dot = inputs @ rows.T
                distance2 = (
                    (input2 + rows.square().sum(-1) - 2 * dot).clamp_min(0)
                    if kernel.uses_distance
                    else None
                )
                sides.append((dot + bias if kernel.uses_bias else dot, distance2, dot.std(0)))
            for shift in dict.fromkeys(shift for _, shift in candidates):
                values = [
                    kernel.value(score + shift * std, distance2, **tensors)
                    for score, distance2, std in sides
                ]
                columns.append(values[0] - values[1] if len(values) == 2 else values[0])
        early = torch.tensor([shift >= 0 for _, shift in candidates], device=inputs.device)
        found.append(_matching_pursuit(torch.stack(columns), target, importance, pieces, early))
    amounts, chosen = (torch.cat(part) for part in zip(*found))
    table = torch.tensor(candidates, device=inputs.device)
    picked = table[chosen]
    return [(amounts[:, i], picked[:, i, 0], picked[:, i, 1]) for i in range(pieces)]


def _matching_pursuit(
    columns: Tensor, target: Tensor, importance: Tensor | None, pieces: int, early: Tensor
) -> tuple[Tensor, Tensor]:
    """(units, pieces) amounts and numbers of the columns (candidates, tokens, units) that, one added after the other and all
    fitted anew, leave the least squared error of the target (tokens, units), a constant being free; the first is one of ``early``."""
    weight = torch.ones_like(target) if importance is None else importance
    weight = (weight / weight.sum(0).clamp_min(1e-30)).sqrt()
    if importance is None:
        columns, target = columns - columns.mean(1, keepdim=True), target - target.mean(0)
    columns = columns * weight
    size = columns.square().sum(1).sqrt().clamp_min(1e-15)
    cross = ((columns * (target * weight)).sum(1) / size).T
    size, (units, count) = size.T, cross.shape
    gram = torch.eye(count, device=cross.device).expand(
        units, -1, -1
    )  # of one piece alone, no more than the diagonal is read
    if pieces > 1:
        columns = columns.permute(2, 1, 0) / size[:, None]
        gram = columns.transpose(1, 2) @ columns
    chosen = torch.zeros(units, 0, dtype=torch.int64, device=cross.device)
    for _ in range(pieces):
        # One system per unit and candidate: those chosen before, and the candidate.
        index = torch.cat(
            [
                chosen[:, None].expand(-1, count, -1),
                torch.arange(count, device=cross.device).expand(units, -1)[..., None],
            ],
            -1,
        )
        solution, gained = _refit(gram, cross, index)
        best = (gained if chosen.shape[1] else gained.masked_fill(~early, -torch.inf)).argmax(1)
        chosen = index[torch.arange(units, device=cross.device), best]
    amounts = solution[torch.arange(units, device=cross.device), best]
    return amounts / size.gather(1, chosen), chosen


def _refit(gram: Tensor, cross: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Amounts (units, candidates, n) of the columns ``index`` (units, candidates, n) fitted together, and what they explain."""
    units, count, n = index.shape
    unit = torch.arange(units, device=index.device)[:, None, None, None]
    small = gram[unit, index[..., :, None], index[..., None, :]]
    small = small + 1e-4 * torch.eye(n, device=small.device)  # candidates may be all but equal
    wanted = cross[unit[..., 0], index]
    solution = torch.linalg.solve(small, wanted)
    return solution, (solution * wanted).sum(-1)


def _loudest(found: Prototypes, kernel: Kernel, inputs: Tensor, keep: int) -> Prototypes:
    """The ``keep`` prototypes that write most over the sample: root mean square coefficient times row norm."""
    dot = inputs @ found.rows.T
    distance2 = (
        inputs.square().sum(-1, keepdim=True) + found.rows.square().sum(-1) - 2 * dot
    ).clamp_min(0)
    tensors = {name: torch.as_tensor(value) for name, value in found.parameters.items()}
    column = kernel.value(
        dot + found.bias if kernel.uses_bias else dot,
        distance2 if kernel.uses_distance else None,
        **tensors,
    )
    kept = (
        (column.square().mean(0).sqrt() * found.dictionary.norm(dim=-1))
        .topk(keep)
        .indices.sort()
        .values
    )
    return found._replace(
        rows=found.rows[kept],
        bias=found.bias[kept],
        dictionary=found.dictionary[kept],
        units=found.units[kept],
    )


def initial_gate_bias() -> float:
    """The bias at which softplus is one: the gate starts as its reference scale."""
    return math.log(math.e - 1)
