"""Records of a teacher: its likeliest tokens at every position of a text, on a disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..storage.exporting import fingerprint_model
from ..storage.weight_files import fingerprint_files
from ..text.prediction import predicts_masked
from .recipe import Recipe, Stage
from .record_forms import ExactForm, PackedForm, RecordForm

EXACT: Literal[1] = 1
PACKED: Literal[2] = 2
"""Formats of a record."""
FACTS = "record.json"
"""The file of a record that says what it is."""
LARGEST_ROUNDING = 1e-3
"""How far the logarithm of the recorded probabilities' sum, in float32, may be from zero."""
REASON_LENGTH = 300
"""Characters of another library's message that an error repeats."""


class Facts(BaseModel):
    """What record.json says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1, 2]
    """1: exact; 2: packed."""
    teacher: str
    """As the recipe names it; its weights are known by their fingerprint."""
    fingerprint: str
    temperature: float
    sequence_length: int = Field(ge=2)
    top_k: int = Field(ge=1)
    shards: int = Field(ge=1)
    vocabulary: int | None = Field(None, ge=1)
    """Tokens that the teacher chooses from; a packed record says so."""
    dtype: str | None = None
    """What the teacher was loaded in."""
    files: str | None = None
    """SHA-256 of the safetensors files that it was loaded from; None if it was from others."""

    @model_validator(mode="after")
    def _packed_has_vocabulary(self) -> Facts:
        if self.format == PACKED and self.vocabulary is None:
            raise ValueError("a packed record without its vocabulary")
        return self

    @property
    def form(self) -> RecordForm:
        """How predictions stand in the files."""
        form = PackedForm if self.format == PACKED else ExactForm
        return form(self.top_k, self.vocabulary or 0)


def shard_file(folder: Path, shard: int) -> Path:
    """Where a shard is.

    For each of its n sequences it has ``input_ids`` (n, length) int32, and in the columns of the
    record's form k token ids in ascending order and k + 1 log-probabilities at every position: of
    these tokens at the record's temperature and, last, of all other tokens as one.
    """
    return folder / f"{shard:05}.safetensors"


def digest(ids: Tensor) -> bytes:
    """What a sequence (length,) of token ids is looked up by."""
    content = ids.to("cpu", torch.int32).numpy().tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


class Record:
    """A recorded teacher. Only its sequences' token ids are read before they are looked up."""

    def __init__(self, folder: str | Path):
        """
        Raises:
            InputError: ``folder`` is no record, or one with a file that is missing, truncated or of
                another shape than it says.
        """
        self.folder = Path(folder)
        self.facts = read_facts(self.folder)
        self.places: dict[bytes, tuple[int, int]] = {}
        """Shard and row of a sequence, by its digest."""
        try:
            for shard in range(self.facts.shards):
                for row, ids in enumerate(self._read_input_ids(shard)):
                    self.places[digest(ids)] = (shard, row)
        except (OSError, ValueError, SafetensorError) as error:
            raise _damaged(self.folder, error) from error

    def look_up(self, ids: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """What the teacher predicts in the sequences ``ids`` (rows, length).

        Returns:
            ``top`` (rows, length, k) int64 and ``log_probabilities`` (rows, length, k + 1), on the
            device of ``ids``.

        Raises:
            InputError: the record lacks a sequence, or has for it what is no distribution over the
                ``vocabulary``.
        """
        places = [self.places.get(digest(row)) for row in ids]
        known_places = [place for place in places if place is not None]
        if len(known_places) < len(places):
            raise InputError(
                f"found a sequence that {self.folder} does not have, expected all that the stages "
                "read: record again, by the same recipe, text and number of processes"
            )
        form = self.facts.form
        rows: dict[str, list[Tensor]] = {name: [] for name in form.columns}
        try:
            for shard, row in known_places:
                with safe_open(shard_file(self.folder, shard), "pt") as tensors:
                    for name, found in rows.items():
                        found.append(tensors.get_slice(name)[row])
            top, known = form.decode({name: torch.stack(found) for name, found in rows.items()})
        except (OSError, ValueError, SafetensorError) as error:
            raise _damaged(self.folder, error) from error

        self._check(top, known, vocabulary)
        return top.to(ids.device), known.to(ids.device)

    def _read_input_ids(self, shard: int) -> Tensor:
        """The sequences of a shard (n, length); ValueError if a tensor of it has another shape than
        the record says."""
        length = self.facts.sequence_length
        with safe_open(shard_file(self.folder, shard), "pt") as tensors:
            shapes = {}
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                part = tensors.get_slice(name)
                shapes[name] = (part.get_dtype(), *part.get_shape())
            count = next(iter(shapes.get("input_ids", ())[1:]), 0)
            expected: dict[str, tuple[object, ...]] = {
                name: (dtype, count, length, numbers)
                for name, (dtype, numbers) in self.facts.form.columns.items()
            }
            expected["input_ids"] = ("I32", count, length)
            if shapes != expected:
                raise ValueError(f"{shapes} in shard {shard}")
            return tensors.get_tensor("input_ids")

    def _check(self, top: Tensor, log_probabilities: Tensor, vocabulary: int) -> None:
        """Raise InputError unless these are token ids in order, and distributions."""
        ascending = bool((top.diff(dim=-1) > 0).all())
        within = bool(top.min() >= 0) and bool(top.max() < vocabulary)
        rounding = log_probabilities.logsumexp(-1).abs()
        whole = bool((rounding < LARGEST_ROUNDING).all())  # not so for NaN
        if not (ascending and within and whole):
            raise _damaged(
                self.folder,
                f"token ids or probabilities that are none of a vocabulary of {vocabulary:,}",
            )


def read_facts(folder: Path) -> Facts:
    """What the record in ``folder`` says of itself.

    Raises:
        InputError: there is none, or one that is damaged.
    """
    if not (folder / FACTS).is_file():
        raise InputError(
            f"found no {FACTS} in {folder}, expected a folder that hf-kernel-ffn record has "
            "made: check the path"
        )
    try:
        return Facts.model_validate_json((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, why: object) -> InputError:
    reason = " ".join(str(why).split())[:REASON_LENGTH]
    return InputError(
        f"found {folder} damaged ({reason}), expected a whole record: "
        "make it again by hf-kernel-ffn record"
    )


def can_do_without_teacher(recipe: Recipe) -> bool:
    """Whether nothing that ``recipe`` asks for needs its teacher's weights.

    So it is where a student is given, every stage reads a record that was made of the very files
    and in the dtype of the recipe's teacher, no text is held out, and nothing is sharded.

    Raises:
        InputError: a record is none, or damaged.
    """
    folders = [stage.stored_logits for stage in recipe.stages]
    needs_it = recipe.student is None or recipe.data.validation_sources or recipe.shard
    if needs_it or None in folders:
        return False
    files = fingerprint_files(recipe.teacher)
    facts = [read_facts(Path(str(folder))) for folder in folders]
    return files is not None and all(
        each.files == files and each.dtype == recipe.dtype for each in facts
    )


def load_records(recipe: Recipe, teacher: PreTrainedModel) -> dict[str, Record]:
    """The records that stages of ``recipe`` read, by folder.

    Args:
        teacher: the model itself, or without weights where :func:`can_do_without_teacher`.

    Raises:
        InputError: one is none, is damaged, or is of another teacher, temperature or sequence
            length; or the teacher is masked.
    """
    stages = [stage for stage in recipe.stages if stage.stored_logits is not None]
    if not stages:
        return {}
    refuse_masked(teacher)
    records = {folder: Record(folder) for folder in {str(stage.stored_logits) for stage in stages}}
    fingerprint = None if teacher.device.type == "meta" else teacher_fingerprint(teacher)
    for stage in stages:
        facts = records[str(stage.stored_logits)].facts
        mismatch = _describe_mismatch(facts, recipe, stage, fingerprint)
        if mismatch is not None:
            found, expected = mismatch
            raise InputError(
                f"found {found} in {stage.stored_logits}, expected {expected}: "
                "record again by this recipe"
            )
    return records


def teacher_fingerprint(teacher: PreTrainedModel) -> str:
    """SHA-256 of every parameter of ``teacher``."""
    return fingerprint_model(teacher, {"layers": {}})


def refuse_masked(teacher: PreTrainedModel) -> None:
    """Raise InputError if ``teacher`` predicts masked tokens: every pass over the text masks
    others."""
    if predicts_masked(teacher):
        raise InputError(
            f"found a {type(teacher).__name__}, whose masks are drawn anew for every step, "
            "expected a model of next tokens: leave out stored_logits"
        )


def _describe_mismatch(
    facts: Facts, recipe: Recipe, stage: Stage, fingerprint: str | None
) -> tuple[str, str] | None:
    """What a record has, and what ``stage`` of ``recipe`` needs in its place; None if it fits.

    ``fingerprint`` is the teacher's, None where its files have been compared.
    """
    length = recipe.data.sequence_length
    if fingerprint is not None and facts.fingerprint != fingerprint:
        found = f"other weights, of {facts.teacher},"
        return found, f"those of {recipe.teacher} in {recipe.dtype}"
    if facts.temperature != stage.temperature:
        return f"temperature {facts.temperature}", f"the stage's {stage.temperature}"
    if facts.sequence_length != length:
        return f"sequences of {facts.sequence_length} tokens", f"the recipe's {length}"
    return None
