"""Which logits a graph explains."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...checkpoint_code.errors import InputError
from ..model_parts import READING_PARTS, decode_tokens, get_described


def find_token(tokenizer: PreTrainedTokenizerBase, token: str | int) -> int:
    """The id of ``token``, its text with a leading space included, or the id itself.

    Raises:
        InputError: the text is not one token.
    """
    if isinstance(token, int):
        return token
    ids = list(tokenizer(token, add_special_tokens=False)["input_ids"])
    if len(ids) == 1:
        return int(ids[0])
    parts = ", ".join(repr(decode_tokens(tokenizer, [number])) for number in ids) or "none"
    raise InputError(
        f"found {token!r}, which is {len(ids)} tokens ({parts}), expected one token: "
        "give one of them; most words begin with a space"
    )


def require_known(token: int, vocabulary: int) -> None:
    """InputError unless ``token`` is an id of a ``vocabulary`` of so many."""
    if not 0 <= token < vocabulary:
        raise InputError(f"found token {token}, expected an id from 0 to {vocabulary - 1}")


def choose_likely(probabilities: Tensor, most: int, share: float) -> list[int]:
    """The likeliest tokens that together hold ``share`` of ``probabilities``, at most ``most``."""
    best = probabilities.topk(min(most, len(probabilities)))
    before = best.values.cumsum(0) - best.values
    return best.indices[before < share].tolist()


def require_readable(model: PreTrainedModel) -> None:
    """InputError unless ``model`` is a language model, in float32 or float64, whose parts the table
    of families names."""
    if model.get_output_embeddings() is None:
        raise InputError(
            f"found a {type(model).__name__}, which has no unembedding, expected a causal "
            "language model: load it as one"
        )
    if model.dtype.itemsize < 4:
        raise InputError(
            f"found a model in {model.dtype}, expected float32 or float64: edges of half precision "
            "do not add up; load it in float32"
        )
    for part in READING_PARTS:
        get_described(model, part)


def measure_probabilities(logits: Tensor) -> Tensor:
    """(vocabulary,) float64 probabilities of ``logits``."""
    return torch.softmax(logits.detach().double(), -1)
