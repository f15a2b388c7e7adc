#!/usr/bin/env python3
"""Make multiple-choice questions from plain text: which name comes next, asked of who has read the
text.

    python scripts/experiments/make_cloze.py books.txt.xz cloze.jsonl --exclude distil.txt

One question a line, {"context": …, "choices": [4 names], "answer": index}, for
hf_kernel_ffn.evaluation.probes. The answer is the name that follows the context in the text, and is
often found together with another name of the context. The other three follow the same word
elsewhere about as often, and are about as frequent in all, but are never found with the names that
give the answer away: neither grammar nor frequency helps, only knowledge of who belongs to whom.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Optional

import typer
from plain_text import read_text

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
SENTENCE = re.compile(r"(?:^|(?<!Mr)(?<!Mrs)(?<!Dr)(?<!St)[.!?][”\"’']? )(?=[“\"‘'A-Z])")
CONTEXT_WORDS = range(40, 81)
CHOICES = 4
ANSWERED = 3
"""Questions that one name may be the answer to, so that no few names decide."""
SIMILAR = 2
"""Times as frequent that a wrong choice may be, or as rare."""
CAPITALS = 20
"""A name occurs so many times as often as the same word without a capital."""
SHORTEST = 4
"""Letters of a name."""


def main(
    text: Annotated[Path, typer.Argument(help=".txt or .txt.xz, one paragraph a line")],
    out: Path,
    exclude: Annotated[
        Optional[Path], typer.Option(help="text whose paragraphs are not asked about")
    ] = None,
    questions: int = 500,
    least: Annotated[int, typer.Option(help="times that a name occurs in the text")] = 100,
    together: Annotated[
        int, typer.Option(help="other paragraphs that have the answer and a name of the context")
    ] = 20,
    seed: int = 0,
) -> None:
    """Write questions about TEXT to OUT."""
    excluded = set(read_paragraphs(exclude)) if exclude else set()
    index = NameIndex(read_paragraphs(text), least, together)
    made = make_questions(index, excluded, questions, random.Random(seed))
    if len(made) < questions:
        raise typer.BadParameter(
            f"found {len(made)} questions in {text}, expected {questions}: "
            "give more text, or lower --least and --together"
        )
    lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in made]
    out.write_text("".join(lines), encoding="utf-8")
    answers = {question["choices"][question["answer"]] for question in made}
    typer.echo(f"{len(made)} questions with {len(answers)} different answers in {out}")


def read_paragraphs(path: Path) -> list[str]:
    """Read one paragraph a line, each once."""
    return list(dict.fromkeys(read_text(path).split("\n")))


class NameIndex:
    """Where in a text names are, and what they follow."""

    def __init__(self, paragraphs: list[str], least: int, together: int):
        self.paragraphs = paragraphs
        self.together = together
        self.count = count_names(paragraphs, least)
        """How often each name occurs."""
        self.found_in: dict[str, set[int]] = {name: set() for name in self.count}
        """Numbers of the paragraphs that have it."""
        self.after: dict[str, Counter[str]] = defaultdict(Counter)
        """How often each name follows a word."""
        for number, paragraph in enumerate(paragraphs):
            for word in WORD.findall(paragraph):
                if word in self.count:
                    self.found_in[word].add(number)
            for before, match in list_followers(paragraph):
                if match.group() in self.count:
                    self.after[before][match.group()] += 1

    def find_cues(self, number: int, context: str, name: str) -> set[str]:
        """Find the names of a context that are often found with ``name`` in other paragraphs than
        its own, of that ``number``."""
        names = {word for word in WORD.findall(context) if word in self.count}
        return {
            cue
            for cue in names
            if len((self.found_in[cue] & self.found_in[name]) - {number}) >= self.together
        }

    def find_others(self, before: str, name: str, context: str, cues: set[str]) -> list[str]:
        """Find the wrong choices: names as frequent as ``name``, in all and after the same word,
        that are never found with a cue."""
        return sorted(
            other
            for other, times in self.after[before].items()
            if is_similar(times, self.after[before][name])
            and is_similar(self.count[other], self.count[name])
            and other.lower() not in context.lower()
            and not any(self.found_in[cue] & self.found_in[other] for cue in cues)
        )


def count_names(paragraphs: list[str], least: int) -> dict[str, int]:
    """Count each name that occurs ``least`` times: words that are hardly ever found without a
    capital."""
    count = Counter(word for paragraph in paragraphs for word in WORD.findall(paragraph))
    return {
        word: times
        for word, times in count.items()
        if times >= least
        and len(word) >= SHORTEST
        and word.istitle()
        and word.isalpha()
        and count[word.lower()] < times / CAPITALS
    }


def is_similar(times: int, others: int) -> bool:
    """Whether two counts are within a factor of SIMILAR."""
    return times <= SIMILAR * others and others <= SIMILAR * times


def list_followers(paragraph: str) -> list[tuple[str, re.Match[str]]]:
    """List words with nothing but a space between them and the word before, each after that."""
    pairs = pairwise(WORD.finditer(paragraph))
    return [
        (first.group(), second)
        for first, second in pairs
        if paragraph[first.end() : second.start()] == " "
    ]


def find_context(paragraph: str, end: int) -> str | None:
    """Find the fewest whole sentences, the last of them cut off at ``end``, that are long
    enough."""
    starts = [match.end() for match in SENTENCE.finditer(paragraph, 0, end)]
    for start in reversed(starts):
        if len(paragraph[start:end].split()) in CONTEXT_WORDS:
            return paragraph[start:end].strip()
    return None


def make_questions(
    index: NameIndex, excluded: set[str], wanted: int, rng: random.Random
) -> list[dict]:
    """Make at most one question a paragraph, at most ``wanted``; the place of the answer goes
    round."""
    answered: Counter[str] = Counter()
    questions: list[dict] = []
    for number in rng.sample(range(len(index.paragraphs)), len(index.paragraphs)):
        if len(questions) == wanted:
            break
        if index.paragraphs[number] in excluded:
            continue
        place = len(questions) % CHOICES
        question = make_question(index, number, place, answered, rng)
        if question is not None:
            answered[question["choices"][place]] += 1
            questions.append(question)
    return questions


def make_question(
    index: NameIndex, number: int, place: int, answered: Counter[str], rng: random.Random
) -> dict | None:
    """Make a question of the paragraph of that ``number`` whose answer stands at ``place``, if the
    paragraph has one."""
    paragraph = index.paragraphs[number]
    for before, match in list_followers(paragraph):
        name = match.group()
        if name not in index.count or answered[name] == ANSWERED:
            continue
        context = find_context(paragraph, match.start())
        if context is None or name.lower() in context.lower():
            continue
        cues = index.find_cues(number, context, name)
        others = index.find_others(before, name, context, cues)
        if cues and len(others) >= CHOICES - 1:
            choices = rng.sample(others, CHOICES - 1)
            choices.insert(place, name)
            return {"context": context, "choices": choices, "answer": place}
    return None


if __name__ == "__main__":
    typer.run(main)
