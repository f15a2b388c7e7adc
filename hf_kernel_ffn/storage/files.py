"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..checkpoint_code.errors import InputError


@contextmanager
def replace_file(file: Path | str) -> Iterator[Path]:
    """A path beside ``file``, whose folders are made, to write to; it takes the name of ``file`` once the context ends well."""
    target = Path(file)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    with explain_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            sync_to_disk(beside)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)


def write_text(file: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8."""
    with replace_file(file) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def explain_write_errors(target: Path | str) -> Iterator[None]:
    """Whatever the system says while ``target`` is written (no room, no right, a full quota) becomes one InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"could not write {target} ({error}): make room or choose another place; what was whole before is untouched"
        ) from error


def sync_to_disk(path: Path) -> None:
    """Return once ``path``, a file or a folder of files, is on the disk."""
    for part in (*(path.iterdir() if path.is_dir() else ()), path):
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A folder to write to that becomes ``out`` when the block ends well, and vanishes when it does not.

    Raises:
        InputError: ``out`` is a file or holds something.
    """
    out = Path(out)
    require_empty(out)
    with explain_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            made = Path(scratch, "made")
            made.mkdir()
            yield made
            sync_to_disk(made)
            if out.is_dir():
                out.rmdir()
            os.replace(made, out)


def require_empty(out: str | os.PathLike) -> None:
    """InputError if ``out`` exists and is not an empty folder, or cannot be made."""
    out = Path(out)
    require_place(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"found {out} not empty, expected a new or empty folder: choose another or remove it"
        )


def require_place(path: Path) -> None:
    """InputError if nothing can be made at ``path``, because what lies above it is no folder or not writable."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(
            f"found {above} no writable folder, expected one to make {path} in: choose another place"
        )
