"""Change one prototype, for as long as a context is open or for good, and measure what that
does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.record import ReadableFFN
from ..families.lookup import find_stock_ffn
from ..families.weights import read_stock_weights
from .model_parts import find_ffn_module, has_tied_rows, is_kernel_ffn

BATCH_ROWS = 8
"""Rows of text that the model reads at once."""


@dataclass(frozen=True)
class Edit:
    """A change of one row of an FFN's dictionary: ``v ← scale · v + write``.

    Any FFN, converted or stock. Where rows are tied, v_i and −v_i are one row: a change of either
    changes both.
    """

    path: str
    """The FFN, under the base model."""
    prototype: int
    """The row: a prototype, or a stock FFN's hidden unit."""
    scale: float = 1.0
    """0 silences."""
    write: Tensor | None = None
    """(hidden_size,), added after scaling: with ``scale`` 0 the row is replaced."""


@dataclass(frozen=True)
class Addition:
    """A new prototype of a converted FFN: *when this, write that*."""

    path: str
    """The FFN, under the base model."""
    when: Tensor
    """(hidden_size,) input prototype w."""
    bias: float
    """b of the score x·w + b; nothing to a kernel without one."""
    write: Tensor
    """(hidden_size,) output prototype v."""


Change = Edit | Addition
"""What can be done to a model."""
Undo = Callable[[], None]
"""Puts a model back as it was before a change."""


@contextmanager
def edited(model: PreTrainedModel, *changes: Change) -> Iterator[PreTrainedModel]:
    """``model`` with ``changes``, put back bit by bit when the context is left.

    To keep them, save inside of the context (``save_pretrained``) or use :func:`edit`.

    Raises:
        InputError: a path or prototype does not exist, an addition is for a stock FFN or one with
            gated values, or the dictionary cannot be written to (quantised, adapted).
    """
    with ExitStack() as undo:
        for change in changes:
            undo.callback(edit(model, change))
        yield model


@torch.no_grad()
def edit(model: PreTrainedModel, change: Change) -> Undo:
    """Make one change of ``model`` for good; returns the function that undoes it.

    InputError as :func:`edited`.
    """
    try:
        ffn = find_ffn_module(model, change.path)
    except InputError:
        raise InputError(
            f"found no FFN {change.path!r} in the model, expected a path such as those of its "
            "records"
        ) from None
    if isinstance(change, Addition):
        return _add_prototype(model, ffn, change)
    rows = _view_dictionary(model, ffn, change.path)
    count = 2 * len(rows) if has_tied_rows(ffn) else len(rows)
    if not 0 <= change.prototype < count:
        raise InputError(
            f"found prototype {change.prototype}, expected a number from 0 to {count - 1}"
        )
    row = rows[change.prototype % len(rows)]
    sign = 1 if change.prototype < len(rows) else -1
    before = row.clone()
    row.mul_(change.scale)
    if change.write is not None:
        row.add_(change.write.to(row), alpha=sign)
    return lambda: _put_back(row, before)


@torch.no_grad()
def _put_back(row: Tensor, before: Tensor) -> None:
    """Write ``before`` into ``row`` again."""
    row.copy_(before)


def _view_dictionary(model: PreTrainedModel, ffn: nn.Module | None, path: str) -> Tensor:
    """(prototypes, hidden_size): the rows as a view of the weight itself."""
    if isinstance(ffn, ReadableFFN):
        return _view_rows(ffn, "output_prototypes")
    stock = find_stock_ffn(model, path)
    if stock.expert is None:
        return _view_rows(stock.host, stock.shape.down)
    return read_stock_weights(model, stock).down


def _view_rows(host: nn.Module, name: str) -> Tensor:
    """(in, out): the columns of the linear module ``name`` of ``host``, as a view of its weight."""
    linear = getattr(host, name, None)
    if not isinstance(linear, (nn.Linear, Conv1D)) or not linear.weight.is_floating_point():
        raise InputError(
            f"found a {type(linear).__name__} as {name}, expected a plain Linear: merge adapters, "
            "load unquantised"
        )
    weight = linear.weight.detach()
    return weight if isinstance(linear, Conv1D) else weight.T


def _add_prototype(model: PreTrainedModel, ffn: nn.Module | None, addition: Addition) -> Undo:
    """Put a layer that is one prototype wider in place of ``ffn``; returns what undoes it."""
    if has_tied_rows(ffn):
        raise InputError(
            f"found tied rows at {addition.path}, expected a kernel readout whose prototypes have "
            "rows of their own: convert with rows 'free'"
        )
    kind = "an expert of a stock mixture" if ffn is None else type(ffn).__name__
    if not is_kernel_ffn(ffn) or ffn.config.settings.values == "gated":
        raise InputError(
            f"found {kind} at {addition.path}, expected a kernel readout with fixed "
            "values: a stock FFN's width is fixed for all layers; convert the model"
        )
    wide = _widen(ffn, addition)
    entry = model.config.kernel_ffn["layers"][addition.path]
    entry["prototypes"] += 1
    model.base_model.set_submodule(addition.path, wide)

    def undo() -> None:
        entry["prototypes"] -= 1
        model.base_model.set_submodule(addition.path, ffn)

    return undo


def _widen(ffn: KernelFFN, addition: Addition) -> KernelFFN:
    """A copy of ``ffn`` with the new prototype behind its own ones."""
    # The class of the layer that is there: a checkpoint loaded with its own code has its own.
    wide = type(ffn)(replace(ffn.config, prototypes=ffn.config.prototypes + 1))
    wide.to(ffn.output_prototypes.weight).train(ffn.training)

    state = dict(ffn.state_dict())
    added = {
        "input_prototypes.weight": addition.when[None],
        "input_prototypes.bias": torch.tensor([addition.bias]),
        "output_prototypes.weight": addition.write[:, None],
        "units": (state["units"].abs().max() + 1)[None],
    }
    for name, part in added.items():
        if name in state:
            dimension = 1 if name == "output_prototypes.weight" else 0
            state[name] = torch.cat([state[name], part.to(state[name])], dimension)
    wide.load_state_dict(state)

    for parameter, old in zip(wide.parameters(), ffn.parameters(), strict=True):
        parameter.requires_grad_(old.requires_grad)
    return wide


class Effect(NamedTuple):
    """What changes did to one next token, and to everything else."""

    probability: tuple[float, float]
    """Of the token at the end of the context, before and after."""
    rank: tuple[int, int]
    """Of the token, 1 for the most likely, before and after."""
    collateral_kl: float
    """KL(before ‖ after) in nats, mean per token of other text."""


@torch.no_grad()
def effect(
    model: PreTrainedModel,
    changes: Sequence[Change],
    context: Tensor,
    token: int,
    *,
    others: Tensor,
    plain: Tensor | None = None,
) -> Effect:
    """Measure ``changes``, undone afterwards.

    Args:
        context: (T,) token ids; the next token is looked at.
        token: whose probability is asked for.
        others: (rows, length) token ids of text that should stay as it is.
        plain: :func:`predictions` on ``others`` before the changes, if they are at hand.
    """
    if plain is None:
        plain = predictions(model, others)
    probability, rank = _rate_next_token(model, context, token)
    with edited(model, *changes):
        changed_probability, changed_rank = _rate_next_token(model, context, token)
        changed = predictions(model, others)
    kl = (plain.exp() * (plain - changed)).sum(-1).mean().item()
    return Effect((probability, changed_probability), (rank, changed_rank), kl)


def _rate_next_token(model: PreTrainedModel, context: Tensor, token: int) -> tuple[float, int]:
    """Probability and rank of ``token`` after ``context`` (T,)."""
    logits = model(input_ids=context[None], use_cache=False).logits[0, -1].float()
    rank = 1 + int((logits > logits[token]).sum())
    return logits.softmax(-1)[token].item(), rank


@torch.no_grad()
def predictions(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(rows, length, vocabulary) float32 log-probabilities at ``ids`` (rows, length)."""
    batches = [
        model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
        for batch in ids.split(BATCH_ROWS)
    ]
    return torch.cat(batches)
