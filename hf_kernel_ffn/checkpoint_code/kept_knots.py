"""What follows from the weights of tied rows alone, kept from one call to the next.

At one token, making it costs as much as using it. It is kept for calls without gradients in
evaluation mode, while the weights are the same.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .compat import get_tensor_version
from .knots import Knots, make_bounds

if TYPE_CHECKING:
    from .tied import TiedKernelFFN


class Kept(NamedTuple):
    """Numbers that were made of some weights, and how to tell these weights from others."""

    knots: Knots
    facts: tuple
    """What :func:`_describe` says of them."""
    sample: list[Tensor]
    """A few numbers of each weight, in its own memory: no others can come to lie there."""
    copies: list[Tensor]
    """What these numbers were, on a CPU; else nothing."""

    def are_of(self, facts: tuple) -> bool:
        """Whether they were made of the weights that ``facts`` describe, and these are the same."""
        return self.facts == facts and all(map(torch.equal, self.copies, self.sample))


class KeptKnots:
    """Keeps the :class:`Knots` of one layer, bounds included.

    Weights are taken for the same while they have the same memory, version counter, shape and
    dtype. ``weight.data`` can be written without its version counter noticing. So a few numbers of
    each weight are compared too on a CPU, where that costs nothing; and what is kept is dropped by
    a call with gradients, by ``train()`` and ``eval()``, and by whatever moves or casts the layer.
    """

    def __init__(self) -> None:
        self._kept: Kept | None = None

    def get(self, ffn: TiedKernelFFN) -> Knots:
        """The numbers of ``ffn``, without gradients; made anew if they may not be kept."""
        weights = _find_weights(ffn)
        if weights is None:
            return make_knots(ffn)

        facts = _describe(ffn, weights)
        kept = self._kept  # read once: other threads may replace it
        if kept is not None and kept.are_of(facts):
            return kept.knots

        knots = make_knots(ffn)
        if type(knots.amount) is Tensor:  # not one of those that a tracer or a mode puts in place
            sample = [weight.detach()[..., weight.shape[-1] // 2] for weight in weights]
            is_on_cpu = facts[-2].type == "cpu"  # elsewhere the host would wait for the device
            copies = [numbers.clone() for numbers in sample] if is_on_cpu else []
            self._kept = Kept(knots, facts, sample, copies)
        return knots

    def forget(self) -> None:
        """Keep nothing."""
        self._kept = None

    def __getstate__(self) -> dict:
        """Nothing: the version counter of a copy starts anew."""
        return {"_kept": None}


def make_knots(ffn: TiedKernelFFN) -> Knots:
    """The numbers of the pieces of ``ffn`` with their bounds, without gradients."""
    with torch.no_grad():
        knot = ffn.get_piece_tensor("knot")
        amount = ffn.get_piece_tensor("amount") * ffn.positive("scale")
        far = ffn.config.reference["far"] if ffn.multiplies_by_up else None
        return Knots(knot, amount, far, make_bounds(knot, amount, far))


def _find_weights(ffn: TiedKernelFFN) -> list[nn.Parameter] | None:
    """What the numbers are made of; None if those may not be kept.

    They may where the weights are whole, count their changes, and nothing records the call.
    """
    if ffn.training or torch.jit.is_tracing():
        return None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None  # what gathers spread weights leaves their version counters as they were

    pieces = ffn.pieces._parameters
    weights = []
    for weight in (
        pieces.get("knot"),
        pieces.get("amount"),
        ffn.log_ratio._parameters.get("scale"),
    ):
        if type(weight) is not nn.Parameter or weight.is_meta or weight.is_inference():
            return None
        if get_tensor_version(weight) is None:
            return None
        weights.append(weight)
    if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # a graph of CUDA reads the weights again at every replay
    return weights


def _describe(ffn: TiedKernelFFN, weights: list[nn.Parameter]) -> tuple:
    """What is different where the numbers are; the last two are the device and its stream."""
    stream = None
    device = weights[0].device
    if device.type == "cuda":  # another stream does not wait until the numbers are there
        stream = torch.cuda.current_stream(device).cuda_stream
    reference = ffn.config.reference
    of_weights = [
        (weight.data_ptr(), weight._version, weight.shape, weight.dtype) for weight in weights
    ]
    return (*of_weights, reference["scale"], reference.get("far"), device, stream)
