"""Records of a teacher: its likeliest tokens at every position of a text, on a disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..storage.exporting import fingerprint_model
from ..text.prediction import predicts_masked
from .recipe import Recipe

FACTS = "record.json"
"""The file of a record that says what it is."""
LARGEST_ROUNDING = 1e-3
"""How far the logarithm of the recorded probabilities' sum, in float32, may be from zero."""
REASON_LENGTH = 300
"""Characters of another library's message that an error repeats."""


class Facts(BaseModel):
    """What record.json says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1] = 1
    teacher: str
    """As the recipe names it; its weights are known by their fingerprint."""
    fingerprint: str
    temperature: float
    sequence_length: int = Field(ge=2)
    top_k: int = Field(ge=1)
    shards: int = Field(ge=1)


def shard_file(folder: Path, shard: int) -> Path:
    """Where a shard is. For each of its n sequences it has ``input_ids`` (n, length) int32, ``top`` (n, length, k) int32, token ids
    in ascending order, and ``log_probabilities`` (n, length, k + 1) float32 of these at the record's temperature and, last, of all
    other tokens as one."""
    return folder / f"{shard:05}.safetensors"


def token_bytes(top_k: int) -> int:
    """Bytes of a record per token of text. Probabilities in float16 would save a quarter of them, for a KL of 2e-7 (shipped Llama, k = 64),
    but then a record of the whole vocabulary would no longer be the running teacher."""
    return 4 + 4 * top_k + 4 * (top_k + 1)


def digest(ids: Tensor) -> bytes:
    """What a sequence (length,) of token ids is looked up by."""
    return hashlib.blake2b(ids.to("cpu", torch.int32).numpy().tobytes(), digest_size=16).digest()


class Record:
    """A recorded teacher. Only the token ids of its sequences are read before they are looked up."""

    def __init__(self, folder: str | Path):
        """
        Raises:
            InputError: ``folder`` is no record, or one with a file that is missing, truncated or of another shape than it says.
        """
        self.folder = Path(folder)
        if not (self.folder / FACTS).is_file():
            raise InputError(
                f"found no {FACTS} in {folder}, expected a folder that hf-kernel-ffn record has made: check the path"
            )
        self.places: dict[bytes, tuple[int, int]] = {}
        try:
            self.facts = Facts.model_validate_json(
                (self.folder / FACTS).read_text(encoding="utf-8")
            )
            for shard in range(self.facts.shards):
                self.places.update(
                    (digest(ids), (shard, row)) for row, ids in enumerate(self._input_ids(shard))
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise self._damaged(error) from error

    def _input_ids(self, shard: int) -> Tensor:
        length, k = self.facts.sequence_length, self.facts.top_k
        with safe_open(shard_file(self.folder, shard), "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            found = {name: (part.get_dtype(), *part.get_shape()) for name, part in slices.items()}
            n = next(iter(found.get("input_ids", ())[1:]), 0)
            expected = {
                "input_ids": ("I32", n, length),
                "top": ("I32", n, length, k),
                "log_probabilities": ("F32", n, length, k + 1),
            }
            if found != expected:
                raise ValueError(f"{found} in shard {shard}")
            return opened.get_tensor("input_ids")

    def look_up(self, ids: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """``top`` (rows, length, k) int64 and ``log_probabilities`` (rows, length, k + 1) of the sequences ``ids`` (rows, length), on
        their device.

        Raises:
            InputError: the record lacks one of them, or has for it what is no distribution over the ``vocabulary``.
        """
        places = [self.places.get(digest(row)) for row in ids]
        if None in places:
            raise InputError(
                f"found a sequence that {self.folder} does not have, expected all that the stages read: record again, by the same "
                "recipe, text and number of processes"
            )
        parts = []
        try:
            for shard, row in filter(None, places):
                with safe_open(shard_file(self.folder, shard), "pt") as opened:
                    parts.append(
                        (opened.get_slice("top")[row], opened.get_slice("log_probabilities")[row])
                    )
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error
        top, known = (torch.stack(part) for part in zip(*parts))
        ascending = bool((top.diff(dim=-1) > 0).all()) and top.min() >= 0 and top.max() < vocabulary
        if not ascending or not (known.logsumexp(-1).abs() < LARGEST_ROUNDING).all():  # NaN as well
            raise self._damaged(
                f"token ids or probabilities that are none of a vocabulary of {vocabulary:,}"
            )
        return top.long().to(ids.device), known.to(ids.device)

    def _damaged(self, why: object) -> InputError:
        reason = " ".join(str(why).split())[:REASON_LENGTH]
        return InputError(
            f"found {self.folder} damaged ({reason}), expected a whole record: make it again by hf-kernel-ffn record"
        )


def load_records(recipe: Recipe, teacher: PreTrainedModel) -> dict[str, Record]:
    """The records that stages of ``recipe`` read, by folder.

    Raises:
        InputError: one is none, is damaged, or is of another teacher, temperature or sequence length; or the teacher is masked.
    """
    stages = [stage for stage in recipe.stages if stage.stored_logits is not None]
    if not stages:
        return {}
    refuse_masked(teacher)
    records = {folder: Record(folder) for folder in {str(stage.stored_logits) for stage in stages}}
    own = teacher_fingerprint(teacher)
    for stage in stages:
        facts = records[str(stage.stored_logits)].facts
        if facts.fingerprint != own:
            found, expected = (
                f"other weights, of {facts.teacher},",
                f"those of {recipe.teacher} in {recipe.dtype}",
            )
        elif facts.temperature != stage.temperature:
            found, expected = f"temperature {facts.temperature}", f"the stage's {stage.temperature}"
        elif facts.sequence_length != recipe.data.sequence_length:
            found, expected = (
                f"sequences of {facts.sequence_length} tokens",
                f"the recipe's {recipe.data.sequence_length}",
            )
        else:
            continue
        raise InputError(
            f"found {found} in {stage.stored_logits}, expected {expected}: record again by this recipe"
        )
    return records


def teacher_fingerprint(teacher: PreTrainedModel) -> str:
    """SHA-256 of every parameter of ``teacher``."""
    return fingerprint_model(teacher, {"layers": {}})


def refuse_masked(teacher: PreTrainedModel) -> None:
    """InputError if ``teacher`` predicts masked tokens: every pass over the text masks others."""
    if predicts_masked(teacher):
        raise InputError(
            f"found a {type(teacher).__name__}, whose masks are drawn anew for every step, expected a model of next tokens: leave out "
            "stored_logits"
        )
