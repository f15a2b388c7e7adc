#!/usr/bin/env python3
"""Run the blocks of a tutorial in order, and write what they print into the text block after each: every output is real.

python scripts/tutorial.py recipes/tutorial.md
"""

import contextlib
import io
import re
import subprocess
from pathlib import Path
from typing import Annotated

import typer

BLOCK = re.compile(r"```(bash|python)\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def main(
    tutorial: Annotated[
        Path,
        typer.Argument(
            help="Markdown with bash and python blocks; all python blocks are one session"
        ),
    ],
):
    """Run TUTORIAL from the project's root, and rewrite its outputs. Bash blocks print nothing into it."""
    session: dict = {}

    def run(match: re.Match) -> str:
        language, code = match.groups()
        block = f"```{language}\n{code}```\n"
        typer.echo(code, err=True)
        if language == "bash":
            subprocess.run(code, shell=True, check=True, executable="/bin/bash")
            return block
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(tutorial), "exec"), session)
        lines = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
        return block + (f"\n```text\n{lines}\n```\n" if lines else "")

    text = BLOCK.sub(run, tutorial.read_text(encoding="utf-8"))
    tutorial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
