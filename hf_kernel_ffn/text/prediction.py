"""What a language model predicts in a text: every next token, or the tokens masked in it.

The model's class decides which.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..checkpoint_code.errors import InputError
from .inputs import Inputs, choose_input_names
from .row_frame import RowFrame, find_row_frame

MASKED_SHARE = 0.15
"""Share of a row's tokens that are masked (Devlin et al. 2019, arXiv:1810.04805, §3.1).

Here all of them are replaced by the mask token.
"""
NO_FRAME = RowFrame([], [])
"""Rows that are text from end to end."""
NO_LABEL = -100
"""The label of a token that is not predicted, which transformers' losses leave out."""


def predicts_masked(model: PreTrainedModel) -> bool:
    """Return whether the stock ``model`` is a masked language model.

    One without a language head counts as a model of next tokens.
    """
    is_masked_head = type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    return is_masked_head and not model.config.is_encoder_decoder


def require_mask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the id of the mask token that ``model`` needs; InputError if there is none."""
    mask_token_id = getattr(tokenizer, "mask_token_id", None)
    if mask_token_id is None:
        raise InputError(
            f"found a {type(model).__name__} and no mask token, "
            "expected the tokenizer of a masked language model: give its own"
        )
    return mask_token_id


def require_head(model: PreTrainedModel) -> None:
    """InputError if ``model`` is a bare one, which predicts nothing.

    T5 with its head is its own base model.
    """
    if model.base_model is model and model.get_output_embeddings() is None:
        raise InputError(
            f"found a {type(model).__name__}, which predicts no tokens, expected a language model: "
            "load it with its head"
        )


def require_text_input(model: PreTrainedModel) -> None:
    """InputError if ``model`` reads images or sounds, or cannot do without them."""
    others = choose_input_names(model) - {"input_ids"}
    if model.main_input_name == "input_ids" and not others:
        return
    names = ", ".join(sorted(others)) or model.main_input_name
    raise InputError(
        f"found a {type(model).__name__} for a text, which reads {names}, expected a model that "
        "reads token ids alone: leave the text out, or give its own inputs in Python"
    )


def make_inputs_for_prediction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    ids: Tensor,
    seed: int | str = 0,
) -> Inputs:
    """Return what the stock ``model`` reads to predict tokens of a text.

    Args:
        ids: (rows, length) token ids of the text.
        seed: of the masks.

    Returns:
        ``ids``; for a masked language model what :func:`mask_tokens` makes of them.

    Raises:
        InputError: the model does not read text; masks are needed, and the tokenizer is None or
            has no mask token; or there are ids (on the CPU) that the model has no embedding of.
    """
    require_text_input(model)
    require_embedded(model, ids)
    if not predicts_masked(model):
        return ids
    mask_token_id = require_mask(model, tokenizer)
    if isinstance(seed, str):
        seed = random.Random(seed).getrandbits(63)
    frame = NO_FRAME if tokenizer is None else find_row_frame(tokenizer).fit(ids)
    return mask_tokens(ids, mask_token_id, seed, frame=frame)


def require_embedded(model: PreTrainedModel, ids: Tensor) -> None:
    """InputError if ``ids``, on the CPU, has one that ``model`` has no embedding of.

    Those on another device would have to be waited for.
    """
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if size is None or ids.device.type != "cpu" or not ids.numel():
        return
    largest = int(ids.max())
    if largest >= size:
        raise InputError(
            f"found token {largest} in the text, expected numbers below {size}, the vocabulary of "
            "the model: give its own tokenizer"
        )


def mask_tokens(
    ids: Tensor,
    mask_token_id: int,
    seed: int = 0,
    share: float = MASKED_SHARE,
    *,
    frame: RowFrame = NO_FRAME,
) -> dict[str, Tensor]:
    """Mask a ``share`` of every row of ``ids`` (rows, length), at least one token.

    Args:
        frame: special tokens around the text of each row, which are never masked.

    Returns:
        ``input_ids`` and ``labels``, (rows, length) each: the masked text, and what is under the
        masks, elsewhere -100.
    """
    length = frame.count_text_tokens(ids.shape[1])
    count = max(1, round(share * length))
    first = len(frame.prefix)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(len(ids), length, generator=generator).argsort(-1)
    is_masked = torch.zeros(ids.shape, dtype=torch.bool)
    is_masked.scatter_(1, order[:, :count] + first, True)
    is_masked = is_masked.to(ids.device)
    return {
        "input_ids": ids.masked_fill(is_masked, mask_token_id),
        "labels": ids.masked_fill(~is_masked, NO_LABEL),
    }


def select_predicting_logits(logits: Tensor, inputs: Inputs) -> Tensor:
    """Return those of ``logits`` (rows, length, vocabulary) that predict something in ``inputs``.

    Returns:
        all of them; where there are labels (predicted tokens, vocabulary).
    """
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if labels is None:
        return logits
    return logits[labels.to(logits.device) != NO_LABEL]


def logits_with_answers(logits: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return those of ``logits`` (rows, length, vocabulary) whose answer is known, and the answers.

    Returns:
        (…, vocabulary) logits and (…) token ids: with labels the predicted tokens in one row,
        else every token but the first in a row.
    """
    if isinstance(inputs, Mapping) and "labels" in inputs:
        labels = inputs["labels"].to(logits.device)
        return select_predicting_logits(logits, inputs), labels[labels != NO_LABEL]
    ids = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
    return logits[:, :-1], ids[:, 1:].to(logits.device)
