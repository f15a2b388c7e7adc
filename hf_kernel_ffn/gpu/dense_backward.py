"""The backward pass of a dense mixture."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint_code.operators import TENSORS, MixtureArguments
from .dense_kernels import backward_tuned
from .dense_operands import (
    Operands,
    count_tokens,
    divide_rows,
    multiply_in_float32,
    power_of_two,
    square_lengths,
)


class MixtureBackward:
    """The backward pass, a chunk of tokens at a time; sums over chunks are in float32, by name."""

    def __init__(
        self,
        given: MixtureArguments,
        operands: Operands,
        gradient: Tensor,
        written: Tensor,
        log_mass: Tensor,
        wanted: list[bool],
    ):
        self.given = given
        self.wanted = dict(zip(MixtureArguments._fields, wanted, strict=False))
        self.operands = operands
        self.gradient = gradient.to(given.mix)
        self.mixed = given.dictionary.to(given.mix)
        self.log_mass = log_mass
        self.mean = log_mass
        if given.convex:
            self.mean = (self.gradient.float() * written.float()).sum(-1)
        self.units = _Units(self.operands, given)
        self.d_x = given.x.new_empty(given.x.shape if self.wanted["x"] else 0)
        self.sums: dict[str, Tensor] = {}

    def add_chunk(self, part: slice) -> None:
        """Write the gradient of the tokens ``part``, and add theirs to the sums."""
        chunk = self._launch(part)
        gradient = self.gradient[part]
        x = self.units.scaled_x[part]
        self._add("bias", chunk.scores.sum(0))
        self._add("rows' distance", chunk.per_row.sum(0))
        self._add("epsilon", -chunk.epsilon.sum().reshape(1))
        self._add("factor", chunk.factor.sum().reshape(1))
        if self.wanted["dictionary"]:
            self._add("dictionary", multiply_in_float32(gradient.T, chunk.coefficients))
        if self.wanted["rows"]:
            self._add("rows", multiply_in_float32(chunk.d_scores.T, x))
        if self.given.up is not None:
            self._add("up_bias", chunk.ups.sum(0))
            if self.wanted["up"]:
                self._add("up", multiply_in_float32(chunk.d_ups.T, x))
        if self.wanted["x"]:
            self.d_x[part] = self._gradient_of_tokens(part, chunk)

    def finish(self) -> tuple[Tensor, ...]:
        """Return the gradients of the eight tensors."""
        if self.operands.x.dtype == torch.float16:
            for name, unit in (("rows", self.units.rows), ("up", self.units.up)):
                if name in self.sums:
                    self.sums[name] /= unit[:, None]
        if "rows" in self.sums:
            distance = self.sums["rows' distance"]
            self.sums["rows"].addcmul_(self.operands.rows.float(), distance[:, None], value=-2)

        gradients = [self.d_x]
        for name in MixtureArguments._fields[1:TENSORS]:
            tensor = getattr(self.given, name)
            if not self.wanted[name] or tensor is None:
                gradients.append(self.given.x.new_empty(0))
            elif name in self.sums:
                gradients.append(self.sums[name].to(tensor.dtype))
            else:  # no token, no gradient
                gradients.append(torch.zeros_like(tensor))
        return tuple(gradients)

    def _launch(self, part: slice) -> _ChunkGradients:
        """Run the kernel over the tokens ``part``."""
        new = self.given.x.new_empty
        count = count_tokens(part, self.given.x)
        prototypes = len(self.given.rows)
        tiles = self.operands.tiles
        down = -(-count // self.operands.block_tokens(count))
        d_scores = new(count, prototypes, dtype=self.operands.x.dtype)
        chunk = _ChunkGradients(
            coefficients=new(count, prototypes, dtype=self.given.mix),
            d_scores=d_scores,
            d_ups=d_scores if self.given.up is None else torch.empty_like(d_scores),
            per_token=new(count, tiles, dtype=torch.float32),
            per_row=new(down, prototypes, dtype=torch.float32),
            scores=new(down, prototypes, dtype=torch.float32),
            ups=new(down, prototypes, dtype=torch.float32),
            epsilon=new(down * tiles, dtype=torch.float32),
            factor=new(down * tiles, dtype=torch.float32),
        )
        self.operands.launch(
            backward_tuned,
            part,
            shift=self.log_mass[part] if self.given.convex else self.log_mass,
            mean=self.mean[part] if self.given.convex else self.mean,
            unit_x=self.units.x[part],
            unit_rows=self.units.rows,
            unit_up=self.units.up,
            gradient=self.gradient[part] @ self.mixed,
            coefficients=chunk.coefficients,
            d_scores=chunk.d_scores,
            d_ups=chunk.d_ups,
            per_token=chunk.per_token,
            per_row=chunk.per_row,
            sum_scores=chunk.scores,
            sum_ups=chunk.ups,
            sum_epsilon=chunk.epsilon,
            sum_factor=chunk.factor,
            tiles=tiles,
        )
        return chunk

    def _gradient_of_tokens(self, part: slice, chunk: _ChunkGradients) -> Tensor:
        """(tokens, d) float32."""
        gradient = multiply_in_float32(chunk.d_scores, self.units.scaled_rows)
        if self.units.scaled_up is not None:
            gradient += multiply_in_float32(chunk.d_ups, self.units.scaled_up)
        if self.operands.x.dtype == torch.float16:
            gradient /= self.units.x[part, None]
        distance = chunk.per_token.sum(1, keepdim=True)
        return gradient.addcmul_(self.operands.x[part].float(), distance, value=-2)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name].add_(value) if name in self.sums else value


class _ChunkGradients(NamedTuple):
    """What the backward kernel writes of one chunk of tokens."""

    coefficients: Tensor
    """(tokens, prototypes), computed again."""
    d_scores: Tensor
    """(tokens, prototypes): gradients of x·w, times the units."""
    d_ups: Tensor
    """(tokens, prototypes): gradients of x·u, times the units."""
    per_token: Tensor
    """(tokens, tiles): sums over a tile's prototypes of minus the gradient of ‖x − w‖²."""
    per_row: Tensor
    """(tiles down, prototypes): the same over a tile's tokens."""
    scores: Tensor
    """(tiles down, prototypes): sums over tokens of the gradients of scores."""
    ups: Tensor
    """(tiles down, prototypes): the same of x·u."""
    epsilon: Tensor
    """(all tiles): sums over a tile of minus the gradient of ε."""
    factor: Tensor
    """(all tiles): sums over a tile of the gradient of the scale or temperature."""


class _Units:
    """Powers of two that gradients of scores are multiplied by, where float16 would not hold them:
    they vary inversely with the lengths of both their vectors. And the vectors over them."""

    def __init__(self, operands: Operands, given: MixtureArguments):
        dtype = operands.x.dtype
        self.x = power_of_two(operands.square_x, dtype)
        self.rows = power_of_two(operands.square_rows, dtype)
        self.up = self.rows if given.up is None else power_of_two(square_lengths(given.up), dtype)
        self.scaled_x = divide_rows(operands.x, self.x)
        self.scaled_rows = divide_rows(operands.rows, self.rows)
        self.scaled_up = None if operands.up is None else divide_rows(operands.up, self.up)
