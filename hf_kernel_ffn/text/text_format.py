"""How a text is turned into token ids: which field, chat or not, and the start token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..checkpoint_code.errors import InputError

BosChoice = Literal["auto", "always", "never"]
"""Whether a text begins with the start token: as the tokenizer or the chat template does it, or
always, or never."""
BOS_CHOICES: tuple[BosChoice, ...] = get_args(BosChoice)


@dataclass(frozen=True)
class TextFormat:
    """How a text is turned into token ids; the same wherever one is read.

    Raises:
        InputError: ``bos`` is none of ``BOS_CHOICES``.
    """

    text_field: str = "text"
    """Field of a row that is the text."""
    chat: bool = False
    """Everything goes through the tokenizer's chat template: the ``messages`` of a row, else a
    line, or a row's text, as a user's turn that is to be answered."""
    bos: BosChoice = "auto"

    def __post_init__(self) -> None:
        if self.bos not in BOS_CHOICES:
            raise InputError(f"found bos {self.bos!r}, expected one of {', '.join(BOS_CHOICES)}")


PLAIN = TextFormat()
"""Text as it is, begun as the tokenizer begins it."""
