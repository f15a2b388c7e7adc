"""What a conversion reads: tokens of the model's own making, and the inputs of each FFN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..compat import run_with_cache
from ..families.hooks import watch_ffn_input
from ..families.lookup import get_family_name
from ..families.registry import get_architecture
from ..progress import track_progress
from ..text.inputs import (
    Inputs,
    accepts_argument,
    find_longest_row,
    make_forward_arguments,
    make_random_inputs,
)
from .calibration_set import FIT_TOKENS, select_fit_rows, split_batches, thin_tokens

OWN_TEXT_LENGTH = 128
"""Tokens in a row of the model's own making."""
BLIND_TOKENS = 64
"""Made-up inputs where nothing is calibrated."""


@torch.no_grad()
def write_own_text(
    model: PreTrainedModel,
    tokens: int,
    seed: int,
    length: int = OWN_TEXT_LENGTH,
    *,
    progress: bool = False,
) -> Inputs:
    """Make token ids (rows, length) by the model itself, for a calibration without any text.

    A language model samples from itself at temperature 1, from its start token in one half of the
    rows and from a random token in the other. A model without a language head gets uniformly random
    ids, and one that reads more than ids gets what
    :func:`hf_kernel_ffn.text.inputs.make_random_inputs` makes.

    Args:
        tokens: how many to make, at least one row.
        seed: of the random numbers.
        length: of a row; the model's own limit where that is shorter.
        progress: show a bar while the model writes.
    """
    if model.config.is_encoder_decoder or not _reads_only_ids(model):
        return make_random_inputs(model, tokens, seed)

    embedding = cast(nn.Embedding, model.get_input_embeddings())
    length = min(length, find_longest_row(model) or length)
    rows = max(1, tokens // length)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(embedding.num_embeddings, (rows, length), generator=generator)
    if model.get_output_embeddings() is None or not model.can_generate():
        return ids

    start = model.config.bos_token_id
    if isinstance(start, int):
        ids[::2, 0] = start
    _continue_rows(model, ids, generator, progress)
    return ids


def _reads_only_ids(model: PreTrainedModel) -> bool:
    """Whether token ids are the model's main input, and it can be shown no images."""
    if not accepts_argument(model, "input_ids") or model.main_input_name != "input_ids":
        return False
    return not accepts_argument(model, "pixel_values")


def _continue_rows(
    model: PreTrainedModel, ids: Tensor, generator: torch.Generator, progress: bool
) -> None:
    """Replace all but the first of ``ids`` (rows, length) by samples of what ``model`` predicts.

    An encoder with a language head on it predicts no next token: its ids stay as they are.
    """
    device = cast(nn.Embedding, model.get_input_embeddings()).weight.device
    current = ids[:, :1].to(device)
    cache = None
    for position in track_progress(range(1, ids.shape[1]), "writing own text", progress):
        logits, cache = run_with_cache(model, current, cache)
        if cache is None:
            return
        likely = logits[:, -1].float().softmax(-1).cpu()
        ids[:, position : position + 1] = torch.multinomial(likely, 1, generator=generator)
        current = ids[:, position : position + 1].to(device)


def read_ffn_inputs(model: PreTrainedModel, path: str, ids: Inputs) -> Iterator[Tensor]:
    """Yield the inputs (tokens, hidden_size) of an FFN when the model reads ``ids``, by batches.

    Nothing from that FFN on is computed, unless it serves several layers.

    Args:
        path: of the FFN, under the base model.
        ids: (rows, …).

    Raises:
        InputError: nothing that the model reads comes to that FFN.
    """
    passes = (partial(run_base_model, model, batch) for batch in split_batches(ids))
    return collect_ffn_inputs(model, path, passes)


@torch.no_grad()
def collect_ffn_inputs(
    model: PreTrainedModel, path: str, passes: Iterable[Callable[[], object]]
) -> Iterator[Tensor]:
    """Yield the inputs (tokens, hidden_size) of the FFN at ``path`` in each of ``passes``.

    A pass is stopped at that FFN, unless it serves several layers.

    Raises:
        InputError: a pass does not come to that FFN.
    """
    seen: list[Tensor] = []
    stops = not get_architecture(get_family_name(model)).shared

    def see(x: Tensor) -> None:
        seen.append(x)
        if stops:
            raise Reached

    for run in passes:
        # The hook is there for one pass at a time: the caller may run the FFN on a batch it gets.
        hook = watch_ffn_input(model.base_model, path, see)
        try:
            with suppress(Reached):
                run()
        finally:
            hook.remove()
        if not seen:
            raise make_unread_error(path)
        yield torch.cat(seen) if len(seen) > 1 else seen[0]
        seen.clear()


def make_unread_error(path: str) -> InputError:
    """Make the error that says that nothing the model reads comes to ``path``."""
    return InputError(
        f"found no input that comes to {path}, expected some: give the model all that it reads "
        "(calibration_ids as a mapping of its arguments), or leave that part out (layers)"
    )


class Reached(Exception):
    """The forward pass has come to the module it was made for."""


def run_base_model(model: PreTrainedModel, batch: Inputs) -> object:
    """Run the base model of ``model`` over ``batch`` (rows, …)."""
    base = model.base_model
    return base(**make_forward_arguments(base, batch))


def read_fit_sample(model: PreTrainedModel, path: str, ids: Inputs) -> Tensor:
    """Read about ``FIT_TOKENS`` evenly spaced inputs of the FFN at ``path``, the same everywhere.

    Returns:
        (tokens, hidden_size) float32, the same on every process.
    """
    rows = select_fit_rows(ids)
    return thin_batches(read_ffn_inputs(model, path, rows), thin_tokens(rows, FIT_TOKENS))


def thin_batches(batches: Iterable[Tensor], every: int) -> Tensor:
    """Join one of ``every`` tokens of each of ``batches`` (tokens, hidden_size), in float32."""
    return torch.cat([batch[::every].float().contiguous() for batch in batches])


@torch.no_grad()
def make_blind_sample(norm: nn.Module | None, like: Tensor) -> Tensor:
    """Make Gaussian hidden states, or what the ``norm`` before an FFN makes of them.

    Args:
        like: rows of the FFN (…, hidden_size), whose dtype and device the norm is given.

    Returns:
        (BLIND_TOKENS, hidden_size) float32.
    """
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(BLIND_TOKENS, like.shape[-1], generator=generator).to(like)
    return (sample if norm is None else norm(sample)).float()
