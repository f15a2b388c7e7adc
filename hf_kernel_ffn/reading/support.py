"""Abstain: how well an input is covered by what a layer knows, as percentiles over ordinary
text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint_code.linears import get_effective_weight
from ..evaluation.locality import auc
from ..families.lookup import find_stock_ffn
from ..families.weights import read_stock_weights
from .contexts import SKIP
from .model_parts import (
    find_ffn_module,
    get_embedding_weight,
    has_tied_rows,
    is_kernel_ffn,
    list_ffn_paths,
    read_row_inputs,
)
from .rows import Rows
from .tracing import Trace

QUANTILES = 1001
"""Values per score and layer that stand for the text's distribution."""
SCORES = ("nearest", "mass")
LOWEST = -1e300
"""Stands for a score of −∞, which has no quantiles."""


@torch.no_grad()
def support_scores(model: PreTrainedModel, path: str, inputs: Tensor) -> dict[str, Tensor]:
    """Score how well the FFN at ``path`` covers its ``inputs`` (tokens, hidden_size).

    Returns:
        Two scores, (tokens,) float32 each, larger for better covered:

        * ``nearest``: −min_i ‖x − w_i‖², whether or not the kernel looks at distance; of a
          stock FFN the rows of W_in (of its gate);
        * ``mass``: log Σκ over all prototypes (where rows are tied, of their coefficients), −inf
          where none fires; of a stock FFN log
          Σ|c_i|‖v_i‖. Yat's κ does not vanish far away (it tends to ‖w‖²cos²θ), so its
          mass says nothing of distance: compare the AUCs.
    """
    ffn = find_ffn_module(model, path)
    if is_kernel_ffn(ffn):
        rows = get_effective_weight(ffn.input_prototypes, inputs)[0]
        mass = ffn.kernel.log(*ffn.scores(inputs), **ffn.kernel_parameters()).logsumexp(-1)
    elif has_tied_rows(ffn):
        rows = get_effective_weight(ffn.input_prototypes, inputs)[0]
        mass = ffn.readout(inputs).coefficients.sum(-1).log()
    else:
        weights = read_stock_weights(model, find_stock_ffn(model, path))
        rows = weights.up if weights.gate is None else weights.gate
        mass = (weights.coefficients(inputs).abs() * weights.down.norm(dim=-1)).sum(-1).log()
    return {
        "nearest": -torch.cdist(inputs.float(), rows.float()).amin(-1).square(),
        "mass": mass.float(),
    }


@torch.no_grad()
def text_scores(
    model: PreTrainedModel, ids: Tensor, batch_rows: int = 8
) -> dict[str, dict[str, Tensor]]:
    """:func:`support_scores` by path over text, past the first :data:`SKIP` positions of each row.

    Args:
        ids: (rows, length) token ids.
        batch_rows: rows that the model reads at once.

    Raises:
        InputError: as :func:`~hf_kernel_ffn.reading.model_parts.read_row_inputs`.
    """
    paths = list_ffn_paths(model.eval())
    device = get_embedding_weight(model).device

    batches: dict[str, list[dict[str, Tensor]]] = {path: [] for path in paths}
    for batch in ids.split(batch_rows):
        for path, inputs in read_row_inputs(model, paths, batch.to(device)).items():
            later = inputs[:, SKIP:].flatten(0, 1)
            batches[path].append(support_scores(model, path, later))
    return {
        path: {name: torch.cat([scores[name] for scores in of_path]).cpu() for name in SCORES}
        for path, of_path in batches.items()
    }


class Supported(NamedTuple):
    """How well one token is covered in one layer, in percent of ordinary text that is covered
    less."""

    position: int
    path: str
    nearest: float
    mass: float


class Support:
    """Scores calibrated to percentiles on ordinary text.

    At 1, one token of the text in a hundred is covered no better.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor):
        """Calibrate on ``ids`` (rows, length), token ids of text that is ordinary for ``model``."""
        shares = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
        self.quantiles = {
            path: {
                name: values.double().clamp_min(LOWEST).quantile(shares)
                for name, values in scores.items()
            }
            for path, scores in text_scores(model, ids).items()
        }

    def percentiles(self, trace: Trace) -> Rows[Supported]:
        """Rate every position and layer of ``trace``, a pass of the model that was calibrated
        on."""
        table = Rows[Supported]()
        for path, inputs in trace.ffn_inputs.items():
            scores = support_scores(trace.model, path, inputs)
            nearest = self._rate(path, "nearest", scores)
            mass = self._rate(path, "mass", scores)
            for row, position in enumerate(trace.positions):
                table.append(Supported(position, path, nearest[row], mass[row]))
        return table

    def _rate(self, path: str, score: str, scores: Mapping[str, Tensor]) -> list[float]:
        """Percent of the text's tokens that one score of the FFN at ``path`` reaches or exceeds."""
        values = scores[score].double().cpu().clamp_min(LOWEST)
        below = torch.searchsorted(self.quantiles[path][score], values, right=True)
        return (100.0 * below / QUANTILES).tolist()


class Separation(NamedTuple):
    """How well a score tells ordinary text from another."""

    path: str
    score: str
    against: str
    auc: float
    """Chance that a token of the ordinary text scores higher than one of the other: 0.5 is a
    coin."""


def separations(
    model: PreTrainedModel, text: Tensor, others: Mapping[str, Tensor]
) -> Rows[Separation]:
    """Measure the ROC-AUC of both scores of every layer between ordinary text and others.

    Args:
        text: (rows, length) token ids of ordinary text.
        others: the same by name, such as :func:`scrambled` text or another domain.
    """
    ordinary = text_scores(model, text)
    table = Rows[Separation]()
    for name, ids in others.items():
        for path, scores in text_scores(model, ids).items():
            for score in SCORES:
                value = auc(ordinary[path][score], scores[score])
                table.append(Separation(path, score, name, value))
    return table


def scrambled(ids: Tensor, seed: int = 0) -> Tensor:
    """``ids`` (rows, length) with the tokens of each row in random order."""
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return ids.gather(1, order.to(ids.device))
