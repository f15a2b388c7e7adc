"""What the page of :mod:`.report` shows of one layer, as JSON types."""

from __future__ import annotations

import base64
import math

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.linears import get_effective_weight
from ..checkpoint_code.record import Readout
from .model_parts import is_kernel_ffn
from .pages import shorten
from .regimes import Mixture, mixtures

NO_MASS = -1e9
"""Stands for a log-mass of −∞: JSON has no infinity."""
USED = 1e-9
"""A share below this is not written into the page."""


def describe_cells(record: Readout, top: int, has_shares: bool) -> list[dict]:
    """Per token the largest coefficients, what is left, and what the mixture is like."""
    coefficients = record.coefficients.double()
    dictionary = record.dictionary.double()
    mass = coefficients.abs() * dictionary.norm(dim=-1)
    direction = nn.functional.normalize(coefficients @ dictionary, dim=-1)
    along = coefficients * (direction @ dictionary.T)
    order = mass.argsort(dim=-1, descending=True, stable=True)[:, :top]

    cells = []
    for row, mixture in enumerate(mixtures(record)):
        kept = [index for index in order[row].tolist() if coefficients[row, index] != 0]
        cell = _describe_cell(coefficients[row], along[row], mass[row], kept=kept, mixture=mixture)
        if not has_shares:
            cell["restAlong"] = shorten((along[row].sum() - along[row, kept].sum()).item())
        cells.append(cell)
    return cells


def _describe_cell(
    coefficients: Tensor, along: Tensor, mass: Tensor, *, kept: list[int], mixture: Mixture
) -> dict:
    """One token of a layer: (P,) coefficients, contributions along the output, and masses."""
    rest = (mass.sum() - mass[kept].sum()).clamp_min(0).item()
    return {
        "i": kept,
        "c": [shorten(number) for number in coefficients[kept].tolist()],
        "a": [shorten(number, 3) for number in along[kept].tolist()],
        "sum": shorten(coefficients.sum().item(), 6),
        "rest": [mixture.active - len(kept), shorten(rest)],
        "active": mixture.active,
        "intensity": shorten(mixture.intensity),
        "entropy": shorten(mixture.entropy),
        "written": shorten(mixture.written),
        "coherence": shorten(mixture.coherence),
        "effective": shorten(mixture.effective),
        "diagnosis": mixture.diagnosis,
    }


def measure_support(ffn: nn.Module, inputs: Tensor) -> list[list[float] | None]:
    """Per token log Σκ and minus the distance to the nearest input prototype.

    None from an FFN without a kernel.
    """
    if not is_kernel_ffn(ffn):
        return [None] * len(inputs)
    score, distance2 = ffn.scores(inputs)
    log_kernel = ffn.kernel.log(score, distance2, **ffn.kernel_parameters())
    log_mass = log_kernel.double().logsumexp(-1)
    rows = get_effective_weight(ffn.input_prototypes, inputs)[0].double()
    nearest = -torch.cdist(inputs.double(), rows).min(-1).values
    return [
        [shorten(mass) if math.isfinite(mass) else NO_MASS, shorten(distance)]
        for mass, distance in zip(log_mass.tolist(), nearest.tolist(), strict=True)
    ]


def describe_alternatives(path: str, record: Readout, rows: Tensor, top: int) -> dict:
    """Sparse shares of each decomposition, and how far from one another their outputs are."""
    if rows.ndim != 2 or rows.shape[1] != len(record.dictionary) or (rows < 0).any():
        raise InputError(
            f"found alternatives of shape {tuple(rows.shape)} for {path}, expected nonnegative "
            f"shares (count, {len(record.dictionary)}): take them from decompositions of this layer"
        )
    rows = rows.double().cpu()
    outputs = rows @ record.dictionary.double().cpu()
    sparse = []
    for row in rows:
        used = (row > USED).nonzero().flatten().tolist()
        sparse.append([used, [shorten(share, 8) for share in row[used].tolist()]])

    furthest = (outputs - outputs[0]).norm(dim=-1).max()
    spread = furthest / outputs[0].norm().clamp_min(1e-300)
    order = rows.mean(0).argsort(descending=True)[:top].tolist()
    return {
        "rows": sparse,
        "order": [index for index in order if rows[:, index].any()],
        "spread": shorten(spread.item(), 2),
    }


def encode_attention(weights: Tensor, positions: list[int]) -> dict:
    """Heads' weights (heads, P, T) over the positions kept, as bytes 255·√weight in base64.

    Row i has the first i + 1 positions and then all other tokens together. The root keeps the
    digits of small weights.
    """
    all_weights = weights.double().cpu()
    kept = all_weights[:, :, positions]
    others = (all_weights.sum(-1) - kept.sum(-1)).clamp_min(0)
    rows = [torch.cat([kept[:, i, : i + 1], others[:, i, None]], 1) for i in range(len(positions))]
    packed = (torch.cat(rows, 1).clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    return {"heads": len(weights), "weights": base64.b64encode(packed.numpy().tobytes()).decode()}
