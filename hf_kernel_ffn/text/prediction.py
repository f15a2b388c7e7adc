"""What a language model predicts in a text: every next token, or the tokens that are masked in it; its class decides which."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..checkpoint_code.errors import InputError
from .inputs import Inputs

MASKED_SHARE = 0.15
"""Share of a row's tokens that are masked (Devlin et al. 2019, arXiv:1810.04805, §3.1; here all of them by the mask token)."""


def predicts_masked(model: Any) -> bool:
    """Whether the stock ``model`` is a masked language model. One without a language head counts as a model of next tokens."""
    return (
        type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
        and not model.config.is_encoder_decoder
    )


def make_inputs_for_prediction(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, ids: Tensor, seed: int | str = 0
) -> Inputs:
    """What the stock ``model`` reads to predict tokens of a text.

    Args:
        ids: (rows, length) token ids of the text.
        seed: of the masks.

    Returns:
        ``ids``, or from a masked language model :func:`mask_tokens` ones.

    Raises:
        InputError: masks are needed, and the tokenizer is None or has no mask token.
    """
    if not predicts_masked(model):
        return ids
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        raise InputError(
            f"found a {type(model).__name__} and no mask token, expected the tokenizer of a masked language model: give its own"
        )
    return mask_tokens(
        ids, mask, seed if isinstance(seed, int) else random.Random(seed).getrandbits(63)
    )


def mask_tokens(
    ids: Tensor, mask_token_id: int, seed: int = 0, share: float = MASKED_SHARE
) -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` (rows, length): ``ids`` with a ``share`` of every row, at least one token, masked, and what is
    under the masks, elsewhere -100."""
    count = max(1, round(share * ids.shape[1]))
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    under = (
        torch.zeros(ids.shape, dtype=torch.bool).scatter(1, order[:, :count], True).to(ids.device)
    )
    return {
        "input_ids": ids.masked_fill(under, mask_token_id),
        "labels": ids.masked_fill(~under, -100),
    }


def select_predicting_logits(logits: Tensor, asked: Inputs) -> Tensor:
    """Of ``logits`` (rows, length, vocabulary) all that predict something in ``asked``: every one, or where there are labels
    (predicted tokens, vocabulary)."""
    labels = asked.get("labels") if isinstance(asked, Mapping) else None
    return logits if labels is None else logits[labels.to(logits.device) != -100]


def logits_with_answers(logits: Tensor, asked: Inputs) -> tuple[Tensor, Tensor]:
    """Of ``logits`` (rows, length, vocabulary) those of which the answer is known, (…, vocabulary), and the answers (…)."""
    if isinstance(asked, Mapping) and "labels" in asked:
        labels = asked["labels"].to(logits.device)
        return select_predicting_logits(logits, asked), labels[labels != -100]
    ids = asked if isinstance(asked, Tensor) else asked["input_ids"]
    return logits[:, :-1], ids[:, 1:].to(logits.device)
