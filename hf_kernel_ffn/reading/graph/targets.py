"""Which logits a graph explains."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...checkpoint_code.errors import InputError
from ..model_parts import decode_tokens, get_described


def find_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of the token ``text``, a leading space included.

    Raises:
        InputError: it is not one token.
    """
    try:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except TypeError:  # a tokenizer that knows no special tokens
        ids = list(tokenizer(text)["input_ids"])
    if len(ids) == 1:
        return int(ids[0])
    parts = ", ".join(repr(decode_tokens(tokenizer, [number])) for number in ids) or "none"
    raise InputError(
        f"found {text!r}, which is {len(ids)} tokens ({parts}), expected one token: "
        "give one of them; most words begin with a space"
    )


def require_token(tokenizer: PreTrainedTokenizerBase, token: str | int, vocabulary: int) -> int:
    """The id of ``token``, text or an id below ``vocabulary``; InputError if it is none."""
    number = find_token(tokenizer, token) if isinstance(token, str) else token
    if not 0 <= number < vocabulary:
        raise InputError(f"found token {number}, expected an id from 0 to {vocabulary - 1}")
    return number


def choose_likely(probabilities: Tensor, most: int, share: float) -> list[int]:
    """The likeliest tokens that together hold ``share`` of ``probabilities``, at most ``most``."""
    best = probabilities.topk(min(most, len(probabilities)))
    before = best.values.cumsum(0) - best.values
    return best.indices[before < share].tolist()


def require_readable(model: PreTrainedModel) -> None:
    """InputError unless ``model`` is a language model whose parts the table of families names."""
    if model.get_output_embeddings() is None:
        raise InputError(
            f"found a {type(model).__name__}, which has no unembedding, expected a causal "
            "language model: load it as one"
        )
    for part in ("attention", "qkv", "attention_out", "final_norm"):
        get_described(model, part)


def measure_probabilities(logits: Tensor) -> Tensor:
    """(vocabulary,) float64 probabilities of ``logits``."""
    return torch.softmax(logits.detach().double(), -1)
