"""Prompts made from templates, each with a right and a wrong next token."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from hf_kernel_ffn.checkpoint_code.errors import InputError
from hf_kernel_ffn.reading.graph.targets import find_token

NOUNS = ("key", "dog", "boy", "book", "tree", "bird", "horse", "girl", "ship", "door")
PLACES = ("house", "garden", "river", "window", "table", "road", "church", "school")
NAMES = ("John", "Mary", "Tom", "Jack", "Anne", "Paul", "Peter", "Alice", "Henry", "Jane")
SERIES = tuple(
    tuple(series.split())
    for series in (
        "one two three four five six seven eight nine ten eleven twelve",
        "first second third fourth fifth sixth seventh eighth ninth tenth",
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "January February March April May June July August September October November December",
        "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    )
)
OPPOSITES = (
    *(("hot", "cold"), ("big", "small"), ("old", "young"), ("up", "down"), ("day", "night")),
    *(("good", "bad"), ("black", "white"), ("first", "last"), ("long", "short"), ("in", "out")),
)


class Question(NamedTuple):
    """A prompt with two next tokens."""

    prompt: str
    right: str
    wrong: str


def make_agreement(rng: random.Random) -> Question:
    """A subject, a place between, and the verb's number."""
    noun = rng.choice(NOUNS)
    is_plural = rng.random() < 0.5
    place = rng.choice(PLACES) + ("" if is_plural else "s")
    prompt = f"The {noun}{'s' if is_plural else ''} near the {place}"
    return Question(prompt, *((" are", " is") if is_plural else (" is", " are")))


def make_names(rng: random.Random) -> Question:
    """Two names, of which the one that is not repeated comes next."""
    first, second = rng.sample(NAMES, 2)
    place = rng.choice(PLACES)
    prompt = f"When {first} and {second} went to the {place}, {second} gave the book to"
    return Question(prompt, f" {first}", f" {second}")


def make_successor(rng: random.Random) -> Question:
    """The next of a series, against the one before."""
    series = rng.choice(SERIES)
    start = rng.randrange(len(series) - 3)
    words = series[start : start + 3]
    return Question(", ".join(words) + ",", f" {series[start + 3]}", f" {words[0]}")


def make_opposite(rng: random.Random) -> Question:
    """The opposite of a word, after two examples, against the word itself."""
    pairs = rng.sample(OPPOSITES, 3)
    lines = [f"The opposite of {one} is {other}." for one, other in pairs[:2]]
    word, other = pairs[2]
    return Question(" ".join([*lines, f"The opposite of {word} is"]), f" {other}", f" {word}")


TASKS: dict[str, Callable[[random.Random], Question]] = {
    "agreement": make_agreement,
    "names": make_names,
    "successor": make_successor,
    "opposites": make_opposite,
}


def make_questions(
    tokenizer: PreTrainedTokenizerBase, task: str, count: int, seed: int
) -> list[Question]:
    """Different questions of one task whose answers are one token each."""
    rng = random.Random(f"{task} {seed}")
    questions: dict[Question, None] = {}
    for _ in range(100 * count):
        question = TASKS[task](rng)
        try:
            find_token(tokenizer, question.right)
            find_token(tokenizer, question.wrong)
        except InputError:
            continue
        questions[question] = None
        if len(questions) == count:
            break
    return list(questions)
