"""Text for experiments, which may be compressed."""

from __future__ import annotations

import lzma
from pathlib import Path


def read_text(path: Path) -> str:
    """Read a .txt or .txt.xz file."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return file.read()
