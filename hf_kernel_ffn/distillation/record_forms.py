"""How the predictions of a record stand in its files: packed, or exact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .packed_logits import (
    count_id_bytes,
    count_probability_bytes,
    pack_ids,
    pack_log_probabilities,
    unpack_ids,
    unpack_log_probabilities,
)

ID_BYTES = 4
"""Of a token of the text, and of an exact record's token ids and probabilities."""


@dataclass(frozen=True)
class RecordForm(ABC):
    """How k token ids in ascending order, and k + 1 log-probabilities, are written."""

    top_k: int
    vocabulary: int

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, tuple[str, int]]:
        """The tensors of a shard besides the token ids of its text: dtype as safetensors calls it,
        and numbers per position."""

    @property
    @abstractmethod
    def token_bytes(self) -> int:
        """Bytes of a record per token of text."""

    @abstractmethod
    def encode(self, top: Tensor, log_probabilities: Tensor) -> dict[str, Tensor]:
        """The tensors for ``top`` (..., k) and ``log_probabilities`` (..., k + 1)."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``top`` int64 and ``log_probabilities`` float32 of what :meth:`encode` has made.

        Raises:
            ValueError: it has made nothing of the kind.
        """


class ExactForm(RecordForm):
    """int32 and float32: a record of the whole vocabulary is the running teacher, to rounding."""

    @property
    def columns(self) -> Mapping[str, tuple[str, int]]:
        """As the interface says."""
        return {"top": ("I32", self.top_k), "log_probabilities": ("F32", self.top_k + 1)}

    @property
    def token_bytes(self) -> int:
        """As the interface says."""
        return ID_BYTES * (1 + self.top_k + self.top_k + 1)

    def encode(self, top: Tensor, log_probabilities: Tensor) -> dict[str, Tensor]:
        """As the interface says."""
        return {"top": top.int(), "log_probabilities": log_probabilities.float()}

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As the interface says."""
        return tensors["top"].long(), tensors["log_probabilities"]


class PackedForm(RecordForm):
    """A third of the bytes, at a KL of a few millionths of a nat: see packed_logits."""

    @property
    def columns(self) -> Mapping[str, tuple[str, int]]:
        """As the interface says."""
        return {
            "top": ("U8", count_id_bytes(self.top_k, self.vocabulary)),
            "probabilities": ("U8", count_probability_bytes(self.top_k + 1)),
        }

    @property
    def token_bytes(self) -> int:
        """As the interface says."""
        return ID_BYTES + sum(count for _, count in self.columns.values())

    def encode(self, top: Tensor, log_probabilities: Tensor) -> dict[str, Tensor]:
        """As the interface says."""
        return {
            "top": pack_ids(top, self.vocabulary),
            "probabilities": pack_log_probabilities(log_probabilities),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As the interface says."""
        top = unpack_ids(tensors["top"], self.top_k, self.vocabulary)
        return top, unpack_log_probabilities(tensors["probabilities"], self.top_k + 1)
