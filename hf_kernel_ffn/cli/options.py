"""What several commands have in common."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from ..text.text_format import BosChoice, TextFormat

Dtype = Annotated[
    str,
    typer.Option(help="float32, bfloat16 or float16: of the weights while they are computed with"),
]

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]

Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="read text through the tokenizer's chat template: the messages of rows, or lines as a "
        "user's turns",
    ),
]

Bos = Annotated[
    str,
    typer.Option(
        help="auto, always or never: begin a text with the start token; auto: as the tokenizer or "
        "the chat template does it"
    ),
]

TextField = Annotated[str, typer.Option(help="field of a row that is the text")]

Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="allow code that a model brings: its family's, or a checkpoint's own kernel file",
    ),
]


def make_text_format(chat: bool, bos: str, text_field: str) -> TextFormat:
    """Return the format that --chat, --bos and --text-field ask for; InputError if it is none."""
    from ..text.text_format import TextFormat

    return TextFormat(text_field, chat, cast("BosChoice", bos))


def quieten() -> None:
    """Keep transformers off a stderr that is a file or a pipe: it is for the one line that says
    what is wrong."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
