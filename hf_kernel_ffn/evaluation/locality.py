"""Does the kernel matter? What distance carries in a converted model, and what locality buys.

Three readings of each converted FFN at the teacher's inputs: how far the distance tells units apart; whether the tokens that
fire a prototype most have something in common (controls: the teacher's own units, random tokens); whether the kernel knows
text from what is none (controls: the input's distance to the mean input, and its length).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from ..conversion.ridge import CHUNK
from ..conversion.sampling import read_ffn_inputs
from ..families.lookup import find_stock_ffn
from ..families.student import check_pair
from ..families.weights import read_stock_weights

TOP = 20
"""Tokens that stand for a prototype's contexts."""
SKIP = 8
"""Positions at the start of each row that are left out: with little before it, a token's input is much the same everywhere."""
CHANCE_SETS = 1000
"""Random sets of tokens in the chance baseline."""
VARIATION = ("over_units", "over_tokens", "log_share", "log_share_weighted")
"""What :func:`denominator_variation` returns."""


@torch.no_grad()
def denominator_variation(ffn: KernelFFN, inputs: Tensor) -> dict[str, float]:
    """How far distance tells the units of ``ffn``, and the tokens of ``inputs`` (tokens, hidden_size), apart.

    The denominator is ‖x − w_i‖² plus those of the kernel's parameters that start as a distance (ε of Yat, c² of IMQ).

    * ``over_units``: its coefficient of variation over units at one token, mean over tokens;
    * ``over_tokens``: the same over tokens at one unit, mean over units;
    * ``log_share``: variance of log κ's distance term over variance of log κ, each over the units that fire at one token and
      summed over tokens. The term is what log κ changes by when all distances are replaced by the token's mean: for
      Yat, with log κ = 2 log|s| − log(‖x − w‖² + ε), the log-denominator; for kernels of distance alone all of it;
    * ``log_share_weighted``: the same with units weighted by κ: scores near zero, whose logarithms are far out, take most
      of the plain variance and write nothing.

    All are zero for a kernel without distance: its denominator is constant.
    """
    if not ffn.kernel.uses_distance:
        return dict.fromkeys(VARIATION, 0.0)
    parameters = ffn.kernel_parameters()
    softening = sum(
        parameters[name] for name, start in ffn.kernel.parameters.items() if start == "distance"
    )
    over_units, moments, variances = [], [], []
    for score, distance2 in map(ffn.scores, inputs.split(CHUNK)):
        assert distance2 is not None  # the kernel uses it
        denominator = (distance2 + softening).double()
        over_units.append(denominator.std(-1, correction=0) / denominator.mean(-1))
        moments.append(torch.stack([denominator.sum(0), denominator.square().sum(0)]))
        level = distance2.mean(-1, keepdim=True).expand_as(distance2)
        log_kernel, leveled = (
            ffn.kernel.log(score, d, **parameters).double() for d in (distance2, level)
        )
        fires = log_kernel.isfinite() & leveled.isfinite()
        weighted = (
            log_kernel.masked_fill(~fires, -torch.inf).softmax(-1).nan_to_num(0.0)
        )  # NaN where nothing fires
        terms = [v.where(fires, 0.0) for v in (log_kernel - leveled, log_kernel)]
        variances.append(
            torch.stack([_variance(v, w).sum() for w in (fires.double(), weighted) for v in terms])
        )
    mean, square = torch.stack(moments).sum(0) / len(inputs)
    over_tokens = (square - mean.square()).clamp_min(0).sqrt() / mean
    term, whole = torch.stack(variances).sum(0).view(2, 2).T
    shares = (term / whole.clamp_min(1e-300)).tolist()
    return dict(
        zip(VARIATION, (torch.cat(over_units).mean().item(), over_tokens.mean().item(), *shares))
    )


def _variance(values: Tensor, weight: Tensor) -> Tensor:
    """(tokens,): of ``values`` (tokens, prototypes) under ``weight``, which need not sum to one."""
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-300)
    return (weight * (values - (weight * values).sum(-1, keepdim=True)).square()).sum(-1)


@torch.no_grad()
def top_tokens(
    coefficients: Callable[[Tensor], Tensor], inputs: Tensor, top: int = TOP
) -> tuple[Tensor, Tensor]:
    """Each unit's ``top`` largest |coefficients|, descending, (units, top) float32, and their places in ``inputs``, int64.

    ``coefficients`` maps (CHUNK or fewer, hidden_size) to (same, units). InputError unless 2 ≤ ``top`` ≤ tokens.
    """
    if not 2 <= top <= len(inputs):
        raise InputError(
            f"found {len(inputs)} tokens for top={top}, expected 2 ≤ top ≤ tokens: give a longer text"
        )
    best: tuple[Tensor, ...] = ()
    for number, chunk in enumerate(inputs.split(CHUNK)):
        values, places = coefficients(chunk).float().abs().T.topk(min(top, len(chunk)))
        pair = (values, places + number * CHUNK)
        values, places = (torch.cat(parts, 1) for parts in zip(best, pair)) if best else pair
        values, kept = values.topk(min(top, values.shape[1]))
        best = (values, places.gather(1, kept))
    return best[0], best[1]


def context_purity(
    coefficients: Callable[[Tensor], Tensor], inputs: Tensor, tokens: Tensor, top: int = TOP
) -> dict:
    """What the tokens that fire a unit most have in common: :func:`score_purity` of :func:`top_tokens`.

    ``dead`` counts units that never fire, ``rare`` those that fire on fewer than ``top`` tokens. Both are left out: fewer
    tokens are purer by chance alone. ``tokens`` (tokens,) has the ids at ``inputs`` (tokens, hidden_size). InputError as there.
    """
    values, places = top_tokens(coefficients, inputs, top)
    dead, full = values[:, 0] == 0, values[:, -1] > 0
    return {
        **score_purity(places[full], inputs, tokens),
        "dead": int(dead.sum()),
        "rare": int((~dead & ~full).sum()),
    }


@torch.no_grad()
def score_purity(places: Tensor, inputs: Tensor, tokens: Tensor) -> dict[str, float | None]:
    """Means over the sets ``places`` (sets, top) of places in ``inputs`` and ``tokens``, None if there is no set:

    ``token``: share of the set's most common token id; ``cosine``: mean pairwise cosine of its inputs, centred on all of them.
    """
    if not len(places):
        return {"token": None, "cosine": None}
    ids, mean, cosine, top = tokens[places], inputs.float().mean(0), 0.0, places.shape[1]
    for some in places.split(max(1, CHUNK // top)):
        directions = nn.functional.normalize(inputs[some].float() - mean, dim=-1)
        pairs = directions.sum(1).square().sum(-1) - directions.square().sum(
            (1, 2)
        )  # ‖Σu‖² holds each u with itself too
        cosine += pairs.sum().item() / (top * (top - 1)) / len(places)
    return {
        "token": (ids == ids.mode(-1, keepdim=True).values).double().mean().item(),
        "cosine": cosine,
    }


@torch.no_grad()
def score_support_by_distance(ffn: KernelFFN, inputs: Tensor) -> dict[str, Tensor]:
    """How well prototypes cover ``inputs`` (tokens, hidden_size), (tokens,) each: ``mass`` log Σκ, −inf where nothing fires,
    and ``nearest`` −min ‖x − w_i‖² unless the kernel knows no distance."""
    parts = []
    for score, distance2 in map(ffn.scores, inputs.split(CHUNK)):
        assert distance2 is not None  # the kernel uses it
        mass = ffn.kernel.log(score, distance2, **ffn.kernel_parameters()).logsumexp(-1)
        parts.append(
            {"mass": mass} if distance2 is None else {"nearest": -distance2.amin(-1), "mass": mass}
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def auc(higher: Tensor, lower: Tensor) -> float:
    """Chance that one of the scores ``higher`` (n,) exceeds one of ``lower`` (m,), ties counting half: the area under the ROC
    curve, by the rank sum (Hanley & McNeil 1982, Radiology 143:29). InputError if a score is NaN or a side empty."""
    scores = torch.cat([higher, lower])
    if scores.isnan().any() or not len(higher) or not len(lower):
        raise InputError(
            f"found NaN or none in {len(higher)} and {len(lower)} scores, expected numbers: check the weights"
        )
    _, place, count = scores.unique(return_inverse=True, return_counts=True)
    ranks = (count.cumsum(0) - (count.double() - 1) / 2)[
        place
    ]  # ties share the mean of their ranks
    return (ranks[: len(higher)].mean().item() - (len(higher) + 1) / 2) / len(lower)


def support_auc(ffn: KernelFFN, text: Tensor, other: Tensor) -> dict[str, float | None]:
    """AUC of inputs (tokens, hidden_size) at ordinary ``text`` against those at some ``other``, each token a score.

    ``nearest`` (None without distance) and ``mass`` of :func:`score_support_by_distance`. Two controls need no FFN: ``control``, minus the
    distance to the mean input at ``text``, and ``length``, minus ‖x‖: what ``nearest`` comes to when prototypes are short.
    """
    own, theirs, mean = (
        score_support_by_distance(ffn, text),
        score_support_by_distance(ffn, other),
        text.float().mean(0),
    )
    for scores, x in ((own, text.float()), (theirs, other.float())):
        scores |= {"control": -(x - mean).norm(dim=-1), "length": -x.norm(dim=-1)}
    return {"nearest": None, **{name: auc(own[name], theirs[name]) for name in own}}


@torch.no_grad()
def locality_report(
    student: Any, teacher: Any, ids: Tensor, seed: int = 0, *, top: int = TOP
) -> dict:
    """The three readings of every converted FFN at the teacher's inputs, past the first SKIP positions of each row.

    Args:
        ids: (rows, length) token ids of text.
        seed: of the two other texts (tokens shuffled within each row; uniformly random ids) and the random sets of tokens.

    Returns:
        ``tokens``: their number; means over layers, None where no layer has a figure: ``denominator``, ``contexts`` of
        ``student``, ``teacher`` and ``chance``, ``support`` against ``shuffled`` and ``random``; ``layers``, with ``path``.

    Raises:
        InputError: ``student`` is not converted or not of this teacher, rows are too short, or tokens fewer than ``top``.
    """
    check_pair(student, teacher)
    if ids.ndim != 2 or ids.shape[1] <= SKIP:
        raise InputError(
            f"found token ids of shape {tuple(ids.shape)}, expected (rows, length): give rows longer than {SKIP}"
        )
    student.eval(), teacher.eval()
    kernels, generator = student.kernel_ffns(), torch.Generator().manual_seed(seed)
    shuffled = ids.gather(1, torch.rand(ids.shape, generator=generator).argsort(1).to(ids.device))
    uniform = torch.randint(
        teacher.get_input_embeddings().num_embeddings, ids.shape, generator=generator
    )
    tokens, layers, paths = (
        ids[:, SKIP:].flatten().to(next(teacher.parameters()).device),
        [],
        list(kernels),
    )
    sets = torch.stack(
        [torch.randperm(len(tokens), generator=generator)[:top] for _ in range(CHANCE_SETS)]
    )
    for (
        path
    ) in paths:  # one at a time: the inputs of one layer at the three texts are in memory together
        read = [
            torch.cat(list(read_ffn_inputs(teacher, path, some)))
            for some in (ids, shuffled, uniform)
        ]
        x, *others = (
            inputs.unflatten(0, tuple(ids.shape))[:, SKIP:].flatten(0, 1) for inputs in read
        )
        stock = read_stock_weights(teacher, find_stock_ffn(teacher, path))
        units = {"student": kernels[path].coefficients, "teacher": stock.coefficients}
        contexts = {who: context_purity(some, x, tokens, top) for who, some in units.items()}
        contexts["chance"] = score_purity(sets.to(x.device), x, tokens)
        support = {
            name: support_auc(kernels[path], x, other)
            for name, other in zip(("shuffled", "random"), others)
        }
        layers.append(
            {
                "denominator": denominator_variation(kernels[path], x),
                "contexts": contexts,
                "support": support,
            }
        )
    return {
        "tokens": len(tokens),
        **_means(layers),
        "layers": [{"path": p, **entry} for p, entry in zip(paths, layers)],
    }


def _means(entries: list) -> Any:
    """The mean of numbers, or of nested dicts of them key by key; None where all are."""
    if isinstance(entries[0], dict):
        return {key: _means([entry[key] for entry in entries]) for key in entries[0]}
    numbers = [entry for entry in entries if entry is not None]
    return sum(numbers) / len(numbers) if numbers else None
