"""The largest of many numbers that come in portions."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_top_k(best: tuple[Tensor, ...], new: tuple[Tensor, ...], top: int) -> tuple[Tensor, ...]:
    """Of two tables with candidates for the same rows, the ``top`` largest of each row, descending.

    Args:
        best, new: (rows, candidates) values to rank by, then any (rows, candidates, ...) tensors
            that belong to them.
    """
    joined = [torch.cat(pair, 1) for pair in zip(best, new, strict=True)]
    values, kept = joined[0].topk(min(top, joined[0].shape[1]))
    return values, *(_select_candidates(tensor, kept) for tensor in joined[1:])


def _select_candidates(tensor: Tensor, kept: Tensor) -> Tensor:
    """``tensor`` (rows, candidates, ...) at the candidates ``kept`` (rows, top) of each row."""
    wide = kept.view(*kept.shape, *(1 for _ in tensor.shape[2:]))
    return tensor.gather(1, wide.expand(*kept.shape, *tensor.shape[2:]))
