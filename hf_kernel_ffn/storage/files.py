"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint_code.errors import InputError

SCRATCH = ".hf_kernel_ffn."
"""How the names begin of folders that are being written."""
LAST = "config.json"
"""Without this file no folder is taken for a model."""
REPORT_SUFFIXES = (".json", ".html")
"""Ends of the names of reports, which may be written again in a model's folder."""
MODEL_JSON = {
    "added_tokens.json",
    "checksums.json",
    "config.json",
    "conversion.json",
    "distillation.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "recipe.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}
"""JSON files in a model's folder that are no report of an evaluation or a reading."""


@contextmanager
def replace_file(file: Path | str) -> Iterator[Path]:
    """Yield a path to write to; what was written becomes ``file`` once the context ends well.

    The folders above are made. A plain file is on the disk before it takes the name, and keeps the
    mode of the one whose place it takes. A link stays, and what it leads to is replaced. What is no
    plain file, such as a pipe or a device, is written into.

    Raises:
        InputError: it cannot be written.
    """
    target = Path(file)
    with explain_write_errors(target):
        if _is_written_into(target):
            with tempfile.TemporaryDirectory() as scratch:
                whole = Path(scratch, "whole")
                yield whole
                with whole.open("rb") as content, target.open("ab") as stream:
                    shutil.copyfileobj(content, stream)
            return

        target = target.resolve()
        beside = _name_beside(target)
        made = _make_folders(target.parent)
        try:
            yield beside
            sync_to_disk(beside)
            if target.exists():
                shutil.copymode(target, beside)
            os.replace(beside, target)
        except BaseException:
            beside.unlink(missing_ok=True)
            _remove_folders(made)
            raise


def _is_written_into(target: Path) -> bool:
    """Whether ``target`` is there and neither a plain file nor a folder: a pipe, a terminal, …"""
    try:
        mode = target.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _name_beside(target: Path) -> Path:
    """Where a file is written before it takes the place of ``target``."""
    return target.with_name(f".{target.name}.{os.getpid()}")


def write_text(file: Path | str, text: str) -> None:
    """Write ``text`` to ``file`` as UTF-8, whole or not at all.

    What UTF-8 has no form of, such as half of a pair from a file's name that is no text, is
    written as an escape.
    """
    with replace_file(file) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path | str, metadata: dict[str, str] | None = None
) -> None:
    """Write ``tensors`` to a safetensors ``file`` of the mode that any new file gets.

    The library's own files can be read by their owner alone.
    """
    file = Path(file)
    file.touch()
    mode = file.stat().st_mode
    save_file(dict(tensors), file, metadata=metadata)
    file.chmod(stat.S_IMODE(mode))


@contextmanager
def explain_write_errors(target: str | os.PathLike) -> Iterator[None]:
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
def new_folder(out: str | os.PathLike, last: str = LAST) -> Iterator[Path]:
    """Yield a folder to write to, which becomes ``out`` when the context ends well.

    When it does not, the folder vanishes. A new folder appears at once. One that is there already
    is filled, the file ``last`` last: it may be where something is mounted, or where a shell
    stands, and keeps its mode.

    Raises:
        InputError: ``out`` is a file or holds something, or cannot be written.
    """
    require_empty(out)
    place = Path(out).resolve()
    is_there = place.is_dir()
    above = place if is_there else place.parent
    with explain_write_errors(out):
        made = _make_folders(above)
        try:
            with tempfile.TemporaryDirectory(dir=above, prefix=SCRATCH) as scratch:
                folder = Path(scratch, place.name or "made")
                folder.mkdir()
                yield folder
                sync_to_disk(folder)
                if is_there:
                    _move_all(folder, place, last)
                else:
                    os.replace(folder, place)
        except BaseException:
            _remove_folders(made)
            raise


def _make_folders(folder: Path) -> list[Path]:
    """Make ``folder`` and those above it; which were made, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_folders(folders: list[Path]) -> None:
    """Remove ``folders`` that nobody else has put something into, the innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _move_all(folder: Path, place: Path, last: str) -> None:
    """Move what is in ``folder`` to ``place``, the file ``last`` last; all of it or nothing."""
    moved: list[Path] = []
    try:
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == last, path.name)):
            os.rename(path, place / path.name)
            moved.append(place / path.name)
    except OSError:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    sync_to_disk(place)


def require_empty(out: str | os.PathLike) -> None:
    """Check that ``out`` can be made, or is an empty folder that can be written to.

    Raises:
        InputError: it exists and is something else, or cannot be made.
    """
    out = Path(out)
    with _explain_place(out):
        is_there = out.exists()
        if out.is_symlink() and not is_there:
            raise InputError(
                f"found {out} a link that leads nowhere, expected a new or empty folder: "
                "choose another"
            )
        if is_there and (not out.is_dir() or any(out.iterdir())):
            raise InputError(
                f"found {out} not empty, expected a new or empty folder: choose another or "
                "remove it"
            )
        _try_to_write(out if is_there else _find_folder_above(out), out)


def require_place(path: Path, *inputs: str | os.PathLike | None) -> None:
    """Check that a file can be made at ``path``, or be replaced or written into.

    Args:
        inputs: of the command, files or folders of models or names of a hub. None: not given.

    Raises:
        InputError: it is a folder, or one of the inputs, or what lies above it is no folder or
            cannot be written to.
    """
    with _explain_place(path):
        if path.is_dir():
            raise InputError(f"found the folder {path}, expected a file to write: give a file name")
        for name in inputs:
            if name is not None and _is_part_of(path, Path(name)):
                raise InputError(
                    f"found {path} to be written, which belongs to {name}, expected a file of its "
                    "own: choose another name"
                )
        if not _is_written_into(path):
            _try_to_write(_find_folder_above(path.resolve()), path)
            with suppress(FileNotFoundError):
                _name_beside(path.resolve()).lstat()  # is the name too long?
        elif not os.access(path, os.W_OK):
            raise InputError(f"found {path} not writable: choose another place")


def _is_part_of(path: Path, name: Path) -> bool:
    """Whether the file at ``path`` is ``name``, or one of the files that make up that model."""
    if not path.is_file() or not name.exists():
        return False
    path = path.resolve()
    name = name.resolve()
    if path == name:
        return True
    is_report = path.suffix in REPORT_SUFFIXES and path.name not in MODEL_JSON
    return path.parent == name and not is_report


@contextmanager
def _explain_place(path: Path) -> Iterator[None]:
    """Turn what the system says when it looks for ``path`` into one InputError.

    The name may be too long, or have a byte that no name has, or lead through a circle of links.
    One that is no UTF-8 could be written, but safetensors could not read it.
    """
    try:
        str(path).encode("utf-8")
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"found no place to write {path} ({_one_line(error)}): choose another"
        ) from error


def _find_folder_above(path: Path) -> Path:
    """The nearest folder above ``path`` that is there; InputError if it is something else."""
    above = next(
        parent for parent in path.absolute().parents if parent.exists() or parent.is_symlink()
    )
    if not above.is_dir():
        raise InputError(
            f"found {above} no writable folder, expected one to make {path} in: "
            "choose another place"
        )
    return above


def _try_to_write(folder: Path, path: Path) -> None:
    """Make a folder in ``folder`` and remove it; InputError that names ``path`` if that fails.

    Asking for rights is not enough: a disk may be mounted for reading alone.
    """
    try:
        os.rmdir(tempfile.mkdtemp(dir=folder, prefix=SCRATCH))
    except OSError as error:
        raise InputError(
            f"found {folder} no writable folder ({_one_line(error)}), expected one to make {path} "
            "in: choose another place"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
