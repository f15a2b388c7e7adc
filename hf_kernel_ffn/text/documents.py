"""Text by documents: local .txt, .jsonl and .parquet files, or names of datasets, streamed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..checkpoint_code.errors import InputError, MissingPackage

LOCAL = (".txt", ".jsonl", ".parquet")
"""Ends of the names of local files that can be read."""
PARQUET_ROWS = 1000
"""Rows of a parquet file read at once: some megabytes of ordinary text."""


def read_documents(source: str, text_field: str = "text") -> Iterator[tuple[str, bool]]:
    """Yield pieces of text of one source in order, each with whether a document ends there.

    Args:
        source: a local .txt (one document, streamed by line), .jsonl or .parquet file (one document
            a row), or a `datasets` name, as ``name``, ``name:split`` or ``name:config:split``.
        text_field: which field of a row is the text.

    Raises:
        InputError: the source cannot be read, or a row has no such field.
    """
    path = Path(source)
    try:
        if path.suffix == ".txt":
            yield from _read_lines(path)
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(source, text_field)
        else:
            rows = _read_parquet(path) if path.suffix == ".parquet" else _load_dataset(source)
            for number, row in enumerate(rows, 1):
                yield _get_text(row, text_field, f"{source}, row {number}"), True
    except InputError:
        raise
    except (OSError, ValueError) as error:
        # Not UTF-8, and whatever is wrong with a parquet file, are ValueErrors.
        reason = " ".join(str(error).split())
        raise InputError(
            f"found {source} unreadable as text ({reason}), expected UTF-8 {', '.join(LOCAL)}"
        ) from error


def _read_lines(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a .txt file, none of which ends a document."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield line, False


def _read_jsonl(source: str, text_field: str) -> Iterator[tuple[str, bool]]:
    """Yield the text of every row of a .jsonl file; blank lines are no rows."""
    with Path(source).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{source}, line {number}"
                yield _get_text(_parse_json(line, place), text_field, place), True


def _parse_json(line: str, place: str) -> object:
    """Return the value in ``line``; InputError that names the ``place`` if it is no JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"found no JSON in {place} ({error.msg} at column {error.colno}): repair it"
        ) from error


def _read_parquet(path: Path) -> Iterator[object]:
    """Yield the rows of a parquet file."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingPackage(
            f"reading {path} needs the datasets package: pip install 'hf-kernel-ffn[distill]'"
        ) from error
    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=PARQUET_ROWS):
            yield from batch.to_pylist()


def _load_dataset(source: str) -> Iterable[object]:
    """Return the rows of a dataset, streamed.

    Args:
        source: ``name``, ``name:split`` or ``name:config:split``.
    """
    if Path(source).exists():
        raise InputError(
            f"found {source}, expected a {', '.join(LOCAL)} file or the name of a dataset: "
            "convert the text"
        )
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage(
            f"reading {source} needs the datasets package: pip install 'hf-kernel-ffn[distill]'"
        ) from error

    name, *rest = source.split(":")
    config = rest[:-1]
    split = rest[-1] if rest else "train"
    try:
        return datasets.load_dataset(name, *config, split=split, streaming=True)
    except Exception as error:
        # The library raises many kinds; whichever it is, the text could not be had.
        reason = " ".join(str(error).split())
        raise InputError(
            f"found no readable text at {source!r} ({reason}): "
            "give a local file or the name of a dataset"
        ) from error


def _get_text(row: object, text_field: str, place: str) -> str:
    """Return the text of ``row``; InputError that names the ``place`` if it has none."""
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise InputError(
            f"found no text field {text_field!r} in {place}: name the right one as text_field"
        )
    return text
