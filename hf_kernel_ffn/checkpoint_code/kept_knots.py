"""What follows from the weights of tied rows alone, kept from one call to the next.

At one token, making it costs as much as using it. It is kept for calls without gradients in
evaluation mode, while the weights are the same.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .compat import get_tensor_version
from .knots import Knots, make_bounds

if TYPE_CHECKING:
    from .tied import TiedKernelFFN


CAPTURED = -1
"""No stream: a graph reads the weights again at every replay, so that nothing may be kept."""
SAMPLE = 8
"""Numbers of each weight that are compared: they lie in one line of the processor's cache."""


class KeptKnots:
    """Keeps the :class:`Knots` of one layer, bounds included.

    Weights are taken for the same while they are the same parameters with the same memory, version
    counter and shape. What is written through ``weight.data`` leaves the version counter as it was.
    So a few numbers of each weight are compared too on a CPU, where that costs little. And what is
    kept is dropped by a call with gradients, by ``train()`` and ``eval()``, and by whatever moves
    or casts the layer.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def get(self, ffn: TiedKernelFFN) -> Knots:
        """The numbers of ``ffn``, without gradients; made anew if they may not be kept."""
        kept = self._kept  # read once: other threads may replace it
        if kept is not None and kept.is_of(ffn):
            return kept.knots

        knots = make_knots(ffn)
        if _may_be_kept(ffn) and type(knots.amount) is Tensor:
            self._kept = _Kept(ffn, knots)
        return knots

    def forget(self) -> None:
        """Keep nothing."""
        self._kept = None

    def __getstate__(self) -> dict:
        """Nothing: the version counter of a copy starts anew."""
        return {"_kept": None}


class _Kept:
    """Numbers of a layer, and how to tell the weights that they were made of from others.

    All that is compared is written out: at one token it is a part of the time that counts.
    """

    def __init__(self, ffn: TiedKernelFFN, knots: Knots):
        self.knots = knots
        self.reference = dict(ffn.config.reference)
        weights = _get_weights(ffn)
        self.knot, self.amount, self.scale = weights
        self.facts = [(weight.data_ptr(), weight._version) for weight in weights]
        self.shapes = (self.knot.shape, self.amount.shape)
        self.stream = _find_stream(self.knot)
        # Views: no other weight can come to lie in their memory while they are there.
        self.samples = [torch.atleast_2d(weight.detach())[0, :SAMPLE] for weight in weights]
        self.copies: list[Tensor] = []
        if self.knot.device.type == "cpu":  # elsewhere the host would wait for the device
            self.copies = [sample.clone() for sample in self.samples]

    def is_of(self, ffn: TiedKernelFFN) -> bool:
        """Whether they are those of ``ffn`` as it stands."""
        pieces = ffn.pieces._parameters
        knot = self.knot
        amount = self.amount
        scale = self.scale
        return (
            pieces.get("knot") is knot
            and pieces.get("amount") is amount
            and ffn.log_ratio._parameters.get("scale") is scale
            and [
                (knot.data_ptr(), knot._version),
                (amount.data_ptr(), amount._version),
                (scale.data_ptr(), scale._version),
            ]
            == self.facts
            and (knot.shape, amount.shape) == self.shapes
            and ffn.config.reference == self.reference
            and all(map(torch.equal, self.copies, self.samples))
            and (self.stream is None or self.stream == _find_stream(knot))
        )


def make_knots(ffn: TiedKernelFFN) -> Knots:
    """The numbers of the pieces of ``ffn`` with their bounds, without gradients."""
    with torch.no_grad():
        knot = ffn.get_piece_tensor("knot")
        amount = ffn.get_piece_tensor("amount") * ffn.positive("scale")
        far = ffn.config.reference["far"] if ffn.multiplies_by_up else None
        return Knots(knot, amount, far, make_bounds(knot, amount, far))


def _get_weights(ffn: TiedKernelFFN) -> list[nn.Parameter]:
    """What the numbers are made of."""
    return [ffn.pieces["knot"], ffn.pieces["amount"], ffn.log_ratio["scale"]]


def _may_be_kept(ffn: TiedKernelFFN) -> bool:
    """Whether the weights are whole and count their changes, and nothing records the call."""
    if ffn.training or torch.jit.is_tracing():
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False  # what gathers spread weights leaves their version counters as they were
    for weight in _get_weights(ffn):
        if type(weight) is not nn.Parameter or weight.is_meta or weight.is_inference():
            return False
        if get_tensor_version(weight) is None:
            return False
    return _find_stream(ffn.pieces["knot"]) != CAPTURED


def _find_stream(weight: Tensor) -> int | None:
    """Which stream of CUDA works on ``weight`` now, since another does not wait until the numbers
    are there; CAPTURED if a graph records it, and None off CUDA."""
    if not weight.is_cuda:
        return None
    if torch.cuda.is_current_stream_capturing():
        return CAPTURED
    return torch.cuda.current_stream(weight.device).cuda_stream
