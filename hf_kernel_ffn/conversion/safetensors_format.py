"""What reading and writing safetensors one tensor at a time have in common."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""By the name that safetensors has for them, in the order in which it writes them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**24
"""Bytes copied at once."""
LENGTH_BYTES = 8
"""The first bytes of a file say how long the header is, and the header's length is a multiple."""


def count_bytes(tensor: Tensor) -> int:
    """The bytes that the numbers of ``tensor`` take."""
    return tensor.numel() * tensor.element_size()


def view_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous ``tensor`` itself."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
