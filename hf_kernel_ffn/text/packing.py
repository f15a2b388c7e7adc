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


def stream_tokens(
    tokenizer: PreTrainedTokenizerBase, sources: list[str], text_field: str = "text"
) -> Iterator[int]:
    """Token ids of all sources in order, with the tokenizer's end token (if it has one) after every document."""
    for source in sources:
        pieces = read_documents(source, text_field)
        while batch := list(islice(pieces, 1000)):
            encoded = tokenizer([text for text, _ in batch], add_special_tokens=False)["input_ids"]
            for ids, (_, ends) in zip(encoded, batch):
                yield from ids
                if ends and tokenizer.eos_token_id is not None:
                    yield tokenizer.eos_token_id


def pack_blocks(
    tokenizer: PreTrainedTokenizerBase, sources: list[str], length: int, text_field: str = "text"
) -> Iterator[Tensor]:
    """Consecutive blocks of ``length`` token ids, int64; what is left at the end is dropped.

    Raises:
        InputError: the text is shorter than one block.
    """
    stream = stream_tokens(tokenizer, sources, text_field)
    empty = True
    while len(block := list(islice(stream, length))) == length:
        empty = False
        yield torch.tensor(block)
    if empty:
        raise InputError(
            f"found {len(block)} tokens in {', '.join(sources)}, expected at least {length}: give a longer text"
        )


def read_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str],
    length: int,
    max_tokens: int,
    text_field: str = "text",
    spread: bool = False,
) -> Tensor:
    """(rows, length) token ids, at most ``max_tokens`` of them (at least one block): the first blocks of the text or, with
    ``spread``, blocks evenly spaced over its first ``SPREAD`` times as many tokens."""
    rows = max(1, max_tokens // length)
    read = list(
        islice(
            pack_blocks(tokenizer, sources, length, text_field), rows * (SPREAD if spread else 1)
        )
    )
    return torch.stack(
        [read[i * len(read) // min(rows, len(read))] for i in range(min(rows, len(read)))]
    )
