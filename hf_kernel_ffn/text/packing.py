"""Text to blocks of token ids, packed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from .documents import read_documents

SPREAD = 32
"""How much more text than it uses a spread sample reads."""
PIECES_AT_ONCE = 1000
"""Pieces of text (documents, or lines of one) that the tokenizer is given at a time.

They are enough for its threads, and few enough to be held in memory.
"""


def stream_tokens(
    tokenizer: PreTrainedTokenizerBase, sources: list[str], text_field: str = "text"
) -> Iterator[int]:
    """Yield the token ids of all sources in order.

    After every document comes the tokenizer's end token, if it has one.
    """
    for source in sources:
        pieces = read_documents(source, text_field)
        while batch := list(islice(pieces, PIECES_AT_ONCE)):
            yield from encode_pieces(tokenizer, batch)


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
    tokenizer: PreTrainedTokenizerBase, sources: list[str], length: int, text_field: str = "text"
) -> Iterator[Tensor]:
    """Yield consecutive blocks of ``length`` token ids, int64; what is left at the end is dropped.

    Raises:
        InputError: the text is shorter than one block.
    """
    stream = stream_tokens(tokenizer, sources, text_field)
    is_empty = True
    while len(block := list(islice(stream, length))) == length:
        is_empty = False
        yield torch.tensor(block)
    if is_empty:
        raise InputError(
            f"found {len(block)} tokens in {', '.join(sources)}, expected at least {length}: "
            "give a longer text"
        )


def read_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str],
    length: int,
    max_tokens: int,
    text_field: str = "text",
    *,
    spread: bool = False,
) -> Tensor:
    """Return (rows, length) token ids of a text, int64.

    Args:
        max_tokens: how many tokens at most, but at least one block.
        text_field: which field of a row is the text.
        spread: whether the blocks are evenly spaced over the first ``SPREAD`` times as many tokens,
            instead of being the first blocks of the text.

    Raises:
        InputError: the text cannot be read, or is shorter than one block.
    """
    rows = max(1, max_tokens // length)
    limit = rows * SPREAD if spread else rows
    blocks = list(islice(pack_blocks(tokenizer, sources, length, text_field), limit))

    rows = min(rows, len(blocks))
    return torch.stack([blocks[row * len(blocks) // rows] for row in range(rows)])
