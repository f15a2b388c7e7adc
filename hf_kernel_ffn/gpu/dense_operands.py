"""What the kernels of a dense mixture read, and arithmetic around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checkpoint_code.operators import MixtureArguments

LEAST_TOKENS = 16
"""Fewest tokens of a tile: what a tensor core multiplies at once."""
LARGEST_STRIDE = 2**23
"""Strides up to here keep offsets within a tile of 128 rows below 2³², its kernels' integers."""


class Operands:
    """What both kernels read, in the dtype that scores are multiplied in."""

    def __init__(self, given: MixtureArguments, most_tokens: int, tile_prototypes: int):
        """Of tiles with at most ``most_tokens`` and with ``tile_prototypes``."""
        dtype = given.x.dtype
        if dtype != given.rows.dtype:
            dtype = torch.promote_types(dtype, given.rows.dtype)
            dtype = torch.promote_types(dtype, torch.float32)
        self.x = _within_reach(given.x.to(dtype))
        self.rows = _within_reach(given.rows.to(dtype))
        self.up = None if given.up is None else _within_reach(given.up.to(dtype))
        self.bias = given.bias.contiguous()
        self.up_bias = None if given.up_bias is None else given.up_bias.contiguous()
        self.epsilon = given.epsilon.float()
        self.factor = given.factor.float()
        self.most_tokens = most_tokens
        self.tiles = -(-len(self.rows) // tile_prototypes)
        # From the weight in use at every call: a norm kept from earlier would be wrong after a step
        # or an adapter.
        self.square_x = square_lengths(given.x)
        self.square_rows = square_lengths(given.rows)
        has_tf32 = given.x.is_cuda and torch.backends.cuda.matmul.allow_tf32
        self.flags = {
            "GATED": given.up is not None,
            "BIASED": given.up_bias is not None,
            "ONE_SIDED": given.one_sided,
            "CONVEX": given.convex,
            "PRECISION": "tf32" if has_tf32 else "ieee",
            "BLOCK_PROTOTYPES": tile_prototypes,
        }

    def block_tokens(self, tokens: int) -> int:
        """Return how many tokens a tile has, of ``tokens``."""
        return min(self.most_tokens, max(LEAST_TOKENS, 1 << (tokens - 1).bit_length()))

    def launch(self, kernel: Any, part: slice, **own: Any) -> None:
        """Run ``kernel`` over all tiles of the tokens ``part``."""
        x = self.x[part]
        up = self.rows if self.up is None else self.up
        block = self.block_tokens(len(x))
        grid = (-(-len(x) // block) * self.tiles,)
        kernel[grid](
            x=x,
            rows=self.rows,
            up=up,
            bias=self.bias,
            up_bias=self.bias if self.up_bias is None else self.up_bias,
            square_x=self.square_x[part],
            square_rows=self.square_rows,
            epsilon=self.epsilon,
            factor=self.factor,
            tokens=len(x),
            prototypes=len(self.rows),
            SIZE=x.shape[1],
            x_token=x.stride(0),
            x_feature=x.stride(1),
            row=self.rows.stride(0),
            row_feature=self.rows.stride(1),
            up_row=up.stride(0),
            up_feature=up.stride(1),
            BLOCK_TOKENS=block,
            **self.flags,
            **own,
        )


def count_tokens(part: slice, x: Tensor) -> int:
    """Return how many tokens of ``x`` the slice ``part`` has."""
    return len(range(*part.indices(len(x))))


def _within_reach(matrix: Tensor) -> Tensor:
    """``matrix``, or a copy where 32 bits would not hold the offsets within a tile."""
    return matrix if max(matrix.stride()) < LARGEST_STRIDE else matrix.contiguous()


def square_lengths(matrix: Tensor) -> Tensor:
    """(rows,) float32: the squared lengths of the rows."""
    return torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.float32).square()


def power_of_two(square: Tensor, dtype: torch.dtype) -> Tensor:
    """A power of two about the length of each row if ``dtype`` is float16, otherwise 1."""
    length = square.sqrt() if dtype == torch.float16 else torch.zeros_like(square)
    return torch.ldexp(torch.ones_like(length), torch.frexp(length).exponent)


def divide_rows(matrix: Tensor, unit: Tensor) -> Tensor:
    """Rows over their units, in the dtype of ``matrix``, contiguous as products like them."""
    if matrix.dtype != torch.float16:
        return matrix
    return (matrix / unit[:, None]).to(matrix.dtype)


def multiply_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed and left in float32; of half-precision matrices as such on CUDA, the
    only place to have that."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
