"""Multiple choice: what is chosen, what cannot be read, and the questions that the project ships
and makes."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from teachers import FAMILIES, RECIPES
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.evaluation.probes import load_questions, multiple_choice

SHIPPED = RECIPES / "text" / "cloze.jsonl"
SCRIPT = RECIPES.parent / "scripts" / "experiments" / "make_cloze.py"
LEAST, TOGETHER = 10, 3
ASKED = [
    {"context": "The detective was Mr.", "choices": ["Watson", "Holmes", "Moriarty"], "answer": 1},
    {"context": "His friend, the doctor, was", "choices": ["Holmes", "Watson"], "answer": 1},
    {
        "context": "The",
        "choices": ["professor was Mr. Moriarty", "professor was Mr. Holmes"],
        "answer": 0,
    },
]


class Rigged(nn.Module):
    """Gives the tokens of ``words`` the logit ``bonus`` wherever it is, and all others 0."""

    def __init__(self, tokenizer, words="", bonus=5.0):
        super().__init__()
        self.embedding = nn.Embedding(len(tokenizer), 1)
        self.logits = torch.zeros(len(tokenizer))
        self.logits[tokenizer(words)["input_ids"]] = bonus
        self.config = PreTrainedConfig()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, **others):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


@pytest.mark.parametrize("bonus, chosen", [(50.0, [1, 0, 1]), (-50.0, [0, 1, 0])])
def test_the_likeliest_choice_is_chosen_wherever_it_stands(tokenizer, bonus, chosen):
    result = multiple_choice(Rigged(tokenizer, " Holmes", bonus), tokenizer, ASKED)
    right = sum(choice == question["answer"] for choice, question in zip(chosen, ASKED))
    assert result == {"questions": 3, "accuracy": pytest.approx(right / 3), "choices": chosen}


def test_a_long_choice_is_as_likely_as_all_its_tokens(tokenizer):
    """Where every token is as likely as any other, the fewest tokens win; a mean over them would
    find a tie."""
    question = {
        "context": "Then came",
        "choices": ["unquestionably", "he", "Nebuchadnezzar"],
        "answer": 1,
    }
    assert len(tokenizer(" he")["input_ids"]) == 1 < len(tokenizer(" unquestionably")["input_ids"])
    assert multiple_choice(Rigged(tokenizer), tokenizer, [question])["choices"] == [1]


def test_a_choice_may_begin_with_another_choice(tokenizer):
    question = {"context": "They sailed to", "choices": ["New York", "New"], "answer": 0}
    assert multiple_choice(Rigged(tokenizer, " York"), tokenizer, [question])["choices"] == [
        1
    ]  # a mean would choose the other


@pytest.fixture(scope="module")
def models(teacher_folder):
    """Random ones whose answers hang on the whole context; GPT-2 has only 64 positions. And a
    converted one."""
    made = {
        family: AutoModelForCausalLM.from_pretrained(teacher_folder(family)) for family in FAMILIES
    }
    stock = AutoModelForCausalLM.from_pretrained(teacher_folder("llama"))
    ids = torch.randint(0, 4096, (8, 64), generator=torch.Generator().manual_seed(0))
    made["student"], _ = convert(
        stock, KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256
    )
    return made


def chosen_one_by_one(model, tokenizer, question):
    """Each choice alone in a batch, without padding, by the model's own loss."""
    context = tokenizer(question["context"])["input_ids"]
    choices = [tokenizer(" " + choice)["input_ids"] for choice in question["choices"]]
    context = context[
        max(0, len(context) + max(map(len, choices)) - model.config.max_position_embeddings) :
    ]
    totals = []
    for choice in choices:
        labels = torch.tensor([[-100] * len(context) + choice])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([context + choice]), labels=labels).loss
        totals.append(-loss.item() * len(choice))
    return totals.index(max(totals))


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("name", [*FAMILIES, "student"])
def test_padding_and_batches_change_nothing(models, tokenizer, name, batch_size):
    questions = [
        *load_questions(SHIPPED)[:12],
        *ASKED,
    ]  # long and short, and not all with four choices
    expected = [chosen_one_by_one(models[name], tokenizer, question) for question in questions]
    assert len(set(expected)) > 1
    models[name].train()
    result = multiple_choice(models[name], tokenizer, questions, batch_size=batch_size)
    assert result["choices"] == expected and not models[name].training


# malformed files

GOOD = {"context": "Once upon a", "choices": ["time", "table"], "answer": 0}


def refusal(file):
    with pytest.raises(InputError) as caught:
        load_questions(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{'context': 'single quotes'}", "no JSON"),
        ('["context", "choices", "answer"]', "no question"),
        ('{"context": "Once", "choices": ["upon", "a"]}', "no question"),
        (json.dumps({**GOOD, "context": " "}), "context ' '"),
        (json.dumps({**GOOD, "context": None}), "context None"),
        (json.dumps({**GOOD, "choices": "ab"}), "choices 'ab'"),
        (json.dumps({**GOOD, "choices": ["time"]}), "choices ['time']"),
        (json.dumps({**GOOD, "choices": ["time", ""]}), "choices ['time', '']"),
        (json.dumps({**GOOD, "choices": ["time", 3]}), "choices ['time', 3]"),
        (json.dumps({**GOOD, "answer": 2}), "answer 2"),
        (json.dumps({**GOOD, "answer": -1}), "answer -1"),
        (json.dumps({**GOOD, "answer": "time"}), "answer 'time'"),
        (json.dumps({**GOOD, "answer": True}), "answer True"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, complaint):
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    message = refusal(file)
    assert "line 3" in message and complaint in message and "expected" in message
    file.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps({**GOOD, 'answer': 1})}\n")
    assert load_questions(file) == [GOOD, {**GOOD, "answer": 1}]


def test_a_file_without_questions_is_refused(tmp_path):
    assert "nowhere" in refusal(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "no question" in refusal(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(
        json.dumps({**GOOD, "context": "café"}, ensure_ascii=False).encode("latin-1")
    )
    assert "UTF-8" in refusal(tmp_path / "latin.jsonl")


# the questions that are shipped


def check_questions(questions):
    """Four choices, none of them given away by the context, and each place right as often as the
    others."""
    for question in questions:
        assert 40 <= len(question["context"].split()) <= 80
        assert len(set(question["choices"])) == 4
        assert not any(
            choice.lower() in question["context"].lower() for choice in question["choices"]
        )
    places = Counter(question["answer"] for question in questions)
    assert max(places.values()) - min(places[place] for place in range(4)) <= 1


def test_the_shipped_questions_are_balanced_and_not_of_the_text_for_distillation():
    questions = load_questions(SHIPPED)
    assert len(questions) == 500 and SHIPPED.stat().st_size < 300_000
    check_questions(questions)
    assert len({question["context"] for question in questions}) == 500
    assert (
        max(Counter(question["choices"][question["answer"]] for question in questions).values())
        <= 3
    )
    distilled_on = (RECIPES / "text" / "books-distil.txt").read_text(encoding="utf-8")
    assert not [question for question in questions if question["context"] in distilled_on]


def test_a_shipped_teacher_knows_more_than_chance(tokenizer):
    teacher = AutoModelForCausalLM.from_pretrained(
        RECIPES / "teachers" / "gpt2", dtype=torch.float32
    )
    result = multiple_choice(teacher, tokenizer, load_questions(SHIPPED)[:100])
    assert 0.45 < result["accuracy"] < 0.95  # chance is 0.25, give or take 0.04


# the script


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Paragraphs of the test text, and a file of every other one."""
    paragraphs = (RECIPES / "text" / "books-test.txt").read_text(encoding="utf-8").split("\n")
    half = tmp_path_factory.mktemp("book") / "half.txt"
    half.write_text("\n".join(paragraphs[::2]), encoding="utf-8")
    return paragraphs, half


def make(out, *options, hash_seed="0", questions=10):
    command = [
        sys.executable,
        SCRIPT,
        RECIPES / "text" / "books-test.txt",
        out,
        "--questions",
        questions,
    ]
    command += ["--least", LEAST, "--together", TOGETHER, *options]
    environment = dict(os.environ, PYTHONHASHSEED=hash_seed)
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory, book):
    out = tmp_path_factory.mktemp("cloze") / "cloze.jsonl"
    done = make(out, "--exclude", book[1])
    assert done.returncode == 0, done.stderr
    return out


def test_the_answer_is_what_follows_in_a_paragraph_not_excluded(made, book):
    questions, (paragraphs, half) = load_questions(made), book
    assert len(questions) == 10
    check_questions(questions)
    excluded = set(half.read_text(encoding="utf-8").split("\n"))
    for question in questions:
        follows = re.compile(
            re.escape(f"{question['context']} {question['choices'][question['answer']]}") + r"\b"
        )
        sources = [paragraph for paragraph in paragraphs if follows.search(paragraph)]
        assert sources and not excluded & set(sources)


def test_only_the_answer_is_found_with_names_of_the_context(made, book):
    words = [
        set(re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", paragraph))
        for paragraph in dict.fromkeys(book[0])
    ]

    def together(*names):
        return sum(set(names) <= paragraph for paragraph in words)

    for question in load_questions(made):
        answer = question["choices"][question["answer"]]
        others = set(question["choices"]) - {answer}
        assert all(together(choice) > 1 and choice.istitle() for choice in question["choices"])
        assert any(
            together(cue, answer) > TOGETHER and not any(together(cue, other) for other in others)
            for cue in set(re.findall(r"\b[A-Z][a-z]{3,}\b", question["context"]))
        )


def test_the_seed_decides(made, book, tmp_path):
    options = ("--exclude", book[1])
    assert make(tmp_path / "again.jsonl", *options, hash_seed="1").returncode == 0
    assert (tmp_path / "again.jsonl").read_bytes() == made.read_bytes()
    assert make(tmp_path / "other.jsonl", *options, "--seed", "1").returncode == 0
    assert (tmp_path / "other.jsonl").read_bytes() != made.read_bytes()


def test_a_text_with_too_few_questions_is_refused(tmp_path):
    done = make(tmp_path / "cloze.jsonl", questions=10_000)
    assert done.returncode == 2 and "expected 10000" in " ".join(done.stderr.split())
    assert not (tmp_path / "cloze.jsonl").exists()
