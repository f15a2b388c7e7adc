"""What stands around the text of a row: a start token, [CLS] and [SEP], or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from .chat import find_template_start
from .text_format import PLAIN, BosChoice, TextFormat

PROBE = "a"
"""A text that any tokenizer makes tokens of."""


class RowFrame(NamedTuple):
    """Special tokens around the text of a row.

    A model that was trained with them is another model without: Gemma-3-270M reads WikiText with a
    cross-entropy of 3.4 nats with its start token, and of 5.4 without.
    """

    prefix: list[int]
    suffix: list[int]

    def count_text_tokens(self, length: int) -> int:
        """How many tokens of text a row of ``length`` tokens has; InputError if there is none."""
        count = length - len(self.prefix) - len(self.suffix)
        if count < 1:
            raise InputError(
                f"found rows of {length} tokens, expected more than the "
                f"{len(self.prefix) + len(self.suffix)} special tokens around a text: "
                "give longer rows"
            )
        return count

    def missing_prefix(self, ids: Sequence[int]) -> list[int]:
        """What is to stand before ``ids``: nothing, if they begin with the prefix themselves."""
        return [] if list(ids[: len(self.prefix)]) == self.prefix else self.prefix

    def fit(self, ids: Tensor) -> RowFrame:
        """The frame without what does not stand around every row of ``ids`` (rows, length)."""
        first = len(self.prefix)
        last = ids.shape[1] - len(self.suffix)
        has_prefix = bool((ids[:, :first].cpu() == torch.tensor(self.prefix)).all())
        has_suffix = bool((ids[:, last:].cpu() == torch.tensor(self.suffix)).all())
        return RowFrame(
            self.prefix if has_prefix else [],
            self.suffix if has_suffix else [],
        )

    def put_around(self, ids: list[int]) -> Tensor:
        """(length,) int64: a whole row of the text tokens ``ids``."""
        return torch.tensor([*self.prefix, *ids, *self.suffix])


def find_row_frame(tokenizer: PreTrainedTokenizerBase, text_format: TextFormat = PLAIN) -> RowFrame:
    """Find what is to stand before and behind the text of a row.

    It is what ``tokenizer`` puts there, in a chat what its template puts before a conversation; the
    start token as ``text_format`` says.

    Raises:
        InputError: there is no chat template, or no start token, where one is asked for.
    """
    frame = _ask_template(tokenizer) if text_format.chat else _ask_tokenizer(tokenizer)
    return RowFrame(begin_as_asked(tokenizer, frame.prefix, text_format.bos), frame.suffix)


def encode_once(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of ``text`` as ``tokenizer`` frames it.

    What it puts around a text is not put there twice where the text has it typed in.

    Raises:
        InputError: the text is none that the tokenizer takes.
    """
    try:
        ids = list(cast(list[int], tokenizer(text)["input_ids"]))
    except (TypeError, ValueError) as error:  # half of a pair, from bytes that are no text
        raise InputError(
            f"found a text that the tokenizer refuses ({' '.join(str(error).split())}), expected "
            "UTF-8: write it again"
        ) from error
    prefix, suffix = _ask_tokenizer(tokenizer)
    if prefix and ids[: 2 * len(prefix)] == 2 * prefix:
        ids = ids[len(prefix) :]
    if suffix and ids[-2 * len(suffix) :] == 2 * suffix:
        ids = ids[: -len(suffix)]
    return ids


def begin_as_asked(tokenizer: PreTrainedTokenizerBase, ids: list[int], bos: BosChoice) -> list[int]:
    """Return ``ids`` with the start token before them, or without it, or as they are.

    Raises:
        InputError: it is always to be there, and ``tokenizer`` has none.
    """
    if bos == "auto":
        return ids
    start = getattr(tokenizer, "bos_token_id", None)
    begins_with_it = start is not None and ids[:1] == [start]
    if bos == "never":
        return ids[1:] if begins_with_it else ids
    if start is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise InputError(
            f"found no start token in the tokenizer of {name}, expected one for --bos always (in a "
            "recipe: data.bos): leave that out"
        )
    return ids if begins_with_it else [start, *ids]


def _ask_template(tokenizer: PreTrainedTokenizerBase) -> RowFrame:
    """What the chat template of ``tokenizer`` puts before a conversation, and nowhere else."""
    start = tokenizer.bos_token_id if find_template_start(tokenizer) else None
    return RowFrame([] if start is None else [cast(int, start)], [])


def _ask_tokenizer(tokenizer: PreTrainedTokenizerBase) -> RowFrame:
    """What ``tokenizer`` puts before and behind a text."""
    bare = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(PROBE)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return RowFrame(whole[:start], whole[start + len(bare) :])
    return RowFrame([], [])
