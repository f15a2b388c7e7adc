"""Text by documents: local .txt, .jsonl and .parquet files, or names of datasets, streamed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..checkpoint_code.errors import InputError, MissingPackage

LOCAL = (".txt", ".jsonl", ".parquet")
"""Ends of the names of local files that can be read."""
MESSAGES = "messages"
"""The field of a row that is a conversation."""
PARQUET_ROWS = 1000
"""Rows of a parquet file read at once: some megabytes of ordinary text."""
LONGEST_WORD = 1024
"""Characters from the end of a piece within which white space is looked for."""
MOST_FIELDS = 8
"""Names of a row's fields that an error lists."""
ENCODING = "utf-8-sig"
"""UTF-8, without the mark of its byte order that some editors put before a text."""
LONGEST_PIECE = 2**16
"""Characters of a text that are tokenised at once: many times an ordinary line or row.

A tokenizer takes a long text in one go, in memory many times its size.
"""


class Item(NamedTuple):
    """What a source is read by: a line of a .txt file, or a row of another."""

    place: str
    """Where it is, to be named in errors."""
    line: str | None
    row: object


def read_documents(source: str, text_field: str = "text") -> Iterator[tuple[str, bool]]:
    """Yield pieces of text of one source in order, each with whether a document ends there.

    A line, or a row, of more than ``LONGEST_PIECE`` characters comes in several pieces, cut before
    white space. Rows with nothing but white space in them are left out.

    Args:
        source: a local .txt (one document, streamed by line), .jsonl or .parquet file (one document
            a row), or a `datasets` name, as ``name``, ``name:split`` or ``name:config:split``.
        text_field: which field of a row is the text.

    Raises:
        InputError: the source cannot be read, or a row has no such field.
    """
    for item in read_items(source, longest_line=LONGEST_PIECE):
        if item.line is not None:
            yield item.line, False
            continue
        text = get_text(item, text_field)
        if text.strip():
            *pieces, last = split_text(text)
            for piece in pieces:
                yield piece, False
            yield last, True


def split_text(text: str, longest: int = LONGEST_PIECE) -> Iterator[str]:
    """Yield ``text`` in pieces of at most ``longest`` characters, cut before white space.

    Tokens of a text mostly begin with the space before a word, so that they stay the same.
    """
    start = 0
    while len(text) - start > longest:
        end = _find_cut(text, start, start + longest)
        yield text[start:end]
        start = end
    yield text[start:]


def _find_cut(text: str, start: int, end: int) -> int:
    """Where to cut ``text`` between ``start`` and ``end``: before white space near the end.

    A script without any is cut anywhere.
    """
    for cut in range(end, max(start, end - LONGEST_WORD), -1):
        if text[cut - 1 : cut].strip() and not text[cut : cut + 1].strip():
            return cut
    return end


def require_readable(sources: Iterable[str]) -> None:
    """Read the beginning of every source; InputError if one cannot be read.

    It is for what comes before a long piece of work.
    """
    for source in sources:
        for _ in read_items(source, longest_line=LONGEST_PIECE):
            break


def read_items(source: str, longest_line: int | None = None) -> Iterator[Item]:
    """Yield the lines of a .txt file, or the rows of another source, in order.

    Args:
        source: as :func:`read_documents` has it.
        longest_line: characters of a line that come at once; None: all of it.

    Raises:
        InputError: the source cannot be read.
    """
    path = Path(source)
    try:
        if path.suffix == ".txt":
            yield from _read_lines(path, longest_line)
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(source)
        else:
            rows = _read_parquet(path) if path.suffix == ".parquet" else _load_dataset(source)
            for number, row in enumerate(rows, 1):
                yield Item(f"{source}, row {number}", None, row)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        # Not UTF-8, and whatever is wrong with a parquet file, are ValueErrors.
        reason = " ".join(str(error).split())
        raise InputError(
            f"found {source} unreadable as text ({reason}), expected UTF-8 {', '.join(LOCAL)}"
        ) from error


def _read_lines(path: Path, longest: int | None) -> Iterator[Item]:
    """Yield the lines of a .txt file, those of more than ``longest`` characters in pieces."""
    with path.open(encoding=ENCODING) as file:
        number = 1
        rest = ""
        while piece := file.readline(-1 if longest is None else longest):
            ends_here = piece.endswith("\n") or longest is None or len(piece) < longest
            text = rest + piece
            cut = len(text) if ends_here else _find_cut(text, 0, len(text) - 1)
            yield Item(f"{path}, line {number}", text[:cut], None)
            rest = text[cut:]
            number += ends_here
        if rest:
            yield Item(f"{path}, line {number}", rest, None)


def _read_jsonl(source: str) -> Iterator[Item]:
    """Yield every row of a .jsonl file; blank lines are no rows."""
    with Path(source).open(encoding=ENCODING) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{source}, line {number}"
                yield Item(place, None, _parse_json(line, place))


def _parse_json(line: str, place: str) -> object:
    """Return the value in ``line``; InputError that names the ``place`` if it is no JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"found no JSON in {place} ({error.msg} at column {error.colno}): repair it"
        ) from error
    except RecursionError as error:
        raise InputError(f"found JSON nested too deeply in {place}: repair it") from error


def _read_parquet(path: Path) -> Iterator[object]:
    """Yield the rows of a parquet file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingPackage(
            f"reading {path} needs the datasets package: pip install 'hf-kernel-ffn[distill]'"
        ) from error
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                yield from batch.to_pylist()
    except ArrowException as error:  # of which some are no ValueError
        raise ValueError(str(error)) from error


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


def get_text(item: Item, text_field: str) -> str:
    """Return the text of the row in ``item``; InputError that names its place if it has none."""
    fields = item.row if isinstance(item.row, dict) else {}
    text = fields.get(text_field)
    if isinstance(text, str):
        return text
    if MESSAGES in fields:
        raise InputError(
            f"found {MESSAGES} in {item.place}, expected a text field {text_field!r}: read them "
            "through the chat template by --chat (in a recipe: data.chat)"
        )
    names = ", ".join(repr(name) for name in list(fields)[:MOST_FIELDS]) or "no fields"
    raise InputError(
        f"found no text field {text_field!r} in {item.place}, which has {names}: name the right "
        "one by --text-field (in a recipe: data.text_field)"
    )
