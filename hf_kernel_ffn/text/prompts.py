"""Prompts: the beginnings of texts, or questions to a chat model, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from .chat import Message, find_messages, find_template_start, render
from .documents import read_items
from .packing import SPREAD
from .row_frame import begin_as_asked, encode_once, find_row_frame
from .text_format import PLAIN, TextFormat


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text_format: TextFormat = PLAIN
) -> list[int]:
    """Return the token ids of ``prompt``, begun as ``text_format`` says.

    In a chat it is a user's turn, with the beginning of the answer behind it.

    Raises:
        InputError: a chat template or a start token is needed and there is none.
    """
    if text_format.chat:
        turns = [{"role": "user", "content": prompt}]
        return _encode_turns(tokenizer, turns, "the prompt", text_format)
    return begin_as_asked(tokenizer, encode_once(tokenizer, prompt), text_format.bos)


def read_chat_prompts(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    count: int,
    text_format: TextFormat,
    *,
    longest: int | None = None,
) -> list[Tensor]:
    """Return ``count`` prompts (length,) int64 of a text, evenly spaced, to be answered.

    A line of a .txt file, or the text of a row, is a user's turn. Of a row's ``messages`` the last
    answer is left out.

    Args:
        source: as :func:`~hf_kernel_ffn.text.documents.read_documents` has it; its first
            ``SPREAD`` times as many prompts are read.
        longest: tokens that a prompt may have; those that have more are left out.

    Raises:
        InputError: there are fewer, or the text cannot be read.
    """
    prompts: list[Tensor] = []
    for item in read_items(source):
        messages = find_messages(item, text_format.text_field)
        if messages is None:
            continue
        if messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if messages:
            ids = _encode_turns(tokenizer, messages, item.place, text_format)
            if longest is None or len(ids) <= longest:
                prompts.append(torch.tensor(ids))
        if len(prompts) == SPREAD * count:
            break
    if len(prompts) < count:
        limit = "" if longest is None else f" of at most {longest} tokens"
        raise InputError(
            f"found {len(prompts)} prompts{limit} in {source}, expected {count}: give more text or "
            "ask for fewer"
        )
    return [prompts[row * len(prompts) // count] for row in range(count)]


def _encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    place: str,
    text_format: TextFormat,
) -> list[int]:
    """The token ids of a conversation that is to be answered, begun as ``text_format`` says."""
    frame = find_row_frame(tokenizer, text_format)
    text = render(tokenizer, messages, place, open_answer=True)
    text = text.removeprefix(find_template_start(tokenizer))
    ids = cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
    return [*frame.missing_prefix(ids), *ids]
