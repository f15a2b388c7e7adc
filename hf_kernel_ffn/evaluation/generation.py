"""How far a student writes what its teacher writes: greedy continuations of the same prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..checkpoint_code.errors import InputError
from ..text import prompts as chat_prompts
from ..text.inputs import find_longest_row
from ..text.text_format import TextFormat

PROMPT_TOKENS = 32
"""Tokens of a row that are its prompt: enough to say what the text is about."""
NEW_TOKENS = 32
"""Tokens of a continuation. Longer ones tell little more: after a difference all may differ."""
ENDED = -1
"""Stands behind the end token of a continuation that has ended early."""
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""Settings under which the likeliest token is always next. Those that are not given would be taken
from a model's own generation settings, which may sample and penalise."""


def select_prompts(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    """Take the beginnings of ``count`` rows of ``ids`` (rows, length), evenly spaced.

    Returns:
        (count, PROMPT_TOKENS or, if rows are shorter, length) token ids.

    Raises:
        InputError: ``model`` does not write text, has no room for a continuation, or there are
            fewer rows.
    """
    _require_writer(model, count)
    if count > len(ids):
        raise InputError(
            f"found {len(ids)} rows of text for {count} prompts, expected at least as many: "
            "give more text or fewer prompts"
        )
    length = min(PROMPT_TOKENS, ids.shape[1])
    longest = _find_longest_prompt(model)
    if longest is not None and length > longest:
        raise InputError(
            f"found a model with {longest + NEW_TOKENS} positions, expected at least "
            f"{length + NEW_TOKENS} for a prompt and its continuation: leave the prompts out"
        )
    rows = torch.arange(count) * len(ids) // count
    return ids[rows, :length]


def select_chat_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    count: int,
    text_format: TextFormat,
) -> list[Tensor]:
    """Read ``count`` prompts (length,) of a text that ``model`` is to answer.

    Those that leave it no room for an answer are left out; see
    :func:`hf_kernel_ffn.text.prompts.read_chat_prompts`.

    Raises:
        InputError: ``model`` does not write text, or there are fewer.
    """
    _require_writer(model, count)
    longest = _find_longest_prompt(model)
    return chat_prompts.read_chat_prompts(tokenizer, source, count, text_format, longest=longest)


def _require_writer(model: PreTrainedModel, count: int) -> None:
    """InputError unless ``model`` continues a text."""
    if not model.can_generate():
        raise InputError(
            f"found {count} prompts for a {type(model).__name__}, which does not continue a text, "
            "expected a causal language model: leave the prompts out"
        )


def _find_longest_prompt(model: PreTrainedModel) -> int | None:
    """How many tokens a prompt may have that ``model`` can continue; None: any number."""
    limit = find_longest_row(model)
    return None if limit is None else limit - NEW_TOKENS


@torch.no_grad()
def compare_continuations(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: Sequence[Tensor] | Tensor,
    batch_size: int = 32,
) -> dict[str, float]:
    """Compare what ``student`` and ``teacher`` write after ``prompts``, greedily.

    A continuation has NEW_TOKENS tokens, or ends with the teacher's end token.

    Args:
        prompts: (length,) token ids each; those of one length are continued together.
        batch_size: prompts that are continued at once.

    Returns:
        ``prompts``, how many; ``new_tokens``, the most a continuation has;
        ``tokens_until_difference``, the share of the teacher's tokens before the first that the
        student writes otherwise, mean over prompts; ``equal_continuations``, the share of prompts
        without such a token.
    """
    end_tokens = _find_end_tokens(teacher)
    shares: list[float] = []
    for batch in _group_by_length(prompts, batch_size):
        expected = _continue_greedily(teacher, batch, end_tokens)
        written = _continue_greedily(student, batch, end_tokens)
        length = (expected != ENDED).sum(-1)
        equal = (expected == written).long().cumprod(-1).sum(-1)  # up to the first difference
        shares += (equal.minimum(length) / length).tolist()
    return {
        "prompts": len(shares),
        "new_tokens": NEW_TOKENS,
        "tokens_until_difference": sum(shares) / len(shares),
        "equal_continuations": sum(share == 1 for share in shares) / len(shares),
    }


def _group_by_length(prompts: Sequence[Tensor] | Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield (count, length) batches of prompts of one length, which need no padding."""
    by_length: dict[int, list[Tensor]] = defaultdict(list)
    for prompt in prompts:
        by_length[len(prompt)].append(prompt)
    for group in by_length.values():
        yield from torch.stack(group).split(batch_size)


def _continue_greedily(model: PreTrainedModel, prompts: Tensor, end_tokens: list[int]) -> Tensor:
    """(count, NEW_TOKENS) token ids on the CPU, ENDED behind an end token."""
    prompts = prompts.to(model.device)
    config = GenerationConfig(
        **GREEDY,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=end_tokens or None,
        pad_token_id=end_tokens[0] if end_tokens else 0,
    )
    output = cast(GenerationMixin, model).generate(
        prompts, attention_mask=torch.ones_like(prompts), generation_config=config
    )
    written = cast(Tensor, output)[:, prompts.shape[1] :].cpu()

    ends = torch.isin(written, torch.tensor(end_tokens, dtype=written.dtype)).long()
    is_behind = ends.cumsum(-1) - ends > 0
    written = written.masked_fill(is_behind, ENDED)
    return nn.functional.pad(written, (0, NEW_TOKENS - written.shape[1]), value=ENDED)


def _find_end_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that end a text of ``model``."""
    end = cast(GenerationConfig, model.generation_config).eos_token_id
    if end is None:
        return []
    return [end] if isinstance(end, int) else list(end)
