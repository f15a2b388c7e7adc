"""Pages of numbers: one HTML file each, which needs no network."""

from __future__ import annotations

import json
from pathlib import Path

from ..storage.files import write_text

PLACEHOLDER = "__DATA__"
"""Where a template has its numbers."""


def fill_page(file: str | Path, template: Path, data: object) -> None:
    """Write ``template`` with ``data`` (JSON types) in it to ``file``, whole or not at all."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # "<" could end the script element or open a comment in it; in JSON it stands in strings only.
    text = text.replace("<", "\\u003c")
    write_text(file, template.read_text(encoding="utf-8").replace(PLACEHOLDER, text, 1))


def shorten(number: float, digits: int = 4) -> float:
    """``number`` to so many significant digits."""
    return float(f"{number:.{digits}g}")
