"""Conversations through a chat template, and the start token as it is asked for."""

import copy
import json
from itertools import islice

import pytest
import torch

from hf_kernel_ffn import InputError
from hf_kernel_ffn.text.chat import read_conversations
from hf_kernel_ffn.text.packing import (
    PackedText,
    TokenReader,
    pack_blocks,
    read_token_ids,
    stream_tokens,
)
from hf_kernel_ffn.text.prediction import require_embedded
from hf_kernel_ffn.text.prompts import encode_prompt, read_chat_prompts
from hf_kernel_ffn.text.row_frame import RowFrame, find_row_frame
from hf_kernel_ffn.text.text_format import BOS_CHOICES, TextFormat

TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
ANSWER = "{% if add_generation_prompt %}[assistant]{% endif %}"
PLAIN_TEMPLATE = TURNS + ANSWER
START_TEMPLATE = "{{ bos_token }}" + PLAIN_TEMPLATE
EVERY_TURN = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
)
CHAT = TextFormat(chat=True)
LONG = "The old man looked at the sea and thought of the fish that he had caught in his youth. "


def talk(number):
    return [
        {"role": "user", "content": f"Question {number}? {LONG}"},
        {"role": "assistant", "content": f"Answer {number}. {LONG}"},
    ]


@pytest.fixture
def make(tokenizer):
    """The shipped tokenizer with a start token of its own and a chat template."""

    def change(template=None, bos="<s>"):
        changed = copy.deepcopy(tokenizer)
        if bos is not None:
            changed.add_special_tokens({"bos_token": bos})
        else:
            changed.bos_token = None
        changed.chat_template = template
        return changed

    return change


@pytest.fixture
def conversations(tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join(json.dumps({"messages": talk(number)}) for number in range(12)))
    return str(file)


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("What is a whale?\n\nWhere is the sea?\nWho is the old man?\n")
    return str(file)


def refusal(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# conversations


def test_rows_are_what_transformers_makes_of_the_conversations(make, conversations):
    tokenizer = make(PLAIN_TEMPLATE)
    expected = []
    for number in range(12):
        rendered = tokenizer.apply_chat_template(talk(number), tokenize=False)
        expected += tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert list(stream_tokens(tokenizer, [conversations], CHAT)) == expected
    rows = torch.cat(list(pack_blocks(tokenizer, [conversations], 32, CHAT))).tolist()
    assert rows == expected[: len(rows)]
    packed = PackedText(tokenizer, [conversations], 32, text_format=CHAT)
    assert torch.cat(list(islice(packed, 3))).tolist() == expected[:96]


def test_a_start_token_of_the_template_stands_once_at_the_beginning_of_a_row(make, conversations):
    tokenizer = make(START_TEMPLATE)
    start = tokenizer.bos_token_id
    assert find_row_frame(tokenizer, CHAT) == RowFrame([start], [])
    for bos in ("auto", "always"):
        rows = read_token_ids(tokenizer, [conversations], 32, 4096, TextFormat(chat=True, bos=bos))
        assert (rows[:, 0] == start).all() and (rows == start).sum() == len(rows) > 10
    without = read_token_ids(
        tokenizer, [conversations], 32, 4096, TextFormat(chat=True, bos="never")
    )
    assert not (without == start).any()


def test_a_token_that_begins_every_turn_is_left_where_it_is(make, conversations):
    tokenizer = make(EVERY_TURN)
    start = tokenizer.bos_token_id
    assert find_row_frame(tokenizer, CHAT) == RowFrame([], [])
    ids = list(stream_tokens(tokenizer, [conversations], CHAT))
    assert ids.count(start) == 24 and ids[0] == start
    # Where it is always to begin a row, it is not put before itself.
    rows = read_token_ids(tokenizer, [conversations], 32, 4096, TextFormat(chat=True, bos="always"))
    assert (rows[:, 0] == start).all()
    assert not ((rows[:, 0] == start) & (rows[:, 1] == start)).any()


def test_lines_and_texts_are_turns_of_a_user(make, questions, tmp_path):
    tokenizer = make(PLAIN_TEMPLATE)
    expected = ["[user]What is a whale?<|end|>[assistant]"]
    found = [text for text, _ in read_conversations(tokenizer, questions)]
    assert found[:1] == expected and len(found) == 3
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "What is a whale?"}))
    assert [text for text, _ in read_conversations(tokenizer, str(rows), "question")] == expected


def test_reading_goes_on_from_a_saved_place(make, conversations):
    tokenizer = make(START_TEMPLATE)
    reader = TokenReader(tokenizer, [conversations], CHAT)
    reader.take(50)
    state = reader.state_dict()
    after = reader.take(40)
    resumed = TokenReader(tokenizer, [conversations], CHAT)
    resumed.load_state_dict(state)
    assert resumed.take(40) == after


def test_without_chat_messages_are_told_to_need_it(make, conversations):
    message = refusal(list, pack_blocks(make(PLAIN_TEMPLATE), [conversations], 32))
    assert "found messages" in message and "--chat" in message and "data.chat" in message


def test_a_missing_template_is_one_line(make, conversations):
    message = refusal(find_row_frame, make(None), CHAT)
    assert "no chat template" in message and "--chat" in message
    assert "no chat template" in refusal(encode_prompt, make(None), "Hello", CHAT)


@pytest.mark.parametrize("messages", [[], "hello", [1], [{"content": "x"}]])
def test_messages_that_are_none_are_named(make, tmp_path, messages):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    message = refusal(list, pack_blocks(make(PLAIN_TEMPLATE), [str(file)], 8, CHAT))
    assert "bad.jsonl, line 1" in message


def test_what_a_template_refuses_is_named(make, conversations):
    strict = "{% if messages|length > 1 %}{{ raise_exception('one turn\nonly') }}{% endif %}x"
    message = refusal(list, pack_blocks(make(strict), [conversations], 8, CHAT))
    assert "one turn only" in message and "line 1" in message


# prompts


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, START_TEMPLATE, EVERY_TURN])
def test_a_prompt_is_what_transformers_makes_of_a_user_turn(make, template):
    tokenizer = make(template)
    turns = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "Hello", CHAT) == expected
    start = tokenizer.bos_token_id
    always = encode_prompt(tokenizer, "Hello", TextFormat(chat=True, bos="always"))
    assert always == (expected if expected[0] == start else [start, *expected])


def test_prompts_end_where_the_answer_begins(make, conversations, questions):
    tokenizer = make(PLAIN_TEMPLATE)
    prompts = read_chat_prompts(tokenizer, conversations, 4, CHAT)
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    assert [text.split("?")[0] for text in texts] == [
        f"[user]Question {number}" for number in (0, 3, 6, 9)
    ]
    assert all(text.endswith("<|end|>[assistant]") for text in texts)
    assert len(read_chat_prompts(tokenizer, questions, 3, CHAT)) == 3
    message = refusal(read_chat_prompts, tokenizer, questions, 4, CHAT)
    assert "found 3 prompts in" in message
    assert "at most 2 tokens" in refusal(
        read_chat_prompts, tokenizer, questions, 1, CHAT, longest=2
    )


# the start token


@pytest.mark.parametrize("bos", BOS_CHOICES)
def test_rows_and_prompts_begin_as_asked(make, text_file, bos):
    tokenizer = make()
    start = tokenizer.bos_token_id
    text_format = TextFormat(bos=bos)
    rows = read_token_ids(tokenizer, [str(text_file)], 16, 256, text_format)
    prompt = encode_prompt(tokenizer, "The sea", text_format)
    bare = tokenizer("The sea")["input_ids"]
    assert (rows[:, 0] == start).all() == (bos == "always")
    assert prompt == ([start, *bare] if bos == "always" else bare)


def test_a_tokenizer_that_adds_it_can_be_kept_from_it(text_file):
    class Adding:
        bos_token_id, eos_token_id = 3, None

        def __call__(self, text, add_special_tokens=True):
            if isinstance(text, list):
                return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}
            ids = [10 + ord(letter) % 80 for letter in text]
            return {"input_ids": [3, *ids] if add_special_tokens else ids}

    source = str(text_file)
    for bos, first in (("auto", 3), ("always", 3), ("never", None)):
        rows = read_token_ids(Adding(), [source], 16, 256, TextFormat(bos=bos))
        assert (rows[:, 0] == 3).all() == (first == 3)
        assert (rows == 3).sum() == (len(rows) if first else 0)
        assert (encode_prompt(Adding(), "sea", TextFormat(bos=bos))[0] == 3) == (first == 3)


def test_no_start_token_cannot_always_be_there(make):
    message = refusal(find_row_frame, make(bos=None), TextFormat(bos="always"))
    assert "no start token" in message and "data.bos" in message
    assert "expected one of auto, always, never" in refusal(TextFormat, bos="sometimes")


# texts that are none for the model


def test_a_text_of_unknown_tokens_is_refused(text_file):
    class Blind:
        unk_token_id, eos_token_id, bos_token_id = 1, None, None

        def __call__(self, text, add_special_tokens=True):
            if isinstance(text, list):
                return {"input_ids": [self(one)["input_ids"] for one in text]}
            return {"input_ids": [1 if letter.isalpha() else 9 for letter in text]}

    message = refusal(list, pack_blocks(Blind(), [str(text_file)], 8))
    assert "unknown tokens" in message and str(text_file) in message


def test_a_text_too_short_for_its_special_tokens_says_so(make, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("The old man looked at the sea.")
    tokenizer = make()
    text_format = TextFormat(bos="always")
    count = len(tokenizer(file.read_text())["input_ids"])
    rows = list(pack_blocks(tokenizer, [str(file)], count + 1, text_format))
    assert len(rows) == 1
    message = refusal(list, pack_blocks(tokenizer, [str(file)], count + 2, text_format))
    assert f"found {count} tokens" in message and "beside 1 special ones" in message


def test_ids_without_an_embedding_are_refused(llama, ids):
    require_embedded(llama, ids)
    beyond = ids.clone()
    beyond[3, 3] = 300
    assert "found token 300 in the text" in refusal(require_embedded, llama, beyond)
