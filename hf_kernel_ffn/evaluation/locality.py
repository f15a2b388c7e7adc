"""Does the kernel matter? What distance carries in a converted model, and what locality buys.

Three readings of each converted FFN at the teacher's inputs: how far the distance tells units
apart; whether the tokens that fire a prototype most have something in common (controls: the
teacher's own units, random tokens); whether the kernel knows text from what is none (controls: the
input's distance to the mean input, and its length).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.modeling import KernelModelMixin
from ..conversion.ridge import CHUNK
from ..conversion.sampling import read_ffn_inputs
from ..families.lookup import find_stock_ffn
from ..families.student import check_pair
from ..families.weights import read_stock_weights
from .purity import TOP, context_purity, score_purity

SKIP = 8
"""Positions at the start of each row that are left out: with little before it, a token's input is
much the same everywhere."""
CHANCE_SETS = 1000
"""Random sets of tokens in the chance baseline."""
VARIATION = ("over_units", "over_tokens", "log_share", "log_share_weighted")
"""What :func:`denominator_variation` returns."""
TINY = 1e-300
"""Stands for zero where something is divided by."""


@torch.no_grad()
def denominator_variation(ffn: KernelFFN, inputs: Tensor) -> dict[str, float]:
    """Measure how far distance tells the units of ``ffn``, and tokens, apart.

    The denominator is ‖x − w_i‖² plus those of the kernel's parameters that start as a
    distance (ε of Yat, c² of IMQ).

    Args:
        inputs: (tokens, hidden_size).

    Returns:
        all zero for a kernel without distance, whose denominator is constant:

        * ``over_units``: the denominator's coefficient of variation over units at one token,
          mean over tokens;
        * ``over_tokens``: the same over tokens at one unit, mean over units;
        * ``log_share``: variance of log κ's distance term over variance of log κ, each over
          the units that fire at one token and summed over tokens. The term is what log κ
          changes by when all distances are replaced by the token's mean: for Yat, with
          log κ = 2 log|s| − log(‖x − w‖² + ε), the log-denominator; for kernels of
          distance alone all of it;
        * ``log_share_weighted``: the same with units weighted by κ: scores near zero, whose
          logarithms are far out, take most of the plain variance and write nothing.
    """
    if not ffn.kernel.uses_distance:
        return dict.fromkeys(VARIATION, 0.0)
    parameters = ffn.kernel_parameters()
    softening = sum(
        parameters[name] for name, start in ffn.kernel.parameters.items() if start == "distance"
    )

    over_units = []
    moments = []
    variances = []
    for score, distance2 in map(ffn.scores, inputs.split(CHUNK)):
        assert distance2 is not None  # the kernel uses it
        denominator = (distance2 + softening).double()
        over_units.append(denominator.std(-1, correction=0) / denominator.mean(-1))
        moments.append(torch.stack([denominator.sum(0), denominator.square().sum(0)]))
        variances.append(_log_kernel_variances(ffn, score, distance2))

    mean, square = torch.stack(moments).sum(0) / len(inputs)
    over_tokens = (square - mean.square()).clamp_min(0).sqrt() / mean
    term, whole = torch.stack(variances).sum(0).T
    shares = (term / whole.clamp_min(TINY)).tolist()
    figures = (torch.cat(over_units).mean().item(), over_tokens.mean().item(), *shares)
    return dict(zip(VARIATION, figures, strict=True))


def _log_kernel_variances(ffn: KernelFFN, score: Tensor, distance2: Tensor) -> Tensor:
    """(2, 2): variances of log κ's distance term and of log κ over units, summed over tokens; the
    units that fire counted alike, and weighted by κ."""
    parameters = ffn.kernel_parameters()
    level = distance2.mean(-1, keepdim=True).expand_as(distance2)
    log_kernel = ffn.kernel.log(score, distance2, **parameters).double()
    log_leveled = ffn.kernel.log(score, level, **parameters).double()

    fires = log_kernel.isfinite() & log_leveled.isfinite()
    alike = fires.double()
    shares = log_kernel.masked_fill(~fires, -torch.inf).softmax(-1)
    by_kernel = shares.nan_to_num(0.0)  # NaN where nothing fires
    term = (log_kernel - log_leveled).where(fires, 0.0)
    whole = log_kernel.where(fires, 0.0)
    return torch.stack(
        [
            torch.stack([_variance(term, weight).sum(), _variance(whole, weight).sum()])
            for weight in (alike, by_kernel)
        ]
    )


def _variance(values: Tensor, weight: Tensor) -> Tensor:
    """(tokens,): of ``values`` (tokens, units) under ``weight``, which need not sum to one."""
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(TINY)
    mean = (weight * values).sum(-1, keepdim=True)
    return (weight * (values - mean).square()).sum(-1)


@torch.no_grad()
def score_support_by_distance(ffn: KernelFFN, inputs: Tensor) -> dict[str, Tensor]:
    """Score how well prototypes cover ``inputs`` (tokens, hidden_size).

    Returns:
        (tokens,) each: ``mass`` log Σκ, −∞ where nothing fires, and ``nearest``
        −min ‖x − w_i‖² unless the kernel knows no distance.
    """
    nearest = []
    mass = []
    for score, distance2 in map(ffn.scores, inputs.split(CHUNK)):
        log_kernel = ffn.kernel.log(score, distance2, **ffn.kernel_parameters())
        mass.append(log_kernel.logsumexp(-1))
        if distance2 is not None:
            nearest.append(-distance2.amin(-1))
    scores = {"nearest": torch.cat(nearest)} if nearest else {}
    return {**scores, "mass": torch.cat(mass)}


def auc(higher: Tensor, lower: Tensor) -> float:
    """Return the chance that one of the scores ``higher`` (n,) exceeds one of ``lower`` (m,).

    Ties count half: the area under the ROC curve, by the rank sum (Hanley & McNeil 1982,
    Radiology 143:29).

    Raises:
        InputError: a score is NaN, or a side empty.
    """
    scores = torch.cat([higher, lower])
    if scores.isnan().any() or not len(higher) or not len(lower):
        raise InputError(
            f"found NaN or none in {len(higher)} and {len(lower)} scores, expected numbers: "
            "check the weights"
        )
    _, place, count = scores.unique(return_inverse=True, return_counts=True)
    rank_of_value = count.cumsum(0) - (count.double() - 1) / 2  # ties share their mean rank
    ranks = rank_of_value[place]
    return (ranks[: len(higher)].mean().item() - (len(higher) + 1) / 2) / len(lower)


def support_auc(ffn: KernelFFN, text: Tensor, other: Tensor) -> dict[str, float | None]:
    """Measure how well support tells ordinary text from another, each token a score.

    Args:
        text, other: inputs (tokens, hidden_size) at the two.

    Returns:
        AUC of ``text`` against ``other`` by ``nearest`` (None without distance) and ``mass`` of
        :func:`score_support_by_distance`, and by two controls that need no FFN: ``control``, minus
        the distance to the mean input at ``text``, and ``length``, minus ‖x‖: what ``nearest``
        comes to when prototypes are short.
    """
    mean = text.float().mean(0)
    of_text = _score_support_and_controls(ffn, text, mean)
    of_other = _score_support_and_controls(ffn, other, mean)
    return {"nearest": None, **{name: auc(of_text[name], of_other[name]) for name in of_text}}


def _score_support_and_controls(ffn: KernelFFN, inputs: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Support scores of ``inputs``, and those of the two controls."""
    scores = score_support_by_distance(ffn, inputs)
    x = inputs.float()
    return {**scores, "control": -(x - mean).norm(dim=-1), "length": -x.norm(dim=-1)}


@torch.no_grad()
def locality_report(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Tensor,
    seed: int = 0,
    *,
    top: int = TOP,
) -> dict:
    """Take the three readings of every converted FFN at the teacher's inputs, past the first SKIP
    positions of each row.

    Args:
        ids: (rows, length) token ids of text.
        seed: of the two other texts (tokens shuffled within each row; uniformly random ids) and the
            random sets of tokens.

    Returns:
        ``tokens``: their number; means over layers, None where no layer has a figure:
        ``denominator``, ``contexts`` of ``student``, ``teacher`` and ``chance``, ``support``
        against ``shuffled`` and ``random``; ``layers``, with ``path``.

    Raises:
        InputError: ``student`` is not converted or not of this teacher, rows are too short, or
            tokens fewer than ``top``.
    """
    check_pair(student, teacher)
    if ids.ndim != 2 or ids.shape[1] <= SKIP:
        raise InputError(
            f"found token ids of shape {tuple(ids.shape)}, expected (rows, length): "
            f"give rows longer than {SKIP}"
        )
    student.eval()
    teacher.eval()
    generator = torch.Generator().manual_seed(seed)
    texts = {"text": ids, **_make_other_texts(teacher, ids, generator)}
    tokens = ids[:, SKIP:].flatten().to(next(teacher.parameters()).device)
    chance_sets = torch.stack(
        [torch.randperm(len(tokens), generator=generator)[:top] for _ in range(CHANCE_SETS)]
    )

    layers = []
    for path, ffn in cast(KernelModelMixin, student).kernel_ffns().items():
        # One at a time: the inputs of one layer at the three texts are in memory together.
        inputs = {name: _read_inputs(teacher, path, rows) for name, rows in texts.items()}
        x = inputs.pop("text")
        weights = read_stock_weights(teacher, find_stock_ffn(teacher, path))
        layers.append(
            {
                "path": path,
                "denominator": denominator_variation(ffn, x),
                "contexts": {
                    "student": context_purity(ffn.coefficients, x, tokens, top),
                    "teacher": context_purity(weights.coefficients, x, tokens, top),
                    "chance": score_purity(chance_sets.to(x.device), x, tokens),
                },
                "support": {name: support_auc(ffn, x, other) for name, other in inputs.items()},
            }
        )
    figures = [{name: layer[name] for name in layer if name != "path"} for layer in layers]
    return {"tokens": len(tokens), **_mean_of_each(figures), "layers": layers}


def _make_other_texts(
    teacher: PreTrainedModel, ids: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Two texts of the shape of ``ids`` that are none."""
    order = torch.rand(ids.shape, generator=generator).argsort(1).to(ids.device)
    vocabulary = cast(nn.Embedding, teacher.get_input_embeddings()).num_embeddings
    return {
        "shuffled": ids.gather(1, order),
        "random": torch.randint(vocabulary, ids.shape, generator=generator),
    }


def _read_inputs(teacher: PreTrainedModel, path: str, ids: Tensor) -> Tensor:
    """(tokens, hidden_size): what the FFN at ``path`` reads past the first SKIP positions."""
    inputs = torch.cat(list(read_ffn_inputs(teacher, path, ids)))
    return inputs.unflatten(0, tuple(ids.shape))[:, SKIP:].flatten(0, 1)


def _mean_of_each(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of every figure, nested as the entries are; None where all are."""
    means: dict[str, Any] = {}
    for name, first in entries[0].items():
        values = [entry[name] for entry in entries]
        if isinstance(first, dict):
            means[name] = _mean_of_each(values)
        else:
            numbers = [value for value in values if value is not None]
            means[name] = sum(numbers) / len(numbers) if numbers else None
    return means
