"""Text to blocks of token ids: three file formats, packing, sampling, and what cannot be read."""

import copy
import json
import sys
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_kernel_ffn import InputError
from hf_kernel_ffn.checkpoint_code.errors import MissingPackage
from hf_kernel_ffn.text import packing
from hf_kernel_ffn.text.documents import LONGEST_PIECE, read_documents, split_text
from hf_kernel_ffn.text.packing import (
    CHARACTERS_AT_ONCE,
    SPREAD,
    pack_blocks,
    read_token_ids,
    stream_tokens,
)
from hf_kernel_ffn.text.text_format import TextFormat

ROWS = ["A whale\nof a tale.", "Once – upon a time,\n\n", "the end"]


@pytest.fixture
def write(tmp_path):
    """Save rows in one of the formats, the text in ``field``; as .txt all in one document."""

    def to(kind, rows=ROWS, field="text"):
        file = tmp_path / f"rows.{kind}"
        if kind == "txt":
            file.write_text("".join(rows), encoding="utf-8")
        elif kind == "jsonl":
            lines = [json.dumps({"number": i, field: row}) for i, row in enumerate(rows)]
            file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")  # blank lines are no rows
        else:
            pq.write_table(
                pa.table({"number": range(len(rows)), field: pa.array(rows, pa.string())}), file
            )
        return str(file)

    return to


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("field", ["text", "body"])
def test_a_row_is_a_document(write, kind, field):
    assert list(read_documents(write(kind, field=field), field)) == [(row, True) for row in ROWS]


def test_a_txt_file_is_one_document(write):
    pieces = list(read_documents(write("txt")))
    assert "".join(text for text, _ in pieces) == "".join(ROWS)
    assert not any(ends for _, ends in pieces)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_end_token_stands_after_every_row(write, tokenizer, kind):
    expected = [i for row in ROWS for i in [*ids_of(tokenizer, row), tokenizer.eos_token_id]]
    assert list(stream_tokens(tokenizer, [write(kind)])) == expected


def test_no_end_token_where_the_tokenizer_has_none(write, tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    assert list(stream_tokens(endless, [write("jsonl")])) == [
        i for row in ROWS for i in ids_of(tokenizer, row)
    ]


def test_sources_follow_one_another(write, tokenizer):
    sources = [write("parquet"), write("txt"), write("jsonl")]
    expected = [i for source in sources for i in stream_tokens(tokenizer, [source])]
    assert list(stream_tokens(tokenizer, sources)) == expected
    assert torch.equal(
        torch.cat(list(pack_blocks(tokenizer, sources, 5))),
        torch.tensor(expected[: len(expected) // 5 * 5]),
    )


def test_blocks_are_consecutive_tokens_of_the_text(text_file, tokenizer):
    packed = list(pack_blocks(tokenizer, [str(text_file)], 32))
    text = text_file.read_text(encoding="utf-8")
    assert {(block.dtype, block.shape) for block in packed} == {(torch.int64, (32,))}
    read = tokenizer.decode(torch.cat(packed))
    assert text.startswith(read)
    assert len(ids_of(tokenizer, text[len(read) :])) < 32  # no more than one block is dropped


def test_only_as_much_is_read_as_is_used(tmp_path, tokenizer):
    file = tmp_path / "long.txt"
    file.write_bytes(b"All work and no play.\n" * 20_000 + b"\xff")
    assert (
        len(list(islice(pack_blocks(tokenizer, [str(file)], 32), 10))) == 10
    )  # the broken end is far away
    with pytest.raises(InputError, match="UTF-8"):
        list(pack_blocks(tokenizer, [str(file)], 32))


@pytest.mark.parametrize("max_tokens, rows", [(1, 1), (31, 1), (32, 1), (100, 3), (160, 5)])
def test_the_first_blocks_within_the_budget(text_file, tokenizer, max_tokens, rows):
    found = read_token_ids(tokenizer, [str(text_file)], 32, max_tokens)
    assert torch.equal(
        found, torch.stack(list(islice(pack_blocks(tokenizer, [str(text_file)], 32), rows)))
    )


def test_a_short_text_is_read_once(text_file, tokenizer):
    every = torch.stack(list(pack_blocks(tokenizer, [str(text_file)], 32)))
    for spread in (False, True):
        assert torch.equal(
            read_token_ids(tokenizer, [str(text_file)], 32, 10**6, spread=spread), every
        )


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_spread_sample_covers_the_text_evenly(text_file, tokenizer, rows):
    every = list(pack_blocks(tokenizer, [str(text_file)], 32))[: rows * SPREAD]
    sample = read_token_ids(tokenizer, [str(text_file)], 32, rows * 32, spread=True)
    assert sample.shape == (rows, 32)
    where = [next(i for i, block in enumerate(every) if torch.equal(block, row)) for row in sample]
    steps = [after - before for before, after in zip(where, [*where[1:], len(every)])]
    assert where[0] == 0 and max(steps) - min(steps) <= 1


def refusal(source, tokenizer, text_field="text"):
    with pytest.raises(InputError) as caught:
        list(pack_blocks(tokenizer, [str(source)], 8, TextFormat(text_field)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_missing_file_is_named(tmp_path, tokenizer, kind):
    file = tmp_path / f"nowhere.{kind}"
    assert str(file) in refusal(file, tokenizer)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_an_empty_text_is_refused(write, tokenizer, kind):
    assert "found 0 tokens" in refusal(write(kind, []), tokenizer)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_text_shorter_than_one_sequence_is_refused(write, tokenizer, kind):
    message = refusal(write(kind, ["Hello"]), tokenizer)
    assert "expected at least 8" in message and "longer text" in message


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_text_that_is_not_utf8_is_refused(tmp_path, tokenizer, kind):
    file = tmp_path / f"latin.{kind}"
    file.write_bytes('{"text": "café"}\n'.encode("latin-1") * 100)
    message = refusal(file, tokenizer)
    assert str(file) in message and "UTF-8" in message


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_wrong_text_field_is_named(write, tokenizer, kind):
    message = refusal(write(kind), tokenizer, "content")
    assert "'content'" in message and "text_field" in message


@pytest.mark.parametrize("row", ['{"text": 3}', '{"text": null}', '["text"]', '"text"'])
def test_a_row_without_text_is_named(tmp_path, tokenizer, row):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "fine"}}\n{row}\n')
    assert "line 2" in refusal(file, tokenizer)


@pytest.mark.parametrize("line", ['{"text": "half', "text", "{'text': 'single quotes'}"])
def test_bad_json_is_refused_with_its_line(tmp_path, tokenizer, line):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"text": "fine"}}\n{line}\n')
    message = refusal(file, tokenizer)
    assert str(file) in message and "line 2" in message


@pytest.mark.parametrize("damage", ["not parquet", "truncated", "overwritten"])
def test_a_damaged_parquet_file_is_refused(write, tmp_path, tokenizer, damage):
    content = (tmp_path / write("parquet", ROWS * 1000)).read_bytes()
    file = tmp_path / "damaged.parquet"
    if damage == "overwritten":  # the footer is whole, the pages are not
        file.write_bytes(content[:4] + b"\xff" * 400 + content[404:])
    else:
        file.write_bytes(b"PAR?" if damage == "not parquet" else content[: len(content) // 2])
    assert str(file) in refusal(file, tokenizer)


@pytest.mark.parametrize("name", ["rows.csv", "rows", "."])
def test_another_kind_of_file_is_refused(tmp_path, tokenizer, name):
    (tmp_path / "rows.csv").write_text("text\nhello\n")
    (tmp_path / "rows").write_text("hello")
    assert ".txt, .jsonl, .parquet" in refusal(tmp_path / name, tokenizer)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_folder_is_no_text(tmp_path, tokenizer, kind):
    (tmp_path / f"folder.{kind}").mkdir()
    assert f"folder.{kind}" in refusal(tmp_path / f"folder.{kind}", tokenizer)


def test_a_dataset_out_of_reach_is_named(tokenizer):
    assert "'no-such/dataset:train'" in refusal("no-such/dataset:train", tokenizer)


@pytest.mark.parametrize(
    "source, module", [("rows.parquet", "pyarrow.parquet"), ("no-such/dataset", "datasets")]
)
def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch, source, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage, match=r"pip install 'hf-kernel-ffn\[distill\]'") as caught:
        list(read_documents(source))
    assert isinstance(caught.value, InputError)
    assert isinstance(caught.value, ImportError)


# long lines, marks, empty rows


def write_kind(folder, kind, rows):
    file = folder / f"long.{kind}"
    if kind == "txt":
        file.write_text("".join(rows), encoding="utf-8")
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    else:
        pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), file)
    return str(file)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_long_line_or_row_is_read_in_pieces(tmp_path, tokenizer, kind, monkeypatch):
    """As the tokens of it whole, by tokenizers that cut before white space."""
    words = " ".join(f"whale{number}" for number in range(20_000))
    source = write_kind(tmp_path, kind, [words, " the end"])
    longest = []
    encode = packing.encode_pieces

    def watched(tokenizer, pieces):
        longest.append(max(len(text) for text, _ in pieces))
        return encode(tokenizer, pieces)

    monkeypatch.setattr(packing, "encode_pieces", watched)
    pieces = list(read_documents(source))
    expected = words + " the end"
    assert "".join(text for text, _ in pieces) == expected
    assert sum(ends for _, ends in pieces) == (0 if kind == "txt" else 2)
    found = list(stream_tokens(tokenizer, [source]))
    end = [tokenizer.eos_token_id]
    joined = ids_of(tokenizer, expected)
    if kind != "txt":
        joined = ids_of(tokenizer, words) + end + ids_of(tokenizer, " the end") + end
    assert found == joined
    assert max(longest) <= LONGEST_PIECE + len(" whale19999")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_few_tokens_of_a_long_line_are_read_at_once(tmp_path, tokenizer, kind, monkeypatch):
    """Of a book in one line, or in a row, only as much is tokenised as is asked for."""
    source = write_kind(tmp_path, kind, ["a whale of a tale " * 400_000])
    given = []
    encode = packing.encode_pieces

    def watched(tokenizer, pieces):
        given.append(sum(len(text) for text, _ in pieces))
        return encode(tokenizer, pieces)

    monkeypatch.setattr(packing, "encode_pieces", watched)
    assert read_token_ids(tokenizer, [source], 256, 1024).shape == (4, 256)
    assert sum(given) <= CHARACTERS_AT_ONCE + LONGEST_PIECE < 400_000 * 18


def test_a_script_without_spaces_is_cut_anywhere():
    text = "鯨" * 10_000
    pieces = list(split_text(text, 3_000))
    assert "".join(pieces) == text and max(map(len, pieces)) == 3_000
    assert list(split_text("")) == [""]
    assert list(split_text(" " * 10, 4)) == [" " * 4, " " * 4, " " * 2]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_the_mark_of_the_byte_order_is_no_text(tmp_path, tokenizer, kind):
    plain = write_kind(tmp_path, kind, ["A whale."])
    marked = tmp_path / f"marked.{kind}"
    marked.write_bytes(b"\xef\xbb\xbf" + (tmp_path / f"long.{kind}").read_bytes())
    expected = list(stream_tokens(tokenizer, [plain]))
    assert list(stream_tokens(tokenizer, [str(marked)])) == expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_with_nothing_in_them_are_left_out(tmp_path, tokenizer, kind):
    source = write_kind(tmp_path, kind, ["", "A whale.", "  \n", "the end", "\t"])
    assert list(read_documents(source)) == [("A whale.", True), ("the end", True)]
    end = [tokenizer.eos_token_id]
    expected = ids_of(tokenizer, "A whale.") + end + ids_of(tokenizer, "the end") + end
    assert list(stream_tokens(tokenizer, [source])) == expected


def test_a_row_nested_too_deeply_is_refused(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": ' + "[" * 100_000 + "\n")
    with pytest.raises(InputError, match="line 1"):
        list(stream_tokens(tokenizer, [str(file)]))
