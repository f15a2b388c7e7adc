"""From a stock FFN's rows and columns to input and output prototypes: single, polarised, data-scale.

Rows and columns come from the teacher; what the rows' scale, shift and mixing ratio should be is read off a sample
of the layer's own inputs, one unit at a time, by least squares over a short list of candidates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .architectures import FFNWeights
from .configuration import KernelFFNConfig
from .kernels import Kernel, get_kernel

SHIFTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Candidates for b, added to the teacher's own bias, in standard deviations of the unit's score."""
RATIOS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
"""Candidates for r in the polarised rows (gate ± r·up)/2; r = 1 is the identity gu = ((g+u)/2)² − ((g−u)/2)²."""
DISTANCE_SHARE = 0.01
"""ε and c² start at this share of the mean squared distance between inputs and prototypes."""


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


def prototypes(weights: FFNWeights, settings: KernelFFNConfig, inputs: Tensor) -> Prototypes:
    """Prototypes for the FFN ``weights`` under ``settings`` (resolved by ``with_defaults``).

    Args:
        inputs: (tokens, d) float32 sample of the layer's inputs, on which the per-unit fits are made.
    """
    kernel = get_kernel(settings.kernel)
    up, gate = weights.pre_activations(inputs)
    target = weights.coefficients(inputs)
    importance = None
    polarised = settings.expansion is not None
    if settings.values == "gated":  # y = Σ κ_i (u_i·x) v_i: κ stands in for the activation, weighted by (u·x)²
        assert gate is not None
        target, importance = weights.activation(gate), up.square()
    candidates = []
    for ratio in RATIOS if polarised else (1.0,):
        signs = (1.0, -1.0) if polarised else (None,)
        for shift in SHIFTS if kernel.uses_bias else (0.0,):
            candidates.append([_rows(weights, ratio, sign, shift, up, gate) for sign in signs])
    length = inputs.square().sum(-1).mean().sqrt()
    input2 = inputs.square().sum(-1, keepdim=True)
    stretch = None
    if settings.init == "data-scale":
        stretch = [[length / rows.norm(dim=-1).clamp_min(1e-12) for rows, _, _ in signed] for signed in candidates]
    parameters = _parameters(kernel, candidates[0][0][0], stretch and stretch[0][0], length)

    fits = []
    for index, signed in enumerate(candidates):
        stretches = stretch[index] if stretch else [None] * len(signed)
        columns = [
            _kernel_columns(kernel, rows, bias, score, lam, input2, parameters)
            for (rows, bias, score), lam in zip(signed, stretches)
        ]
        fits.append(_least_squares(columns[0] - columns[1] if polarised else columns[0], target, importance))
    errors = torch.stack([error for error, _ in fits])
    best = errors.argmin(0)
    amount = torch.stack([a for _, a in fits]).gather(0, best[None])[0]  # (m,)

    picked_rows, picked_bias, picked_sign = [], [], []
    for position in range(len(candidates[0])):
        rows = torch.stack([signed[position][0] for signed in candidates])[best, torch.arange(len(best))]
        bias = torch.stack([signed[position][1] for signed in candidates])[best, torch.arange(len(best))]
        if stretch:
            lam = torch.stack([s[position] for s in stretch])[best, torch.arange(len(best))]
            rows, bias = rows * lam[:, None], bias * lam
        picked_rows.append(rows)
        picked_bias.append(bias)
        picked_sign.append(torch.full((len(best),), -1.0 if position else 1.0, device=rows.device))
    rows, bias, sign = torch.cat(picked_rows), torch.cat(picked_bias), torch.cat(picked_sign)
    amount = amount.repeat(len(picked_rows))
    scale = amount.abs().median().clamp_min(torch.finfo(torch.float32).tiny).item()
    dictionary = weights.down.float().repeat(len(picked_rows), 1) * (sign * amount / scale)[:, None]
    units = torch.arange(1, len(best) + 1, device=rows.device).repeat(len(picked_rows)) * sign * amount.sign()
    result = Prototypes(rows, bias, dictionary, units.to(torch.int32), parameters, scale)
    if polarised and settings.expansion != 2:
        result = _loudest(result, kernel, inputs, round(settings.expansion * len(best)))
    return result


def _rows(weights, ratio, sign, shift, up, gate):
    """Rows (m, d), biases (m,) and scores (tokens, m) of one candidate; ``sign`` None: the unit's own row."""
    zero = weights.up.new_zeros(len(weights.up))
    if sign is None:
        own_rows, own_bias, score = (
            (weights.up, weights.up_bias, up) if gate is None else (weights.gate, weights.gate_bias, gate)
        )
        rows, bias = own_rows.float(), (zero if own_bias is None else own_bias).float()
    else:
        mix = sign * ratio
        rows = (weights.gate.float() + mix * weights.up.float()) / 2
        up_bias = zero if weights.up_bias is None else weights.up_bias
        gate_bias = zero if weights.gate_bias is None else weights.gate_bias
        bias, score = (gate_bias + mix * up_bias).float() / 2, (gate + mix * up) / 2
    extra = shift * score.std(0)
    return rows, bias + extra, score + extra


def _parameters(kernel: Kernel, rows: Tensor, stretch: Tensor | None, length: Tensor) -> dict[str, float]:
    norm2 = length.square() if stretch is not None else rows.square().sum(-1).mean()
    starts = {
        "distance": DISTANCE_SHARE * (length.square() + norm2).item(),
        "bandwidth": 1.0 if stretch is None else stretch.mean().item(),
    }
    return {name: starts.get(start, start) for name, start in kernel.parameters.items()}


def _kernel_columns(kernel, rows, bias, score, stretch, input2, parameters):
    """κ (tokens, m) between every input and these rows, each row stretched by its own factor first."""
    row2, dot = rows.square().sum(-1), score - bias
    if stretch is not None:
        row2, dot, score = row2 * stretch.square(), dot * stretch, score * stretch
    distance2 = (input2 + row2 - 2 * dot).clamp_min(0) if kernel.uses_distance else None
    if not kernel.uses_bias:
        score = dot
    tensors = {name: torch.as_tensor(value) for name, value in parameters.items()}
    return kernel.value(score, distance2, **tensors)


def _least_squares(column, target, importance):
    """Per unit, the error and the amount a of the best fit a·column + constant to the target (tokens, m)."""
    weight = torch.ones_like(column) if importance is None else importance
    weight = weight / weight.sum(0).clamp_min(1e-30)
    column = column - (weight * column).sum(0) if importance is None else column
    target = target - (weight * target).sum(0) if importance is None else target
    amount = (weight * column * target).sum(0) / (weight * column.square()).sum(0).clamp_min(1e-30)
    return (weight * (target - amount * column).square()).sum(0), amount


def _loudest(found: Prototypes, kernel: Kernel, inputs: Tensor, keep: int) -> Prototypes:
    """The ``keep`` prototypes that write most over the sample: root mean square coefficient times row norm."""
    input2 = inputs.square().sum(-1, keepdim=True)
    columns = _kernel_columns(
        kernel, found.rows, found.bias, inputs @ found.rows.T + found.bias, None, input2, found.parameters
    )
    loudness = columns.square().mean(0).sqrt() * found.dictionary.norm(dim=-1)
    kept = loudness.topk(keep).indices.sort().values
    return found._replace(
        rows=found.rows[kept], bias=found.bias[kept], dictionary=found.dictionary[kept], units=found.units[kept]
    )


def gate_bias() -> float:
    """The bias at which softplus is one: the gate starts as its reference scale."""
    return math.log(math.e - 1)
