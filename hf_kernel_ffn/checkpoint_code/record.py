"""The one record that everything reads: coefficients over a dictionary, and what gives it.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from .layer_config import LayerConfig


class Readout(NamedTuple):
    """What one FFN or attention head wrote.

    ``output() = coefficients @ dictionary + bias``, and ``skip`` where there is one.
    """

    coefficients: Tensor
    """(..., prototypes). A kernel readout with fixed values has none below zero."""
    dictionary: Tensor
    """(prototypes, hidden_size): output prototypes as rows."""
    bias: Tensor | None
    """(hidden_size,), written whatever fires."""
    shares: Tensor | None
    """(..., prototypes) π ≥ 0, summing to one, or to zero where nothing fires.

    None if the FFN defines none.
    """
    intensity: Tensor | None
    """(...) g ≥ 0 with coefficients = g·π, times u_i·x for gated values.

    None if the FFN defines none.
    """
    names: tuple[str, ...]
    """The dictionary rows by name."""
    skip: Tensor | None = None
    """(..., hidden_size) what a linear map of the input writes beside the mixture."""

    def output(self) -> Tensor:
        """(..., hidden_size): the FFN's output, as the record's own sum."""
        written = self.coefficients @ self.dictionary
        if self.bias is not None:
            written = written + self.bias
        return written if self.skip is None else written + self.skip


@runtime_checkable
class ReadableFFN(Protocol):
    """An FFN that says what it wrote as a :class:`Readout`.

    ``isinstance(ffn, ReadableFFN)`` holds for a KernelFFN of this package, for one of a
    checkpoint's own code, and for the baselines of the evaluation, but for no stock FFN.
    """

    config: LayerConfig

    def readout(self, hidden_states: Tensor) -> Readout:
        """The record at ``hidden_states`` (..., hidden_size)."""
        ...
