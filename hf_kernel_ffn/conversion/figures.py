"""How near a readout comes to its FFN, spike tokens apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .calibration_set import is_distributed

SPIKE = 10.0
"""A token is a spike of an FFN whose output there is more than so many times as long as the median.
Trained models write such massive activations at few tokens, most often a row's first (Sun et al.
2024, arXiv:2402.17762). In SmolLM2-135M that one is 780 times the median in layer 11 and 75 times
in layer 28, 99% of their variance; in most layers no token is 7 times as long. A figure over both
says nothing of either."""


def shrink_spikes(outputs: Tensor, longest: Tensor | float) -> Tensor:
    """(tokens, 1) factors that make none of ``outputs`` (tokens, hidden_size) longer than
    ``longest``."""
    return (longest / outputs.norm(dim=-1, keepdim=True)).clamp_max(1)


@torch.no_grad()
def measure_fvu(
    ffn: nn.Module, teacher: Callable[[Tensor], Tensor], batches: Iterable[Tensor]
) -> dict[str, float | int | None]:
    """Compare ``ffn`` with ``teacher`` at inputs (tokens, hidden_size), batch by batch.

    Under torch.distributed ``batches`` are this process's share, and the figures are of all.

    Returns:
        ``fvu``: fraction of variance unexplained over ordinary tokens, None without any;
        ``spike_tokens``: how many spikes there are; ``spike_error``: the largest relative error of
        a spike's output, None without any.
    """
    errors = []
    outputs = []
    for inputs in batches:
        output = teacher(inputs).float()
        errors.append(ffn(inputs.float()) - output)
        outputs.append(output)
    error = _join_shares(errors)
    output = _join_shares(outputs)

    length = output.norm(dim=-1)
    spikes = length > SPIKE * length.median()
    ordinary = output[~spikes]
    variance = (ordinary - ordinary.mean(0)).square().sum()
    fvu = (error[~spikes].square().sum() / variance).item() if len(ordinary) > 1 else None
    worst = None
    if spikes.any():
        worst = (error[spikes].norm(dim=-1) / length[spikes]).max().item()
    return {"fvu": fvu, "spike_tokens": int(spikes.sum()), "spike_error": worst}


def _join_shares(parts: list[Tensor]) -> Tensor:
    """All processes' ``parts`` (tokens, …) in one, the same on each; a process may have none."""
    if is_distributed():
        shares: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, [part.cpu() for part in parts])
        device = parts[0].device if parts else None
        parts = [part.to(device) for share in shares for part in share]
    return torch.cat(parts)
