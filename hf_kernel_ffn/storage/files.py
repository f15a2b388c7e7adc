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
    """Yield a path beside ``file`` to write to, which takes that name once the context ends well.

    The folders above are made. What was written is on the disk before it takes the name.

    Raises:
        InputError: it cannot be written.
    """
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
    """Write ``text`` to ``file`` as UTF-8, whole or not at all."""
    with replace_file(file) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def explain_write_errors(target: Path | str) -> Iterator[None]:
    """Turn what the system says while ``target`` is written into one InputError.

    That may be that there is no room, no right, or a full quota.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"could not write {target} ({error}): make room or choose another place; "
            "what was whole before is untouched"
        ) from error


def sync_to_disk(path: Path) -> None:
    """Return once ``path``, a file or a folder of files, is on the disk (POSIX only)."""
    files = list(path.iterdir()) if path.is_dir() else []
    for file in (*files, path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """Yield a folder to write to, which becomes ``out`` when the context ends well.

    When it does not, the folder vanishes.

    Raises:
        InputError: ``out`` is a file or holds something, or cannot be written.
    """
    out = Path(out)
    require_empty(out)
    with explain_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            folder = Path(scratch, "made")
            folder.mkdir()
            yield folder
            sync_to_disk(folder)
            if out.is_dir():
                out.rmdir()
            os.replace(folder, out)


def require_empty(out: str | os.PathLike) -> None:
    """Check that ``out`` can be made, or is an empty folder.

    Raises:
        InputError: it exists and is something else, or cannot be made.
    """
    out = Path(out)
    require_place(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"found {out} not empty, expected a new or empty folder: choose another or remove it"
        )


def require_place(path: Path) -> None:
    """Check that something can be made at ``path``.

    Raises:
        InputError: what lies above it is no folder, or not writable.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(
            f"found {above} no writable folder, expected one to make {path} in: "
            "choose another place"
        )
