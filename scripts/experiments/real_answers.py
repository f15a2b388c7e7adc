#!/usr/bin/env python3
"""Compare what a student and its teacher write and answer.

    python scripts/experiments/real_answers.py runs/smollm2-student --teacher runs/smollm2 \
        --text wikitext2-test.txt --out recipes/results/real/smollm2-answers.json

Three comparisons: greedy continuations of the beginnings of 50 rows of every TEXT; greedy answers
to 50 chat prompts, through the tokenizer's chat template where it has one; and the answers to
multiple-choice questions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from real_fidelity import ROW_LENGTH, read_rows
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kernel_ffn import load_student, load_teacher, load_tokenizer
from hf_kernel_ffn.evaluation.generation import compare_continuations, select_prompts
from hf_kernel_ffn.evaluation.probes import load_questions, multiple_choice
from hf_kernel_ffn.storage.files import write_text

PROMPTS = 50


def main(
    student: Annotated[str, typer.Argument(help="folder or hub id of a converted model")],
    teacher: Annotated[str, typer.Option(help="folder or hub id of its stock model")],
    text: Annotated[list[str], typer.Option(help="held-out text; may be given several times")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    chat: Annotated[Path, typer.Option(help="prompts, one a line")] = Path(
        "recipes/text/questions.txt"
    ),
    cloze: Annotated[Path, typer.Option(help="multiple-choice questions")] = Path(
        "recipes/text/cloze.jsonl"
    ),
    questions: Annotated[int, typer.Option(help="how many of them")] = 200,
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    """Compare STUDENT with its teacher, and write the figures to OUT."""
    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(student)
    stock = load_teacher(teacher)
    converted = load_student(student)

    figures: dict[str, Any] = {"continuations": {}}
    for file in text:
        rows = read_rows(tokenizer, file, PROMPTS * ROW_LENGTH, spread=True)
        prompts = select_prompts(stock, rows, PROMPTS)
        figures["continuations"][Path(file).name] = compare_continuations(converted, stock, prompts)
    if tokenizer.chat_template is not None:
        lines = chat.read_text(encoding="utf-8").splitlines()
        figures["chat"] = compare_answers(converted, stock, tokenizer, lines)
    asked = load_questions(cloze)[:questions]
    figures["cloze"] = compare_choices(converted, stock, tokenizer, asked)
    typer.echo(json.dumps(figures, indent=1))
    write_text(out, json.dumps(figures, indent=1) + "\n")


def compare_answers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: list[str],
) -> dict[str, float]:
    """Compare the first tokens that both answer to each of ``lines``, a user's turn."""
    found = []
    for line in lines:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": line}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        found.append(compare_continuations(student, teacher, prompt))
    return {
        "prompts": len(found),
        "new_tokens": found[0]["new_tokens"],
        **{
            name: sum(figures[name] for figures in found) / len(found)
            for name in ("tokens_until_difference", "equal_continuations")
        },
    }


def compare_choices(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict],
) -> dict[str, float]:
    """How many questions each answers rightly, and on how many both choose the same."""
    theirs = multiple_choice(teacher, tokenizer, questions)
    ours = multiple_choice(student, tokenizer, questions)
    same = sum(a == b for a, b in zip(theirs["choices"], ours["choices"], strict=True))
    return {
        "questions": len(questions),
        "teacher_accuracy": theirs["accuracy"],
        "student_accuracy": ours["accuracy"],
        "same_choice": same / len(questions),
    }


if __name__ == "__main__":
    typer.run(main)
