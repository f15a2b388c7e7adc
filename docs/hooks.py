"""What mkdocs does beside its plugins: files of other folders, help texts, docstring roles.

mkdocs calls the functions ``on_…`` by their names.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):(?=<code>)")
"""What is left in a page of a role such as :func:`name` in a docstring."""
COMMANDS_PAGE = "guide/commands.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of docs/assets, those that the experiments draw, and the notebooks."""
    for path in sorted((ROOT / "docs" / "assets").iterdir()):
        files.append(_generated(config, f"assets/{path.name}", path))
    for path in sorted((ROOT / "recipes" / "results").glob("*/frontier.png")):
        files.append(_generated(config, f"assets/{path.parent.name}-frontier.png", path))
    for path in sorted((ROOT / "recipes" / "examples").glob("*.ipynb")):
        files.append(_generated(config, f"assets/{path.name}", path))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Put what --help says of every command into the page of commands."""
    if page.file.src_uri != COMMANDS_PAGE:
        return markdown
    overview = _help()
    names = re.findall(r"^  (\w[\w-]*)  ", overview.partition("Commands:")[2], re.MULTILINE)
    sections = [f"## {name}\n\n```text\n{_help(name)}```\n" for name in names]
    return "\n".join([markdown, f"```text\n{overview}```\n", *sections])


def on_page_content(html: str, page, config: MkDocsConfig, files: Files) -> str:
    """Take the names of docstring roles out of the pages made of docstrings."""
    return ROLE.sub("", html)


def _generated(config: MkDocsConfig, uri: str, path: Path) -> File:
    return File.generated(config, uri, abs_src_path=str(path))


def _help(*command: str) -> str:
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    run = [sys.executable, "-m", "hf_kernel_ffn", *command, "--help"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.replace("python -m hf_kernel_ffn", "hf-kernel-ffn")
