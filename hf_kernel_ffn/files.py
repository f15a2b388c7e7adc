"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path | str) -> Iterator[Path]:
    """A path beside ``file``, whose folders are made, to write to; it takes the name of ``file`` once the context ends well."""
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def write_text(file: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8."""
    with replacing(file) as beside:
        beside.write_text(text, encoding="utf-8")
