"""Abstain: how well an input is covered by what a layer knows, as percentiles over ordinary text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.linears import get_effective_weight
from ..evaluation.locality import auc
from ..families.hooks import capture_inputs_and_outputs
from ..families.lookup import find_ffn_paths, find_stock_ffn
from ..families.weights import read_stock_weights
from .contexts import SKIP
from .rows import Rows
from .tracing import Trace, family_of

QUANTILES = 1001
"""Values per score and layer that stand for the text's distribution."""
SCORES = ("nearest", "mass")


@torch.no_grad()
def support_scores(model: Any, path: str, inputs: Tensor) -> dict[str, Tensor]:
    """Two scores of the FFN at ``path`` at its ``inputs`` (tokens, hidden_size), (tokens,) each, larger for better covered:

    * ``nearest``: −min_i ‖x − w_i‖², whether or not the kernel looks at distance; of a stock FFN the rows of W_in (of its gate);
    * ``mass``: log Σκ over all prototypes, −inf where none fires; of a stock FFN log Σ|c_i|‖v_i‖. Yat's κ does not vanish far away
      (it tends to ‖w‖²cos²θ), so its mass is none: compare the AUCs.
    """
    ffn = model.base_model.get_submodule(path)
    if isinstance(ffn, KernelFFN) or hasattr(ffn, "input_prototypes"):
        rows = get_effective_weight(ffn.input_prototypes, inputs)[0]
        mass = ffn.kernel.log(*ffn.scores(inputs), **ffn.kernel_parameters()).logsumexp(-1)
    else:
        weights = read_stock_weights(model, find_stock_ffn(model, path))
        rows = weights.up if weights.gate is None else weights.gate
        mass = (weights.coefficients(inputs).abs() * weights.down.norm(dim=-1)).sum(-1).log()
    return {
        "nearest": -torch.cdist(inputs.float(), rows.float()).amin(-1).square(),
        "mass": mass.float(),
    }


@torch.no_grad()
def text_scores(model: Any, ids: Tensor, batch_rows: int = 8) -> dict[str, dict[str, Tensor]]:
    """:func:`support_scores` by path over text ``ids`` (rows, length), past the first 8 positions of each row."""
    paths = find_ffn_paths(model.eval(), family_of(model))
    modules = {path: model.base_model.get_submodule(path) for path in paths}
    parts: dict[str, list[dict[str, Tensor]]] = {path: [] for path in paths}
    for batch in ids.split(batch_rows):
        with capture_inputs_and_outputs(modules) as seen:
            model.base_model(
                input_ids=batch.to(model.get_input_embeddings().weight.device), use_cache=False
            )
        for path in paths:
            parts[path].append(support_scores(model, path, seen[path][0][:, SKIP:].flatten(0, 1)))
    return {
        path: {name: torch.cat([part[name] for part in some]).cpu() for name in SCORES}
        for path, some in parts.items()
    }


class Supported(NamedTuple):
    """How well one token is covered in one layer, in percent of ordinary text that is covered less."""

    position: int
    path: str
    nearest: float
    mass: float


class Support:
    """Scores calibrated to percentiles on ordinary text: at 1, one token of the text in a hundred is covered no better."""

    def __init__(self, model: Any, ids: Tensor):
        """``ids`` (rows, length) of text that is ordinary for the model."""
        at = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
        scores = text_scores(model, ids)
        self.quantiles = {
            path: {
                name: values.double().clamp_min(-1e300).quantile(at)
                for name, values in entry.items()
            }
            for path, entry in scores.items()
        }

    def percentiles(self, trace: Trace) -> Rows[Supported]:
        """Of every position and layer of ``trace``, a pass of the model that was calibrated on."""
        found = Rows[Supported]()
        for path, inputs in trace.ffn_inputs.items():
            columns = []
            for name, values in support_scores(trace.model, path, inputs).items():
                below = torch.searchsorted(
                    self.quantiles[path][name], values.double().cpu().clamp_min(-1e300), right=True
                )
                columns.append((100.0 * below / QUANTILES).tolist())
            found += [
                Supported(*row) for row in zip(trace.positions, [path] * len(inputs), *columns)
            ]
        return found


class Separation(NamedTuple):
    """How well a score tells ordinary text from another."""

    path: str
    score: str
    against: str
    auc: float
    """Chance that a token of the ordinary text scores higher than one of the other: 0.5 is a coin."""


def separations(model: Any, text: Tensor, others: dict[str, Tensor]) -> Rows[Separation]:
    """ROC-AUC of both scores of every layer between ordinary ``text`` (rows, length) and ``others`` by name, such as
    :func:`scrambled` text or another domain."""
    own = text_scores(model, text)
    found = Rows[Separation]()
    for name, ids in others.items():
        for path, scores in text_scores(model, ids).items():
            found += [
                Separation(path, score, name, auc(own[path][score], scores[score]))
                for score in SCORES
            ]
    return found


def scrambled(ids: Tensor, seed: int = 0) -> Tensor:
    """``ids`` (rows, length) with the tokens of each row in random order."""
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return ids.gather(1, order.to(ids.device))
