"""What several commands have in common."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

Dtype = Annotated[
    str,
    typer.Option(help="float32, bfloat16 or float16: of the weights while they are computed with"),
]

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]

Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="allow a checkpoint's own kernel file")
]


def quieten() -> None:
    """Keep transformers off a stderr that is a file or a pipe: it is for the one line that says
    what is wrong."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
