"""Text to blocks of token ids, packed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from .chat import read_conversations
from .documents import read_documents
from .row_frame import RowFrame, find_row_frame
from .text_format import PLAIN, TextFormat

SPREAD = 32
"""How much more text than it uses a spread sample reads."""
PIECES_AT_ONCE = 1000
"""Pieces of text (documents, or lines of one) that the tokenizer is given at a time.

They are enough for its threads, and few enough to be held in memory.
"""
CHARACTERS_AT_ONCE = 2**20
"""Characters of text, about, that the tokenizer is given at a time, if that is fewer pieces."""
MOST_UNKNOWN = 0.5
"""Share of unknown tokens with which a text is none for its tokenizer."""


def stream_tokens(
    tokenizer: PreTrainedTokenizerBase, sources: list[str], text_format: TextFormat = PLAIN
) -> Iterator[int]:
    """Yield the token ids of all sources in order.

    After every document comes the tokenizer's end token, if it has one.
    """
    reader = TokenReader(tokenizer, sources, text_format)
    while ids := reader.take(PIECES_AT_ONCE):
        yield from ids


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, pieces: list[tuple[str, bool]]
) -> Iterator[int]:
    """Yield the token ids of ``pieces`` of text, each with whether a document ends there."""
    texts = [text for text, _ in pieces]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for ids, (_, ends_document) in zip(encoded, pieces, strict=True):
        yield from ids
        if ends_document and tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id


def pack_blocks(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str],
    length: int,
    text_format: TextFormat = PLAIN,
) -> Iterator[Tensor]:
    """Yield consecutive rows of ``length`` token ids, int64; what is left at the end is dropped.

    Each row begins and ends as the tokenizer begins and ends a text, or its chat template a
    conversation.

    Raises:
        InputError: the text is shorter than one row.
    """
    frame = find_row_frame(tokenizer, text_format)
    room = frame.count_text_tokens(length)
    reader = TokenReader(tokenizer, sources, text_format)
    is_empty = True
    while len(block := reader.take_text(frame, room)) == room:
        is_empty = False
        yield frame.put_around(block)
    if is_empty:
        raise _make_short_text_error(len(block), sources, frame, room)


def _make_short_text_error(
    found: int, sources: list[str], frame: RowFrame, room: int
) -> InputError:
    """What to say of a text of ``found`` tokens, which has not ``room`` of them for one row."""
    special = len(frame.prefix) + len(frame.suffix)
    beside = f" beside {special} special ones in a row" if special else ""
    return InputError(
        f"found {found} tokens in {', '.join(sources)}, expected at least {room}{beside}: "
        "give a longer text"
    )


def read_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str],
    length: int,
    max_tokens: int,
    text_format: TextFormat = PLAIN,
    *,
    spread: bool = False,
) -> Tensor:
    """Return (rows, length) token ids of a text, int64.

    Args:
        max_tokens: how many tokens at most, but at least one block.
        text_format: how the text is turned into token ids.
        spread: whether the blocks are evenly spaced over the first ``SPREAD`` times as many tokens,
            instead of being the first blocks of the text.

    Raises:
        InputError: the text cannot be read, or is shorter than one block.
    """
    rows = max(1, max_tokens // length)
    limit = rows * SPREAD if spread else rows
    blocks = list(islice(pack_blocks(tokenizer, sources, length, text_format), limit))

    rows = min(rows, len(blocks))
    return torch.stack([blocks[row * len(blocks) // rows] for row in range(rows)])


class TokenReader:
    """Reads the token ids of several texts in order, from a place that can be saved."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sources: list[str],
        text_format: TextFormat = PLAIN,
    ):
        self.tokenizer = tokenizer
        self.sources = sources
        self.text_format = text_format
        self.rewind()

    def rewind(self) -> None:
        """Start again at the first token."""
        self._move_to(source=0, pieces=0, waiting=[])

    def take(self, count: int) -> list[int]:
        """The next ``count`` token ids; fewer where the text ends."""
        while len(self._waiting) - self._taken < count and self._encode_more():
            pass
        ids = self._waiting[self._taken : self._taken + count]
        self._taken += len(ids)
        return ids

    def take_text(self, frame: RowFrame, room: int) -> list[int]:
        """The next ``room`` token ids, to stand in ``frame``; fewer where the text ends.

        If they begin with what the frame puts before them, that is left out, so that no row has it
        twice.
        """
        ids = self.take(room)
        if frame.prefix and not frame.missing_prefix(ids):
            count = len(frame.prefix)
            ids = ids[count:] + self.take(count)
        return ids

    def state_dict(self) -> dict[str, int | Tensor]:
        """The place: source, pieces of it that were tokenised, ids that wait to be taken."""
        waiting = torch.tensor(self._waiting[self._taken :], dtype=torch.int32)
        return {"source": self._source, "pieces": self._pieces_read, "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go to a place that :meth:`state_dict` gave. What lies before it is not tokenised."""
        self._move_to(
            source=cast(int, state["source"]),
            pieces=cast(int, state["pieces"]),
            waiting=cast(Tensor, state["waiting"]).tolist(),
        )

    def _move_to(self, source: int, pieces: int, waiting: list[int]) -> None:
        self._source = source
        self._pieces_read = pieces
        self._waiting = waiting
        self._taken = 0
        self._pieces = self._open_source()
        for _ in islice(self._pieces, pieces):
            pass

    def _open_source(self) -> Iterator[tuple[str, bool]]:
        if self._source >= len(self.sources):
            return iter(())
        source = self.sources[self._source]
        if self.text_format.chat:
            return read_conversations(self.tokenizer, source, self.text_format.text_field)
        return read_documents(source, self.text_format.text_field)

    def _encode_more(self) -> bool:
        """Tokenise the next pieces; False where the last text ends."""
        pieces = self._read_pieces()
        if not pieces:
            if self._source >= len(self.sources):
                return False
            self._source += 1
            self._pieces_read = 0
            self._pieces = self._open_source()
            return True
        ids = list(encode_pieces(self.tokenizer, pieces))
        if not self._pieces_read:
            self._require_known(ids)
        self._pieces_read += len(pieces)
        self._waiting = self._waiting[self._taken :]
        self._waiting.extend(ids)
        self._taken = 0
        return True

    def _read_pieces(self) -> list[tuple[str, bool]]:
        """The next pieces, as many as are tokenised at a time."""
        pieces: list[tuple[str, bool]] = []
        characters = 0
        for piece in islice(self._pieces, PIECES_AT_ONCE):
            pieces.append(piece)
            characters += len(piece[0])
            if characters >= CHARACTERS_AT_ONCE:
                break
        return pieces

    def _require_known(self, ids: list[int]) -> None:
        """InputError if the tokenizer does not know most of the beginning of a source."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is None or unknown == self.tokenizer.eos_token_id:
            return
        share = ids.count(unknown) / max(1, len(ids))
        if share > MOST_UNKNOWN:
            raise InputError(
                f"found {share:.0%} unknown tokens in {self.sources[self._source]}, expected few: "
                "give the model's own tokenizer, or a text in a script that it has read"
            )


class PackedText(Iterator[Tensor]):
    """Packed sequences (length,) of token ids, int64, without end: iterate over it.

    The text is read again and again, each time in another order: a sequence is drawn at random from
    ``shuffle_buffer`` of them, which 1 turns off. The place in the text, the buffer and the random
    state can be saved: going on from there tokenises nothing that was read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sources: list[str],
        length: int,
        *,
        text_format: TextFormat = PLAIN,
        shuffle_buffer: int = 1,
        seed: int = 0,
    ):
        self.reader = TokenReader(tokenizer, sources, text_format)
        self.length = length
        self.frame = find_row_frame(tokenizer, text_format)
        self.room = self.frame.count_text_tokens(length)
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self._held: list[Tensor] = []
        self._start_pass(0)

    def __next__(self) -> Tensor:
        """The next sequence.

        Raises:
            InputError: the text cannot be read, or is shorter than one sequence.
        """
        while True:
            if self._at_end:
                if self._held:
                    return self._held.pop()
                self._start_pass(self._pass + 1)
            ids = self.reader.take_text(self.frame, self.room)
            if len(ids) < self.room:
                self._end_pass(len(ids))
                continue
            self._empty = False
            self._held.append(self.frame.put_around(ids))
            if len(self._held) >= self.shuffle_buffer:
                return self._draw()

    def state_dict(self) -> dict[str, object]:
        """Where the reading stands: tensors, and what JSON can hold."""
        held = [sequence.int() for sequence in self._held]
        version, words, spare = self._random.getstate()
        return {
            **self.reader.state_dict(),
            "pass": self._pass,
            "at_end": self._at_end,
            "empty": self._empty,
            "random": [version, list(words), spare],
            "held": torch.stack(held) if held else torch.empty(0, self.length, dtype=torch.int32),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on where :meth:`state_dict` was asked."""
        self.reader.load_state_dict(state)
        self._pass = cast(int, state["pass"])
        self._at_end = cast(bool, state["at_end"])
        self._empty = cast(bool, state["empty"])
        version, words, spare = cast(list[Any], state["random"])
        self._random = random.Random()
        self._random.setstate((version, tuple(words), spare))
        self._held = list(cast(Tensor, state["held"]).long())

    def _start_pass(self, number: int) -> None:
        self._pass = number
        self._at_end = False
        self._empty = True
        self._random = random.Random(f"{self.seed} {number}")
        self._held = []
        self.reader.rewind()

    def _end_pass(self, left_over: int) -> None:
        """Put the sequences that are still held in a random order, the next one last."""
        if self._empty:
            raise _make_short_text_error(left_over, self.reader.sources, self.frame, self.room)
        self._at_end = True
        self._random.shuffle(self._held)
        self._held.reverse()

    def _draw(self) -> Tensor:
        index = self._random.randrange(len(self._held))
        self._held[index], self._held[-1] = self._held[-1], self._held[index]
        return self._held.pop()
