"""The likeliest tokens of a position and their probabilities, in few bytes.

Token ids in ascending order are a set. By Elias and Fano (Elias 1974, J. ACM 21) the low bits of
each stand as they are, and the high bits as a row of ones between zeros: about 2 + log2(V / k) bits
a token, of k among V. Probabilities p are kept as ∛p in 1,024 levels. That grid gives the least
Kullback-Leibler divergence at its size: a step of ln p costs p times its square, so the best steps
go with p to the power of −1/3.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVEL_BITS = 10
"""Of a probability. On the shipped Llama, with k = 64, that is a KL of 4e-6 nats
(scripts/benchmarks/stored_logits.py)."""
BYTE_BITS = 8


def count_id_bytes(top_k: int, vocabulary: int) -> int:
    """Bytes of ``top_k`` token ids of a ``vocabulary``."""
    low_bits = _count_low_bits(top_k, vocabulary)
    low_bytes = _count_bytes(top_k * low_bits)
    return low_bytes + _count_bytes(_count_high_bits(top_k, vocabulary))


def count_probability_bytes(count: int) -> int:
    """Bytes of so many probabilities."""
    return _count_bytes(count * LEVEL_BITS)


def pack_ids(ids: Tensor, vocabulary: int) -> Tensor:
    """Pack token ids (..., k), ascending, into (..., bytes) uint8."""
    top_k = ids.shape[-1]
    low_bits = _count_low_bits(top_k, vocabulary)
    ids = ids.long()
    low = _pack_numbers(ids & ((1 << low_bits) - 1), low_bits)
    places = (ids >> low_bits) + torch.arange(top_k, device=ids.device)
    high = torch.zeros(
        *ids.shape[:-1],
        _count_high_bits(top_k, vocabulary),
        dtype=torch.bool,
        device=ids.device,
    )
    high.scatter_(-1, places, True)
    return torch.cat([low, _pack_bits(high)], -1)


def unpack_ids(packed: Tensor, top_k: int, vocabulary: int) -> Tensor:
    """The token ids (..., k) int64 of what :func:`pack_ids` has made.

    Raises:
        ValueError: they are none of so many tokens of ``vocabulary``.
    """
    low_bits = _count_low_bits(top_k, vocabulary)
    low_bytes = _count_bytes(top_k * low_bits)
    low = _unpack_numbers(packed[..., :low_bytes], low_bits, top_k)
    high = _unpack_bits(packed[..., low_bytes:], _count_high_bits(top_k, vocabulary))
    if not bool((high.sum(-1) == top_k).all()):
        raise ValueError(f"found packed token ids that are not {top_k}")

    places = high.nonzero()[:, -1].view(*packed.shape[:-1], top_k)
    high_numbers = places - torch.arange(top_k, device=packed.device)
    return (high_numbers << low_bits) | low


def pack_log_probabilities(log_probabilities: Tensor) -> Tensor:
    """Pack the logarithms (..., n) of probabilities into (..., bytes) uint8."""
    levels = 1 << LEVEL_BITS
    root = (log_probabilities.double() / 3).exp()
    numbers = (root * levels).floor().clamp(0, levels - 1).long()
    return _pack_numbers(numbers, LEVEL_BITS)


def unpack_log_probabilities(packed: Tensor, count: int) -> Tensor:
    """The logarithms (..., n) float32 of ``count`` probabilities that sum to one."""
    numbers = _unpack_numbers(packed, LEVEL_BITS, count)
    root = (numbers.double() + 0.5) / (1 << LEVEL_BITS)
    return (3 * root.log()).log_softmax(-1).float()


def _count_low_bits(top_k: int, vocabulary: int) -> int:
    return max(0, (vocabulary // top_k).bit_length() - 1)


def _count_high_bits(top_k: int, vocabulary: int) -> int:
    return top_k + (vocabulary >> _count_low_bits(top_k, vocabulary))


def _count_bytes(bits: int) -> int:
    return -(-bits // BYTE_BITS)


def _pack_numbers(numbers: Tensor, bits: int) -> Tensor:
    """Pack (..., n) int64 below 2^``bits`` into bytes, the lowest bit first."""
    shifts = torch.arange(bits, device=numbers.device)
    split = (numbers[..., None] >> shifts) & 1
    return _pack_bits(split.flatten(-2).bool())


def _unpack_numbers(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` numbers (..., n) int64 of what :func:`_pack_numbers` has made."""
    split = _unpack_bits(packed, bits * count).unflatten(-1, (count, bits))
    shifts = torch.arange(bits, device=packed.device)
    return (split.long() << shifts).sum(-1)


def _pack_bits(bits: Tensor) -> Tensor:
    """Pack (..., n) bool into (..., ⌈n / 8⌉) uint8, the lowest bit first."""
    missing = -bits.shape[-1] % BYTE_BITS
    bits = torch.nn.functional.pad(bits, (0, missing))
    shifts = torch.arange(BYTE_BITS, device=bits.device)
    grouped = bits.unflatten(-1, (-1, BYTE_BITS)).long()
    return (grouped << shifts).sum(-1).to(torch.uint8)


def _unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` bits (..., n) bool of what :func:`_pack_bits` has made."""
    shifts = torch.arange(BYTE_BITS, device=packed.device)
    split = (packed[..., None].long() >> shifts) & 1
    return split.flatten(-2)[..., :count].bool()
