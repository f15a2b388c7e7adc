"""Conversations through a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from .documents import MESSAGES, Item, get_text, read_items

Message = Mapping[str, object]
"""A turn of a conversation: its ``role`` and its ``content``."""
TRIAL = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
)
"""What a template is tried with."""


def read_conversations(
    tokenizer: PreTrainedTokenizerBase, source: str, text_field: str = "text"
) -> Iterator[tuple[str, bool]]:
    """Yield the conversations of one source in order, rendered, each with False.

    False, since a template itself says how a conversation ends: no end token is to follow. The
    start token that a template begins with is left out, since it belongs to rows.

    Args:
        source: as :func:`~hf_kernel_ffn.text.documents.read_documents` has it. Rows have
            ``messages``, or a text that is a user's turn; so is a line of a .txt file.
        text_field: which field of a row is that text.

    Raises:
        InputError: the source cannot be read, the tokenizer has no chat template, or that refuses a
            conversation.
    """
    start = find_template_start(tokenizer)
    for item in read_items(source):
        messages = find_messages(item, text_field)
        if messages is not None:
            is_open = messages[-1].get("role") != "assistant"
            text = render(tokenizer, messages, item.place, open_answer=is_open)
            yield text.removeprefix(start), False


def find_messages(item: Item, text_field: str) -> Sequence[Message] | None:
    """Return the conversation in ``item``; None of a blank line, or of a row without text.

    Raises:
        InputError: there is none, or it is no list of messages.
    """
    if item.line is not None:
        line = item.line.strip()
        return [{"role": "user", "content": line}] if line else None
    if not isinstance(item.row, dict) or item.row.get(MESSAGES) is None:
        text = get_text(item, text_field)
        return [{"role": "user", "content": text}] if text.strip() else None

    messages = item.row[MESSAGES]
    is_list = isinstance(messages, list) and len(messages) > 0
    if not is_list or not all(isinstance(turn, dict) and "role" in turn for turn in messages):
        raise InputError(
            f"found {MESSAGES} in {item.place} that are no list of turns, expected mappings with "
            "role and content: repair them"
        )
    return messages


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    place: str,
    *,
    open_answer: bool,
) -> str:
    """Return ``messages`` as the tokenizer's chat template writes them.

    Args:
        place: where they are from, to be named in an error.
        open_answer: whether the beginning of an answer stands at the end.

    Raises:
        InputError: there is no template, or it refuses them.
    """
    require_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            cast(Any, messages), tokenize=False, add_generation_prompt=open_answer
        )
    except Exception as error:  # of jinja, of Python, or what the template itself raises
        reason = " ".join(str(error).split())
        raise InputError(
            f"found a conversation in {place} that the chat template refuses ({reason}), expected "
            "turns as it takes them: repair it"
        ) from error
    return str(text)


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """InputError unless ``tokenizer`` has a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"found no chat template in the tokenizer of {_name(tokenizer)}, expected one for "
            "--chat (in a recipe: data.chat): leave that out, or give a chat model"
        )


def find_template_start(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the start token that the chat template begins a conversation with, or nothing.

    A token that begins every turn, as SmolLM2's, is no start token of the conversation, though the
    tokenizer may call it so.

    Raises:
        InputError: there is no template.
    """
    try:
        text = render(tokenizer, TRIAL, "a trial", open_answer=True)
    except InputError:  # a template of one question
        text = render(tokenizer, TRIAL[:1], "a trial", open_answer=True)
    start = tokenizer.bos_token
    if isinstance(start, str) and text.startswith(start) and text.count(start) == 1:
        return start
    return ""


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where ``tokenizer`` is from, or its class."""
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
