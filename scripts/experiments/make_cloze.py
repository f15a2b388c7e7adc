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
import lzma
import random
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Optional

import typer

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
SENTENCE = re.compile(r"(?:^|(?<!Mr)(?<!Mrs)(?<!Dr)(?<!St)[.!?][”\"’']? )(?=[“\"‘'A-Z])")
CONTEXT_WORDS = range(40, 81)
ANSWERED = 3  # by one name at most, so that no few names decide
SIMILAR = 2  # times as frequent at most


def paragraphs_of(path: Path) -> list[str]:
    """One a line, each once."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return list(dict.fromkeys(file.read().split("\n")))


def names_of(paragraphs: list[str], least: int) -> dict[str, int]:
    """How often each name occurs that does so ``least`` times: words that are hardly ever found
    without a capital."""
    count = Counter(word for paragraph in paragraphs for word in WORD.findall(paragraph))
    return {
        w: n
        for w, n in count.items()
        if n >= least and len(w) > 3 and w.istitle() and w.isalpha() and count[w.lower()] < n / 20
    }


def followers(paragraph: str) -> list[tuple[str, re.Match[str]]]:
    """Words with nothing but a space between them and the word before, each after that word."""
    pairs = pairwise(WORD.finditer(paragraph))
    return [(a.group(), b) for a, b in pairs if paragraph[a.end() : b.start()] == " "]


def context_before(paragraph: str, end: int) -> Optional[str]:
    """The fewest whole sentences, the last of them cut off at ``end``, that are long enough."""
    for start in reversed([match.end() for match in SENTENCE.finditer(paragraph, 0, end)]):
        if len(paragraph[start:end].split()) in CONTEXT_WORDS:
            return paragraph[start:end].strip()
    return None


def make_questions(
    paragraphs: list[str],
    excluded: set[str],
    wanted: int,
    least: int,
    together: int,
    rng: random.Random,
) -> list[dict]:
    """At most one question a paragraph, at most ``wanted``; the place of the answer goes round."""
    count = names_of(paragraphs, least)
    found_in: dict[str, set[int]] = {name: set() for name in count}
    after: dict[str, Counter[str]] = defaultdict(Counter)
    for number, paragraph in enumerate(paragraphs):
        for word in WORD.findall(paragraph):
            if word in count:
                found_in[word].add(number)
        for before, match in followers(paragraph):
            if match.group() in count:
                after[before][match.group()] += 1

    def similar(a: int, b: int) -> bool:
        return a <= SIMILAR * b and b <= SIMILAR * a

    def question(number: int, place: int) -> Optional[dict]:
        for before, match in followers(paragraphs[number]):
            name = match.group()
            context = context_before(paragraphs[number], match.start()) if name in count else None
            if context is None or name.lower() in context.lower() or answered[name] == ANSWERED:
                continue
            cues = {word for word in WORD.findall(context) if word in count}
            cues = {
                cue for cue in cues if len((found_in[cue] & found_in[name]) - {number}) >= together
            }
            others = sorted(
                other
                for other, times in after[before].items()
                if similar(times, after[before][name])
                and similar(count[other], count[name])
                and other.lower() not in context.lower()
                and not any(found_in[cue] & found_in[other] for cue in cues)
            )
            if cues and len(others) >= 3:
                choices = rng.sample(others, 3)
                choices.insert(place, name)
                return {"context": context, "choices": choices, "answer": place}
        return None

    answered: Counter[str] = Counter()
    questions: list[dict] = []
    for number in rng.sample(range(len(paragraphs)), len(paragraphs)):
        if len(questions) == wanted:
            break
        if paragraphs[number] not in excluded and (made := question(number, len(questions) % 4)):
            answered[made["choices"][made["answer"]]] += 1
            questions.append(made)
    return questions


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
    excluded = set(paragraphs_of(exclude)) if exclude else set()
    made = make_questions(
        paragraphs_of(text), excluded, questions, least, together, random.Random(seed)
    )
    if len(made) < questions:
        raise typer.BadParameter(
            f"found {len(made)} questions in {text}, expected {questions}: give more text, "
            "or lower --least and --together"
        )
    out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8"
    )
    answers = {row["choices"][row["answer"]] for row in made}
    typer.echo(f"{len(made)} questions with {len(answers)} different answers in {out}")


if __name__ == "__main__":
    typer.run(main)
