"""The divergences that losses are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint_code.parameters import to_at_least_float32

NUMBERS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Of predictions that are turned into probabilities together, by kind of device: few enough for
the cache of a CPU, enough for a GPU to be busy."""


def soften(logits: Tensor, temperature: float) -> Tensor:
    """``logits`` over ``temperature``, in float32 at least; as they are where that is 1."""
    return logits if temperature == 1 else to_at_least_float32(logits) / temperature


def kl(predicted: Tensor, target: Tensor) -> Tensor:
    """KL(target ‖ predicted) (…) in nats, of log-probabilities (…, outcomes)."""
    return nn.functional.kl_div(predicted, target, reduction="none", log_target=True).sum(-1)


def kl_of_logits(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target ‖ predicted) (…) in nats, of logits (…, vocabulary) in their own dtypes.

    The same as :func:`kl` of their log-probabilities in float32 at least, in less memory: some
    predictions at a time, whose gradients are made at once. Only ``logits`` get one.
    """
    return _KLOfLogits.apply(logits, target.detach())


class _KLOfLogits(torch.autograd.Function):
    """:func:`kl_of_logits`; the gradient of a token's KL is predicted − target probabilities."""

    @staticmethod
    def forward(context: Any, logits: Tensor, target: Tensor) -> Tensor:
        vocabulary = logits.shape[-1]
        numbers = NUMBERS_AT_ONCE.get(logits.device.type, NUMBERS_AT_ONCE["cuda"])
        size = max(1, numbers // vocabulary)
        needs_gradient = context.needs_input_grad[0]
        gradient = torch.empty_like(logits) if needs_gradient else logits.new_empty(0)
        divergences = []

        starts = range(0, logits.numel() // vocabulary, size)
        rows = logits.reshape(-1, vocabulary), target.reshape(-1, vocabulary)
        for start in starts:
            ours, theirs = (
                to_at_least_float32(each[start : start + size]).log_softmax(-1) for each in rows
            )
            theirs_probabilities = theirs.exp()
            divergences.append((theirs_probabilities * (theirs - ours)).sum(-1))
            if needs_gradient:
                part = gradient.view(-1, vocabulary)[start : start + size]
                part.copy_(ours.exp_().sub_(theirs_probabilities))

        context.save_for_backward(gradient)
        if not divergences:
            return to_at_least_float32(logits).sum(-1)
        return torch.cat(divergences).view(logits.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, passed_back: Tensor) -> tuple[Tensor, None]:
        (gradient,) = context.saved_tensors
        return gradient * passed_back[..., None].to(gradient.dtype), None


def top_and_rest_log_probs(logits: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities (…, k + 1) of tokens ``top`` (…, k) and, last, of all others as one.

    They are those that ``logits`` (…, vocabulary) give. The KL between two of these is at most
    the KL between the whole distributions, and equals it where k is the vocabulary (log-sum
    inequality: Cover & Thomas 2006, theorem 2.7.1).
    """
    # Not -inf, whose gradient is NaN where there are no others.
    others = logits.scatter(-1, top, torch.finfo(logits.dtype).min)
    parts = torch.cat([logits.gather(-1, top), others.logsumexp(-1, keepdim=True)], -1)
    return parts - logits.logsumexp(-1, keepdim=True)
