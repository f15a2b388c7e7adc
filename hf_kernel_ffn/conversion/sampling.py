"""What a conversion reads: tokens of the model's own making, and the inputs of each FFN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from ..compat import run_with_cache
from ..families.hooks import watch_ffn_input
from ..families.lookup import get_family_name
from ..families.registry import get_architecture
from ..text.inputs import (
    Inputs,
    accepts_argument,
    count_rows,
    make_forward_arguments,
    make_random_inputs,
    select_rows,
    tokens_per_row,
)

FIT_TOKENS = 2048
"""Tokens on which the rows of single units are fitted."""
FIT_ROWS = 32
"""Rows of text that those are taken from: with fewer the fit is worse, with more every layer is read longer."""
BATCH_TOKENS = 4096
"""Tokens that the model reads at once."""


def write_own_text(model: Any, tokens: int, seed: int, length: int = 128) -> Inputs:
    """Token ids (rows, length) of the model's own making, for a calibration without any text.

    A language model samples from itself at temperature 1, from its start token in one half of the rows and from a random token
    in the other; a model without a language head gets uniformly random ids, and one that reads more than ids what
    :func:`hf_kernel_ffn.text.inputs.make_random_inputs` makes.
    """
    if model.config.is_encoder_decoder or not (
        accepts_argument(model, "input_ids") and model.main_input_name == "input_ids"
    ):
        return make_random_inputs(model, tokens, seed)
    if accepts_argument(model, "pixel_values"):
        return make_random_inputs(model, tokens, seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    limit = getattr(model.config, "max_position_embeddings", None) or length
    length = min(length, limit)
    rows = max(1, tokens // length)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    head = model.get_output_embeddings()
    if head is None or not model.can_generate():
        return ids
    start = model.config.bos_token_id
    if isinstance(start, int):
        ids[::2, 0] = start
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        current, past = ids[:, :1].to(device), None
        for position in range(1, length):
            logits, past = run_with_cache(model, current, past)
            if past is None:  # an encoder with a language head on it
                return ids
            likely = logits[:, -1].float().softmax(-1).cpu()
            ids[:, position : position + 1] = torch.multinomial(likely, 1, generator=generator)
            current = ids[:, position : position + 1].to(device)
    return ids


class _Reached(Exception):
    """The forward pass has come to the module it was made for."""


@torch.no_grad()
def read_ffn_inputs(model: Any, path: str, ids: Inputs) -> Iterator[Tensor]:
    """Inputs (tokens, hidden_size) of the FFN at ``path`` (under the base model) when the model reads ``ids`` (rows, …),
    batch by batch; nothing from that FFN on is computed, unless it serves several layers.

    Raises:
        InputError: nothing that the model reads comes to that FFN.
    """
    seen: list[Tensor] = []
    shared = get_architecture(get_family_name(model)).shared

    def stop(x: Tensor) -> None:
        seen.append(x)
        if not shared:
            raise _Reached

    for batch in split_batches(ids):
        hook = watch_ffn_input(
            model.base_model, path, stop
        )  # for one pass at a time: who takes the batch may call the FFN on it
        try:
            with suppress(_Reached):
                model.base_model(**make_forward_arguments(model.base_model, batch))
        finally:
            hook.remove()
        if not seen:
            raise InputError(
                f"found no input that comes to {path}, expected some: give the model all that it reads (calibration_ids as a mapping "
                "of its arguments), or leave that part out (layers)"
            )
        yield torch.cat(seen) if len(seen) > 1 else seen[0]
        seen.clear()


def split_batches(ids: Inputs) -> Iterator[Inputs]:
    """``ids`` (rows, …), about ``BATCH_TOKENS`` at a time."""
    size = max(1, BATCH_TOKENS // tokens_per_row(ids))
    for first in range(0, count_rows(ids), size):
        yield select_rows(ids, slice(first, first + size))


def select_fit_rows(ids: Inputs) -> Inputs:
    """Those of the rows ``ids`` that :func:`read_fit_sample` reads."""
    return select_rows(
        ids, torch.linspace(0, count_rows(ids) - 1, min(count_rows(ids), FIT_ROWS)).long()
    )


@torch.no_grad()
def read_fit_sample(model: Any, path: str, ids: Inputs) -> Tensor:
    """(tokens, hidden_size) float32: about ``FIT_TOKENS`` evenly spaced inputs of the FFN at ``path``, the same on every process."""
    ids = select_fit_rows(ids)
    every = max(1, count_rows(ids) * tokens_per_row(ids) // FIT_TOKENS)
    return torch.cat(
        [batch[::every].float().contiguous() for batch in read_ffn_inputs(model, path, ids)]
    )


BLIND_TOKENS = 64
"""Made-up inputs where nothing is calibrated."""


@torch.no_grad()
def make_blind_sample(norm: nn.Module | None, like: Tensor) -> Tensor:
    """(BLIND_TOKENS, hidden_size) float32: Gaussian hidden states, or what the ``norm`` before an FFN makes of them; ``like``: rows
    of the FFN (…, hidden_size)."""
    sample = torch.randn(
        BLIND_TOKENS, like.shape[-1], generator=torch.Generator().manual_seed(0)
    ).to(like)
    return (sample if norm is None else norm(sample)).float()


def split_fitted_and_held(ids: Inputs) -> tuple[Inputs, Inputs]:
    """Rows of ``ids`` (rows, …) to fit on, and the last quarter of them to choose by; this process's share of each."""
    if (
        isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) < 4 <= ids.shape[1]
    ):  # too few to hold out a quarter of them
        ids = ids[:, : ids.shape[1] // 4 * 4].reshape(4 * len(ids), -1)
    split = max(1, count_rows(ids) * 3 // 4)
    fitted, held = (
        select_rows(ids, slice(split)),
        select_rows(ids, slice(split, None)) if split < count_rows(ids) else ids,
    )
    if not is_distributed():
        return fitted, held
    share = slice(dist.get_rank(), None, dist.get_world_size())
    return select_rows(fitted, share), select_rows(held, share)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
