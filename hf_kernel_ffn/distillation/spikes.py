"""How long the output of an FFN may be that is no spike, over all processes of a training."""

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
    total, count = sum_over_processes(torch.stack([logarithm, known.to(median.dtype)]))
    typical = (total / count.clamp_min(1)).exp()
    return torch.where(count > 0, SPIKE * typical, torch.inf)
