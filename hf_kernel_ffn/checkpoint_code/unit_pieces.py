"""The pieces of units whose rows are tied: their scores, and their sums at tokens.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import InputError
from .kernels import Kernel
from .layer_config import LayerConfig
from .linears import get_effective_weight
from .parameters import ConstrainedParameters, to_at_least_float32
from .shards import get_local, is_split, sum_gradient

CACHED_NUMBERS = 2**16
"""Scores that are worked on at once on a CPU: this many float32 numbers, several times over, fit
its cache."""
TENSORS_PER_PIECE = 8
"""Tensors of the size of the scores that the backward pass of one piece keeps."""


class Scores(NamedTuple):
    """What all pieces of a layer are made of, at its tokens; float32 at least."""

    first: Tensor
    """(..., units) g·x + bias."""
    second: Tensor | None
    """(..., units) u·x + bias; None in a plain FFN."""
    square: Tensor
    """(..., 1) ‖x‖²."""

    def split(self, tokens: int) -> Iterator[Scores]:
        """The same of so many tokens after the others."""
        firsts = self.first.flatten(0, -2).split(tokens)
        squares = self.square.flatten(0, -2).split(tokens)
        seconds: Sequence[Tensor | None] = [None] * len(firsts)
        if self.second is not None:
            seconds = self.second.flatten(0, -2).split(tokens)
        for first, second, square in zip(firsts, seconds, squares, strict=True):
            yield Scores(first, second, square)


class UnitPieces(ConstrainedParameters):
    """What a readout with tied rows does about the pieces of its units."""

    input_prototypes: nn.Linear
    value_proj: nn.Linear
    """Of gated FFNs."""
    pieces: nn.ParameterDict
    """(pieces, units) each, by the names of :func:`name_piece_tensors`."""
    activation_bytes: int
    """What temporaries may take."""
    _piece_count: int

    def get_piece_tensor(self, name: str) -> Tensor:
        """(pieces, units) one of ``pieces``, float32 at least; of this process's units, where
        units are spread over processes."""
        return to_at_least_float32(self.get_stored_piece_tensor(name))

    def get_stored_piece_tensor(self, name: str) -> Tensor:
        """The same, in the dtype that it is stored in."""
        tensor = self.pieces[name]
        return get_local(tensor) if self._units_are_split() else tensor

    def _units_are_split(self) -> bool:
        """Whether this process has some of the units, by tensor parallelism."""
        return is_split(self.input_prototypes)

    def get_log_ratio(self, name: str) -> Tensor:
        """A learned log-ratio; its gradient is the sum over the processes that have units."""
        log_ratio = super().get_log_ratio(name)
        if self._units_are_split():
            return sum_gradient(log_ratio, self.input_prototypes.weight)
        return log_ratio

    @property
    def multiplies_by_up(self) -> bool:
        """Whether values are a product: kernels times u·x."""
        return self.config.gated and self.config.settings.values == "product"

    def compute_factor(self, scores: Scores) -> Tensor | None:
        """(..., units) what kernels are multiplied by where values are a product: u·x, clamped to
        ±far where the kernel has knots."""
        if not self.multiplies_by_up or scores.second is None:
            return None
        if not self.kernel.uses_knot:
            return scores.second
        far = self.config.reference["far"]
        return scores.second.clamp(-far, far)

    def score(self, hidden_states: Tensor) -> Scores:
        """What all pieces are made of, at ``hidden_states`` (..., hidden_size)."""
        gate = to_at_least_float32(self.input_prototypes(hidden_states))
        up = None
        if self.config.gated:
            up = to_at_least_float32(self.value_proj(hidden_states))
        square = to_at_least_float32(hidden_states).square().sum(-1, keepdim=True)
        if self._units_are_split():
            square = sum_gradient(square, self.input_prototypes.weight)
        return Scores(gate, up, square)

    def coefficients_of_all(self, hidden_states: Tensor) -> Tensor:
        """c (..., units), float32 at least, whatever a sparse map keeps."""
        return self.mix_scores(self.score(hidden_states))

    def mix_scores(self, scores: Scores) -> Tensor:
        """c (..., units), float32 at least, of what the layer's rows say of its inputs: of all
        units, whatever a sparse map keeps."""
        total = self.sum_pieces(scores, self.get_piece_tensor("amount"))
        factor = self.compute_factor(scores)
        return total if factor is None else total * factor

    def require_whole(self, purpose: str) -> None:
        """InputError where this process has only some of the units."""
        if self._units_are_split():
            raise InputError(
                f"found a readout whose units are spread over processes and that {purpose}, "
                "expected all units in one: load the model without tensor parallelism"
            )

    def sum_pieces(self, scores: Scores, amount: Tensor) -> Tensor:
        """scale · Σ_p ``amount`` κ_p, (..., units)."""
        first = scores.first
        numbers = self._piece_numbers(first, amount * self.positive("scale"))
        if torch.compiler.is_compiling():
            return self._sum_block(scores, numbers)

        needs_gradient = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (*scores, *numbers.values())
        )
        block = self._tokens_at_once(first, needs_gradient)
        if block >= first[..., 0].numel():
            return self._sum_block(scores, numbers)

        sums = []
        for tokens in scores.split(block):
            if needs_gradient:  # the pieces of a block are computed again in its backward pass
                sums.append(checkpoint(self._sum_block, tokens, numbers, use_reentrant=False))
            else:
                sums.append(self._sum_block(tokens, numbers))
        return torch.cat(sums).view(first.shape)

    def _tokens_at_once(self, first: Tensor, needs_gradient: bool) -> int:
        units = max(1, first.shape[-1])
        if needs_gradient:
            per_token = TENSORS_PER_PIECE * self._piece_count * units * first.itemsize
            return max(1, self.activation_bytes // per_token)
        if first.device.type == "cpu":
            return max(1, CACHED_NUMBERS // units)
        return max(1, self.activation_bytes // (TENSORS_PER_PIECE * units * first.itemsize))

    def _piece_numbers(self, like: Tensor, amount: Tensor) -> dict[str, Tensor]:
        """Of every piece (pieces, units): α, β, b, the amount; with a distance the bias of s and
        ‖w‖²."""
        numbers = {
            name: self.get_piece_tensor(name).to(like.dtype)
            for name in self.pieces
            if name != "amount"
        }
        numbers["amount"] = amount
        if not self.kernel.uses_distance:
            return numbers

        example = self.input_prototypes.weight.new_empty(1, self.config.hidden_size)
        rows, bias = get_effective_weight(self.input_prototypes, example)
        rows = rows.to(like.dtype)
        alpha = numbers["alpha"]
        numbers["norm2"] = alpha.square() * rows.square().sum(-1)
        numbers["bias"] = numbers["shift"] + (0 if bias is None else alpha * bias)
        if "beta" in numbers:
            beta = numbers["beta"]
            values, value_bias = get_effective_weight(self.value_proj, example)
            values = values.to(like.dtype)
            between = (rows * values).sum(-1)
            numbers["norm2"] = numbers["norm2"] + beta.square() * values.square().sum(-1)
            numbers["norm2"] = numbers["norm2"] + 2 * alpha * beta * between
            numbers["bias"] = numbers["bias"] + (0 if value_bias is None else beta * value_bias)
        return numbers

    def _sum_block(self, scores: Scores, numbers: dict[str, Tensor]) -> Tensor:
        """Σ_p a_p κ_p of the tokens of one block, (tokens, units)."""
        parameters = self.kernel_parameters()
        total = torch.zeros_like(scores.first)
        for piece in range(self._piece_count):
            if self.kernel.uses_knot:
                knot = numbers["knot"][piece]
                kernel = self.kernel.value(scores.first, None, knot=knot, **parameters)
                total = torch.addcmul(total, kernel, numbers["amount"][piece])
                continue
            score = torch.addcmul(numbers["shift"][piece], scores.first, numbers["alpha"][piece])
            if "beta" in numbers and scores.second is not None:
                score = torch.addcmul(score, scores.second, numbers["beta"][piece])
            distance2 = None
            if self.kernel.uses_distance:
                without_bias = score - numbers["bias"][piece]
                norms = scores.square + numbers["norm2"][piece]
                distance2 = torch.add(norms, without_bias, alpha=-2).clamp_min(0)
            kernel = self.kernel.value(score, distance2, **parameters)
            total = torch.addcmul(total, kernel, numbers["amount"][piece])
        return total


def name_piece_tensors(kernel: Kernel, config: LayerConfig) -> list[str]:
    """The names of the numbers that every piece of a layer has."""
    if kernel.uses_knot:
        return ["knot", "amount"]
    in_plane = config.gated and config.settings.values == "fixed"
    return ["alpha", "shift", "amount", *(["beta"] if in_plane else [])]
