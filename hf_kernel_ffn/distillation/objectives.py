"""What a stage minimises: one function per stage name, which runs a batch forward and backward and returns its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.hooks import watch_ffns
from ..families.lookup import find_stock_ffn
from ..text.inputs import Inputs, make_forward_arguments
from ..text.prediction import logits_with_answers, select_predicting_logits
from .recipe import Stage

Backward = Callable[[Tensor], None]
Price = Callable[[str], Tensor | float]
"""What to add to the loss for the FFN at a path, once it has run."""


def _free(path: str) -> float:
    return 0.0


def layer_wise(
    stage: Stage,
    teacher: PreTrainedModel,
    student: nn.Module,
    ffns: dict[str, nn.Module],
    ids: Inputs,
    backward: Backward,
    price: Price = _free,
) -> Tensor:
    """Each FFN of ``ffns`` (by path) regresses the teacher's output on the teacher's own inputs, all in one forward pass of
    the teacher. One layer's graph lives at a time: its backward pass runs before the next layer's forward.

    Returns:
        the mean over layers of the fraction of variance unexplained, detached.
    """
    losses: list[Tensor] = []

    def regress(path: str, x: Tensor, output: Tensor) -> None:
        with torch.enable_grad():
            device = next(ffns[path].parameters()).device  # the teacher may be on another one
            target = to_at_least_float32(output.detach()).to(device)
            error = (
                (to_at_least_float32(ffns[path](x.detach().to(device))) - target).square().mean()
            )
            apart = target - mean_over_processes(target.flatten(0, -2).mean(0))
            loss = error / mean_over_processes(apart.square().mean()).clamp_min(1e-12)
            backward(loss + price(path))
        losses.append(loss.detach())

    base = teacher.base_model
    with (
        watch_ffns(base, {path: find_stock_ffn(teacher, path) for path in ffns}, regress),
        torch.no_grad(),
    ):
        base(**make_forward_arguments(base, ids))
    return torch.stack(losses).mean()


def logits(
    stage: Stage,
    teacher: PreTrainedModel,
    student: nn.Module,
    ffns: dict[str, nn.Module],
    ids: Inputs,
    backward: Backward,
    price: Price = _free,
) -> Tensor:
    """T² · KL(teacher ‖ student) at temperature T (Hinton et al. 2015, arXiv:1503.02531, §2) and the cross-entropy on the text,
    each with its weight, in nats per predicted token; where ``ids`` have labels, those are what is predicted.

    Returns:
        the loss, detached.
    """
    with torch.no_grad():
        wanted = (
            to_at_least_float32(teacher(**make_forward_arguments(teacher, ids)).logits)
            / stage.temperature
        )

    def divergence(output: Tensor) -> Tensor:
        target = select_predicting_logits(wanted.to(output.device), ids).log_softmax(-1)
        return kl(select_predicting_logits(output, ids).log_softmax(-1), target)

    return match(stage, teacher, student, ffns, ids, backward, price, divergence)


def match(
    stage: Stage,
    teacher: PreTrainedModel,
    student: nn.Module,
    ffns: dict[str, nn.Module],
    ids: Inputs,
    backward: Backward,
    price: Price,
    divergence: Callable[[Tensor], Tensor],
) -> Tensor:
    """The loss of :func:`logits`, for any ``divergence`` per predicted token of the student's logits (rows, length, vocabulary) over
    T; the teacher does not run here."""
    read = make_forward_arguments(
        teacher, ids, next(student.parameters()).device
    )  # the teacher may be on another one
    output = to_at_least_float32(student(**read).logits)
    loss = divergence(output / stage.temperature).mean() * stage.temperature**2
    loss = loss * stage.kl
    if stage.cross_entropy:
        guesses, answers = logits_with_answers(output, ids)
        loss = loss + stage.cross_entropy * nn.functional.cross_entropy(
            guesses.flatten(0, -2), answers.flatten()
        )
    backward(loss + sum(price(path) for path in ffns) / len(ffns))
    return loss.detach()


def kl(predicted: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted ‖ predicted) (…) in nats, of log-probabilities (…, outcomes)."""
    return nn.functional.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1)


def top_and_rest_log_probs(logits: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities (…, k + 1) under ``logits`` (…, vocabulary) of the tokens ``top`` (…, k) and, last, of all others as one.

    The KL between two of these is at most that between the whole distributions, which it is where k is the vocabulary (log-sum
    inequality: Cover & Thomas 2006, theorem 2.7.1)."""
    others = logits.scatter(
        -1, top, torch.finfo(logits.dtype).min
    )  # not -inf, whose gradient is NaN where there are no others
    parts = torch.cat([logits.gather(-1, top), others.logsumexp(-1, keepdim=True)], -1)
    return parts - logits.logsumexp(-1, keepdim=True)


def mean_over_processes(tensor: Tensor) -> Tensor:
    """``tensor`` averaged over all processes, which have as many tokens each; no gradient runs through it."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def to_at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


OBJECTIVES = {"layer-wise": layer_wise, "logits": logits}
