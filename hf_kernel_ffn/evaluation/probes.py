"""What a language model still knows: multiple-choice questions answered by the probabilities of their choices."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError


def load_questions(file: str | Path) -> list[dict]:
    """The questions of a JSON-lines file, each ``{"context": str, "choices": [str, …], "answer": index of the right one}``.

    Raises:
        InputError: the file cannot be read, holds no question, or has a line that is none.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:  # not UTF-8 is a ValueError
        reason = " ".join(str(error).split())
        raise InputError(
            f"found {file} unreadable as text ({reason}), expected UTF-8 JSON lines"
        ) from error
    questions = [
        _question(line, f"{file}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not questions:
        raise InputError(
            f"found no question in {file}, expected one a line: make some by scripts/experiments/make_cloze.py"
        )
    return questions


def _question(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"found no JSON in {where} ({error.msg}), expected a question: repair it"
        ) from error
    if not isinstance(row, dict) or not {"context", "choices", "answer"} <= row.keys():
        raise InputError(
            f"found no question in {where}, expected an object with context, choices and answer: repair it"
        )
    context, choices, answer = row["context"], row["choices"], row["answer"]
    if not _is_text(context):
        raise InputError(f"found context {context!r} in {where}, expected some text: repair it")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise InputError(
            f"found choices {choices!r} in {where}, expected a list of two texts or more: repair it"
        )
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(
            f"found answer {answer!r} in {where}, expected an integer from 0 to {len(choices) - 1}: repair it"
        )
    return row


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


@torch.no_grad()
def multiple_choice(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: list[dict], batch_size: int = 32
) -> dict[str, Any]:
    """How ``model``, any causal language model, answers ``questions``: for each the choice with the highest log-probability
    after the context and a space. That is the total over the choice's tokens: it is how likely the text itself is, however a
    tokenizer cuts it. A mean would favour long words, whose last tokens follow from their first ones.

    Args:
        questions: as :func:`load_questions` gives them, at least one. Contexts beyond the model's positions are cut on the left.
        batch_size: choices in one forward pass. The model is put in eval mode.

    Returns:
        ``questions``, how many; ``accuracy``, the share answered rightly; and ``choices``, the indices chosen, so that two
        models' answers can be compared.
    """
    model.eval()
    device = model.get_input_embeddings().weight.device
    limit = getattr(model.config, "max_position_embeddings", None)
    rows = [row for question in questions for row in _rows(tokenizer, question, limit)]
    scores = [0.0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # little padding
    for first in range(0, len(rows), batch_size):
        batch = by_length[first : first + batch_size]
        ids = pad_sequence([torch.tensor(rows[i][0]) for i in batch], batch_first=True).to(device)
        mask = pad_sequence(
            [torch.ones(len(rows[i][0]), dtype=torch.long) for i in batch], batch_first=True
        ).to(device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for i, row in zip(batch, logits):
            tokens, start = rows[i]
            targets = torch.tensor(tokens[start:], device=row.device)
            log_probabilities = row[start - 1 : len(tokens) - 1].float().log_softmax(-1)
            scores[i] = log_probabilities.gather(-1, targets[:, None]).sum().item()
    own = iter(scores)
    answers = [[next(own) for _ in question["choices"]] for question in questions]
    chosen = [max(range(len(answer)), key=answer.__getitem__) for answer in answers]
    right = sum(choice == question["answer"] for choice, question in zip(chosen, questions))
    return {"questions": len(questions), "accuracy": right / len(questions), "choices": chosen}


def _rows(
    tokenizer: PreTrainedTokenizerBase, question: dict, limit: int | None
) -> list[tuple[list[int], int]]:
    """For each choice the token ids of context and choice, and where the choice starts."""
    texts = [f"{question['context']} {choice}" for choice in question["choices"]]
    encoded = tokenizer([question["context"], *texts])["input_ids"]
    # A token may span context and choice. What all have in common is context for certain, and makes no difference.
    start = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*encoded))))
    cut = (
        max(0, max(map(len, encoded)) - limit) if limit else 0
    )  # one for all choices: they follow the same context
    return [(ids[cut:], max(1, start - cut)) for ids in encoded[1:]]
