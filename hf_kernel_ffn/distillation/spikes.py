"""Spikes in what FFNs write: tokens whose output is many times as long as the others'.

Of the variance of what SmolLM2's FFNs write, 40% to 99.6% is that of spikes in six layers, most of
them the first tokens of rows. A sum of squares over tokens is a sum over those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..conversion.figures import SPIKE
from .collectives import sum_over_processes


def measure_longest_ordinary(output: Tensor) -> Tensor:
    """How long an ``output`` (tokens, hidden_size) is at most that is no spike, a scalar.

    It is :data:`~hf_kernel_ffn.conversion.figures.SPIKE` medians of the tokens that write anything;
    over several processes, of the geometric mean of theirs. Infinite where no process has any.
    """
    lengths = output.norm(dim=-1)
    median = lengths.where(lengths > 0, torch.nan).nanmedian()
    known = median.isfinite()
    logarithm = torch.where(known, median.log(), torch.zeros_like(median))
    count = sum_over_processes(known.to(median.dtype))
    typical = (sum_over_processes(logarithm) / count.clamp_min(1)).exp()
    return torch.where(count > 0, SPIKE * typical, torch.inf)


def shrink_spikes(output: Tensor, longest: Tensor) -> Tensor:
    """(tokens, 1) factors that make none of ``output`` (tokens, hidden_size) longer than
    ``longest``."""
    return (longest / output.norm(dim=-1, keepdim=True)).clamp_max(1)
