"""What a language model still knows: multiple-choice questions answered by the probabilities of
their choices."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from ..text.inputs import find_longest_row


def load_questions(file: str | Path) -> list[dict]:
    """Load the questions of a JSON-lines file, each ``{"context": str, "choices": [str, …],
    "answer": index of the right one}``.

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
        _parse_question(line, f"{file}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not questions:
        raise InputError(
            f"found no question in {file}, expected one a line: "
            "make some by scripts/experiments/make_cloze.py"
        )
    return questions


@torch.no_grad()
def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict],
    batch_size: int = 32,
) -> dict:
    """Let ``model``, any causal language model, answer ``questions``.

    It chooses what has the highest log-probability after the context and a space. That is the total
    over the choice's tokens: how likely the text itself is, however a tokenizer cuts it. A mean
    would favour long words, whose last tokens follow from their first ones.

    Args:
        model: put in eval mode.
        questions: as :func:`load_questions` gives them, at least one. Contexts beyond the model's
            positions are cut on the left.
        batch_size: choices in one forward pass.

    Returns:
        ``questions``, how many; ``accuracy``, the share answered rightly; and ``choices``, the
        indices chosen, so that two models' answers can be compared.
    """
    model.eval()
    limit = find_longest_row(model)
    rows = [row for question in questions for row in _encode(tokenizer, question, limit)]
    scores = _score(model, rows, batch_size)

    choices = []
    first = 0
    for question in questions:
        count = len(question["choices"])
        choices.append(max(range(count), key=scores[first : first + count].__getitem__))
        first += count
    right = sum(
        choice == question["answer"] for choice, question in zip(choices, questions, strict=True)
    )
    return {"questions": len(questions), "accuracy": right / len(questions), "choices": choices}


class _Row(NamedTuple):
    """A context and one of its choices."""

    tokens: list[int]
    start: int
    """Where the choice starts."""


def _encode(tokenizer: PreTrainedTokenizerBase, question: dict, limit: int | None) -> list[_Row]:
    """Encode each choice behind its context, in no more than ``limit`` tokens."""
    texts = [f"{question['context']} {choice}" for choice in question["choices"]]
    encoded = tokenizer([question["context"], *texts])["input_ids"]
    # A token may span context and choice. What all have in common is context for certain, and makes
    # no difference.
    columns = zip(*encoded, strict=False)
    start = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    # One cut for all choices: they follow the same context.
    cut = max(0, max(map(len, encoded)) - limit) if limit else 0
    return [_Row(ids[cut:], max(1, start - cut)) for ids in encoded[1:]]


def _score(model: PreTrainedModel, rows: list[_Row], batch_size: int) -> list[float]:
    """The log-probability of every row's choice after its context."""
    scores = [0.0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))  # little padding
    for first in range(0, len(rows), batch_size):
        batch = by_length[first : first + batch_size]
        logits = _run_padded(model, [rows[i].tokens for i in batch])
        for i, row_logits in zip(batch, logits, strict=True):
            tokens, start = rows[i]
            answers = torch.tensor(tokens[start:], device=logits.device)
            log_probabilities = row_logits[start - 1 : len(tokens) - 1].float().log_softmax(-1)
            scores[i] = log_probabilities.gather(-1, answers[:, None]).sum().item()
    return scores


def _run_padded(model: PreTrainedModel, token_lists: list[list[int]]) -> Tensor:
    """Logits (rows, longest, vocabulary) of rows padded on the right."""
    device = cast(nn.Embedding, model.get_input_embeddings()).weight.device
    rows = [torch.tensor(tokens) for tokens in token_lists]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    output = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return output.logits


def _parse_question(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"found no JSON in {where} ({error.msg}), expected a question: repair it"
        ) from error
    if not isinstance(row, dict) or not {"context", "choices", "answer"} <= row.keys():
        raise InputError(
            f"found no question in {where}, "
            "expected an object with context, choices and answer: repair it"
        )

    context = row["context"]
    choices = row["choices"]
    answer = row["answer"]
    if not _is_text(context):
        raise InputError(f"found context {context!r} in {where}, expected some text: repair it")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise InputError(
            f"found choices {choices!r} in {where}, expected a list of two texts or more: repair it"
        )
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(
            f"found answer {answer!r} in {where}, "
            f"expected an integer from 0 to {len(choices) - 1}: repair it"
        )
    return row


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
