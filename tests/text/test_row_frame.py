"""Rows begin and end as the tokenizer begins and ends a text."""

import pytest
import torch

from hf_kernel_ffn import InputError
from hf_kernel_ffn.text.packing import PackedText, pack_blocks, read_token_ids
from hf_kernel_ffn.text.prediction import mask_tokens
from hf_kernel_ffn.text.row_frame import RowFrame, encode_once, find_row_frame

CLS, SEP, BOS, MASK = 1, 2, 3, 4


class Framed:
    """A tokenizer of letters that puts special tokens around a text."""

    eos_token_id = None

    def __init__(self, prefix, suffix):
        self.prefix, self.suffix = prefix, suffix

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            rows = [self(one, add_special_tokens)["input_ids"] for one in text]
            return {"input_ids": rows}
        ids = [10 + ord(letter) % 80 for letter in text]
        return {"input_ids": [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids}


FRAMES = [([], []), ([BOS], []), ([CLS], [SEP])]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a line of some letters\n" * 20)
    return str(file)


@pytest.mark.parametrize("prefix, suffix", FRAMES)
def test_the_frame_is_what_the_tokenizer_puts_around_a_text(prefix, suffix):
    assert find_row_frame(Framed(prefix, suffix)) == RowFrame(prefix, suffix)


@pytest.mark.parametrize("prefix, suffix", FRAMES)
def test_every_row_has_the_frame_and_no_token_is_lost(prefix, suffix, source):
    tokenizer = Framed(prefix, suffix)
    rows = list(pack_blocks(tokenizer, [source], 16))
    last = 16 - len(suffix)
    texts = [row[len(prefix) : last].tolist() for row in rows]
    for row in rows:
        assert row[: len(prefix)].tolist() == prefix and row[last:].tolist() == suffix
    bare = [token for row in pack_blocks(Framed([], []), [source], 4) for token in row.tolist()]
    joined = [token for text in texts for token in text]
    assert joined == bare[: len(joined)]
    assert read_token_ids(tokenizer, [source], 16, 64).shape == (4, 16)


@pytest.mark.parametrize("prefix, suffix", FRAMES)
def test_a_distillation_reads_the_same_rows(prefix, suffix, source):
    tokenizer = Framed(prefix, suffix)
    packed = PackedText(tokenizer, [source], 16)
    for row in list(pack_blocks(tokenizer, [source], 16))[:5]:
        assert torch.equal(next(packed), row)


def test_special_tokens_are_never_masked():
    ids = torch.full((200, 10), 50)
    ids[:, 0], ids[:, -1] = CLS, SEP
    masked = mask_tokens(ids, MASK, share=0.5, frame=RowFrame([CLS], [SEP]))["input_ids"]
    assert (masked[:, 0] == CLS).all() and (masked[:, -1] == SEP).all()
    assert ((masked == MASK).sum(1) == 4).all()


def test_rows_shorter_than_the_frame_are_refused(source):
    with pytest.raises(InputError, match="found rows of 2 tokens"):
        list(pack_blocks(Framed([CLS], [SEP]), [source], 2))


def test_a_tokenizer_that_changes_the_text_itself_has_no_frame():
    class Odd(Framed):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [7] if add_special_tokens else [8]}

    assert find_row_frame(Odd([], [])) == RowFrame([], [])


@pytest.mark.parametrize("prefix, suffix", FRAMES)
def test_special_tokens_that_are_typed_in_are_not_put_twice(prefix, suffix):
    class Reads(Framed):
        """A tokenizer that takes its own special tokens out of a text, as those of the library."""

        def __call__(self, text, add_special_tokens=True):
            start, end = ("^" * text.startswith("^"), "$" * text.endswith("$"))
            ids = super().__call__(text.strip("^$"), add_special_tokens=False)["input_ids"]
            ids = [*(prefix if start else []), *ids, *(suffix if end else [])]
            return {"input_ids": [*prefix, *ids, *suffix] if add_special_tokens else ids}

    tokenizer = Reads(prefix, suffix)
    expected = encode_once(tokenizer, "hello")
    assert expected[: len(prefix)] == prefix
    for text in ("^hello", "hello$", "^hello$"):
        assert encode_once(tokenizer, text) == expected
