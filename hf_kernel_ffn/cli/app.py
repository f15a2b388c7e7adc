"""The command line ``hf-kernel-ffn``: bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import typer

from .checkpoints import apply, export, push, verify
from .convert import convert
from .distill import distill, record
from .evaluate import evaluate
from .families import families
from .graph import graph
from .read import read

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    convert,
    record,
    distill,
    evaluate,
    read,
    graph,
    verify,
    export,
    apply,
    push,
    families,
):
    app.command()(command)


USAGE_ERROR: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError"
)
"""What typer raises for arguments that a command does not take; it has no public name."""


def main() -> None:
    """Entry point of ``hf-kernel-ffn``."""
    run_app(_run_command)


def _run_command() -> None:
    """Run the command that the arguments name; InputError if they are none that it takes."""
    from ..checkpoint_code.errors import InputError

    if len(sys.argv) < 2:
        app()  # prints the help
    try:
        code = app(standalone_mode=False)
    except USAGE_ERROR as error:
        message = getattr(error, "format_message", error.__str__)()
        raise InputError(f"{message.rstrip('.')}: see --help") from error
    raise SystemExit(code if isinstance(code, int) else 0)


def _show_every_character() -> None:
    """Let no character end a command: one that the terminal cannot show is shown by its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_app(command: Callable[[], object]) -> None:
    """Call ``command``; bad input, or versions out of range, end it with one line and exit code 2.

    With the environment variable HF_KERNEL_FFN_DEBUG=1 the traceback stands before that line.
    """
    from ..checkpoint_code.errors import InputError

    _show_every_character()
    try:
        command()
    except (InputError, FloatingPointError) as error:
        _exit_with_message(str(error), error)
    except OSError as error:
        _exit_with_message(f"the system refused a file ({error}): see that it is as it was", error)
    except Exception as error:
        from ..versions import describe_unsupported_version

        reason = describe_unsupported_version()
        if reason is None:
            raise
        _exit_with_message(f"{reason} ({type(error).__name__})", error)


def _exit_with_message(message: str, error: Exception) -> NoReturn:
    """End with exit code 2 and one line on stderr, before it the traceback if that is asked for."""
    if os.environ.get("HF_KERNEL_FFN_DEBUG") == "1":
        traceback.print_exception(error)
    sys.stderr.write(f"error: {' '.join(message.splitlines())}\n")
    raise SystemExit(2) from error
