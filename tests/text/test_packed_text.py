"""A text read without end: its order, and that reading goes on from a saved place."""

import json
from collections import Counter
from itertools import islice

import pytest
import torch

from hf_kernel_ffn import InputError
from hf_kernel_ffn.text import packing
from hf_kernel_ffn.text.packing import PackedText, pack_blocks


@pytest.fixture(scope="module")
def sources(text_file, tmp_path_factory):
    """A document by lines and one by rows; some forty sequences of 32 tokens."""
    folder = tmp_path_factory.mktemp("text")
    text = text_file.read_text(encoding="utf-8")
    (folder / "a.txt").write_text(text[:3000], encoding="utf-8")
    rows = [json.dumps({"text": row}) for row in text[3000:4500].split("\n\n")]
    (folder / "b.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return [str(folder / "a.txt"), str(folder / "b.jsonl")]


@pytest.fixture
def read(tokenizer, sources):
    def make(**changes):
        settings = {"length": 32, "shuffle_buffer": 16, "seed": 0}
        return PackedText(tokenizer, sources, **{**settings, **changes})

    return make


def as_tuples(sequences):
    return [tuple(sequence.tolist()) for sequence in sequences]


def test_every_sequence_is_read_once_per_pass_in_another_order(read, sources, tokenizer):
    text = as_tuples(pack_blocks(tokenizer, sources, 32))
    both = as_tuples(islice(read(), 2 * len(text)))
    first, second = both[: len(text)], both[len(text) :]
    assert Counter(first) == Counter(second) == Counter(text)
    assert first != second and text not in (first, second)
    assert as_tuples(islice(read(seed=1), len(text))) != first


def test_a_buffer_of_one_keeps_the_order(read, sources, tokenizer):
    blocks = list(pack_blocks(tokenizer, sources, 32))
    for block, sequence in zip(blocks, read(shuffle_buffer=1), strict=False):
        assert torch.equal(block, sequence) and sequence.dtype == torch.int64


def test_a_text_that_is_too_short_is_refused(read):
    with pytest.raises(InputError, match=r"found \d+ tokens in .*, expected at least 100000"):
        next(read(length=100_000))


@pytest.mark.parametrize("pieces_at_once", [1, 7, 1000])
@pytest.mark.parametrize("buffer", [1, 16, 1000])
def test_reading_goes_on_from_any_place(read, monkeypatch, buffer, pieces_at_once):
    monkeypatch.setattr(packing, "PIECES_AT_ONCE", pieces_at_once)
    count = 110  # two passes and a part of the third
    whole = as_tuples(islice(read(shuffle_buffer=buffer), count))
    text = read(shuffle_buffer=buffer)
    for place in range(count):
        if place % 9 == 0:
            state = text.state_dict()
            tensors = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
            facts = json.dumps({k: v for k, v in state.items() if k not in tensors})
            resumed = read(shuffle_buffer=buffer, seed=7)  # what it was seeded by is in the state
            resumed.load_state_dict({**json.loads(facts), **tensors})
            resumed.seed = 0
            assert as_tuples(islice(resumed, count - place)) == whole[place:]
        next(text)


def test_what_was_read_is_not_tokenised_again(read, sources, monkeypatch):
    encoded = []
    original = packing.encode_pieces

    def noted(tokenizer, pieces):
        encoded.extend(pieces)
        return original(tokenizer, pieces)

    monkeypatch.setattr(packing, "PIECES_AT_ONCE", 5)
    monkeypatch.setattr(packing, "encode_pieces", noted)
    text = read()
    for _ in range(30):
        next(text)
    so_far, state = list(encoded), text.state_dict()
    list(islice(text, 8))
    after = encoded[len(so_far) :]

    encoded.clear()
    resumed = read()
    resumed.load_state_dict(state)
    assert not encoded
    list(islice(resumed, 8))
    assert encoded == after and len(after) < len(so_far)
