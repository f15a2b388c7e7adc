"""Layers that readouts are timed against: bare matrix products, and another package's layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

YAT_EPSILON = 1e-5
"""Of nmn's YatNMN by default."""


class MatrixProducts(nn.Module):
    """The floor: the products of an FFN with ``inner`` (P, d) matrices and one (d, P), and nothing
    between them."""

    def __init__(self, size: int, width: int, inner: int):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(size, width, bias=False) for _ in range(inner))
        self.outer = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The products, of which the last inner one goes on."""
        for linear in self.inner:
            hidden = linear(x)
        return self.outer(hidden)

    def train_step(self, x: Tensor, gradient: Tensor) -> None:
        """The products of a forward and a backward pass: two more for each of the first."""
        for linear in self.inner:
            hidden = linear(x)
        self.outer(hidden)
        inner_gradient = gradient @ self.outer.weight
        gradient.T @ hidden
        for linear in self.inner:
            inner_gradient @ linear.weight
            inner_gradient.T @ x


class WithLinear(nn.Module):
    """A layer of another package and the linear map behind it."""

    def __init__(self, first: nn.Module, size: int, width: int):
        super().__init__()
        self.first = first
        self.second = nn.Linear(width, size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size)."""
        return self.second(self.first(x))


class PlainYat(nn.Module):
    """nmn's YatNMN as its formula in plain torch, where nmn is not installed:
    (x·w + b)² / (‖x − w‖² + ε) · α."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, size) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width)."""
        score = x @ self.weight.T + self.bias
        lengths = x.square().sum(-1, keepdim=True) + self.weight.square().sum(-1)
        distance = (lengths - 2 * (score - self.bias)).clamp(min=0)
        return score**2 / (distance + YAT_EPSILON) * self.alpha
