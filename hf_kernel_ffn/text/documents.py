"""Text by documents: local .txt, .jsonl and .parquet files, or names of datasets, streamed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..checkpoint_code.errors import InputError

LOCAL = (".txt", ".jsonl", ".parquet")


def read_documents(source: str, text_field: str = "text") -> Iterator[tuple[str, bool]]:
    """Pieces of text of one source in order, each with whether a document ends there.

    Args:
        source: a local .txt (one document, streamed by line), .jsonl or .parquet file (one document a row), or a
            `datasets` name, as ``name``, ``name:split`` or ``name:config:split``.
        text_field: which field of a row is the text.

    Raises:
        InputError: the source cannot be read, or a row has no such field.
    """
    path = Path(source)
    try:
        if path.suffix == ".txt":
            with path.open(encoding="utf-8") as file:
                for line in file:
                    yield line, False
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        where = f"{source}, line {number}"
                        yield _read_field(_parse_json(line, where), text_field, where), True
        else:
            rows = _read_parquet(path) if path.suffix == ".parquet" else _load_dataset(source)
            for number, row in enumerate(rows, 1):
                yield _read_field(row, text_field, f"{source}, row {number}"), True
    except InputError:
        raise
    except (
        OSError,
        ValueError,
    ) as error:  # not UTF-8, and whatever is wrong with a parquet file, are ValueErrors
        reason = " ".join(str(error).split())
        raise InputError(
            f"found {source} unreadable as text ({reason}), expected UTF-8 {', '.join(LOCAL)}"
        ) from error


def _parse_json(line: str, where: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"found no JSON in {where} ({error.msg} at column {error.colno}): repair it"
        ) from error


def _read_parquet(path: Path) -> Iterator[dict]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(
            f"reading {path} needs the datasets package: pip install 'hf-kernel-ffn[distill]'"
        ) from error
    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _load_dataset(source: str) -> Iterable[dict]:
    path = Path(source)
    if path.exists():
        raise InputError(
            f"found {source}, expected a {', '.join(LOCAL)} file or the name of a dataset: convert the text"
        )
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"reading {source} needs the datasets package: pip install 'hf-kernel-ffn[distill]'"
        ) from error
    try:
        name, *rest = source.split(":")
        split = rest[-1] if rest else "train"
        return datasets.load_dataset(name, *rest[:-1], split=split, streaming=True)
    except (
        Exception
    ) as error:  # the library raises many kinds; whichever, the text could not be had
        reason = " ".join(str(error).split())
        raise InputError(
            f"found no readable text at {source!r} ({reason}): give a local file or the name of a dataset"
        ) from error


def _read_field(row, text_field: str, where: str) -> str:
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise InputError(
            f"found no text field {text_field!r} in {where}: name the right one as text_field"
        )
    return text
