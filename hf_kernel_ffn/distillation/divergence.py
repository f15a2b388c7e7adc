"""The divergences that losses are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def kl(predicted: Tensor, target: Tensor) -> Tensor:
    """KL(target ‖ predicted) (…) in nats, of log-probabilities (…, outcomes)."""
    return nn.functional.kl_div(predicted, target, reduction="none", log_target=True).sum(-1)


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
