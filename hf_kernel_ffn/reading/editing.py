"""Change one prototype: scale, silence, rewrite or add it, for as long as a context is open or for good, and what that does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from .tracing import family_of


@dataclass(frozen=True)
class Edit:
    """A change of one row of an FFN's dictionary: ``v ← scale · v + write``. Any FFN, converted or stock."""

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
    when: Tensor
    """(hidden_size,) input prototype w."""
    bias: float
    """b of the score x·w + b; nothing to a kernel without one."""
    write: Tensor
    """(hidden_size,) output prototype v."""


@contextmanager
def edited(model: Any, *changes: Edit | Addition) -> Iterator[Any]:
    """``model`` with ``changes``, put back bit by bit when the context is left; to keep them, save inside of it
    (``save_pretrained``) or use :func:`edit`.

    Raises:
        InputError: a path or prototype does not exist, an addition is for a stock FFN or one with gated values, or the
            dictionary cannot be written to (quantised, adapted).
    """
    with ExitStack() as undo:
        for change in changes:
            undo.callback(edit(model, change))
        yield model


@torch.no_grad()
def edit(model: Any, change: Edit | Addition) -> Any:
    """Make one change of ``model`` for good; returns the function that undoes it. InputError as :func:`edited`."""
    try:
        ffn = model.base_model.get_submodule(change.path)
    except AttributeError:
        raise InputError(
            f"found no FFN {change.path!r} in the model, expected a path such as those of its records"
        ) from None
    if isinstance(change, Addition):
        return _add(model, ffn, change)
    rows = _dictionary(model, ffn)
    if not 0 <= change.prototype < len(rows):
        raise InputError(
            f"found prototype {change.prototype}, expected a number from 0 to {len(rows) - 1}"
        )
    row = rows[change.prototype]
    before = row.clone()
    row.mul_(change.scale)
    if change.write is not None:
        row.add_(change.write.to(row))
    return lambda: _put_back(row, before)


@torch.no_grad()
def _put_back(row: Tensor, before: Tensor) -> None:
    row.copy_(before)


def _dictionary(model: Any, ffn: nn.Module) -> Tensor:
    """(prototypes, hidden_size): the rows as a view of the weight itself."""
    name = "output_prototypes" if hasattr(ffn, "output_prototypes") else family_of(model).down
    linear: Any = getattr(ffn, name, None)
    if not isinstance(linear, (nn.Linear, Conv1D)) or not linear.weight.is_floating_point():
        raise InputError(
            f"found a {type(linear).__name__} as {name}, expected a plain Linear: merge adapters, load unquantised"
        )
    return linear.weight.detach() if isinstance(linear, Conv1D) else linear.weight.detach().T


def _add(model: Any, ffn: Any, rule: Addition) -> Any:
    """Put a layer that is one prototype wider in place of ``ffn``."""
    settings = getattr(getattr(ffn, "config", None), "settings", None)
    if type(ffn).__name__ != KernelFFN.__name__ or settings is None or settings.values == "gated":
        raise InputError(
            f"found {type(ffn).__name__} at {rule.path}, expected a kernel readout with fixed values: a stock FFN's width is fixed "
            "for all layers; convert the model"
        )
    # The class of the layer that is there: a checkpoint loaded with its own code has its own.
    wide = type(ffn)(replace(ffn.config, prototypes=ffn.config.prototypes + 1))
    wide.to(ffn.output_prototypes.weight).train(ffn.training)
    state = dict(ffn.state_dict())
    new = {
        "input_prototypes.weight": rule.when[None],
        "input_prototypes.bias": torch.tensor([rule.bias]),
        "output_prototypes.weight": rule.write[:, None],
        "units": (state["units"].abs().max() + 1)[None],
    }
    for name, part in new.items():
        if name in state:
            state[name] = torch.cat(
                [state[name], part.to(state[name])], 1 if name == "output_prototypes.weight" else 0
            )
    wide.load_state_dict(state)
    for parameter, old in zip(wide.parameters(), ffn.parameters()):
        parameter.requires_grad_(old.requires_grad)
    entry = model.config.kernel_ffn["layers"][rule.path]
    entry["prototypes"] += 1
    model.base_model.set_submodule(rule.path, wide)

    def undo() -> None:
        entry["prototypes"] -= 1
        model.base_model.set_submodule(rule.path, ffn)

    return undo


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
    model: Any,
    changes: list[Edit | Addition],
    context: Tensor,
    token: int,
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

    def next_token() -> tuple[float, int]:
        logits = model(input_ids=context[None], use_cache=False).logits[0, -1].float()
        return logits.softmax(-1)[token].item(), 1 + int((logits > logits[token]).sum())

    before, plain = next_token(), predictions(model, others) if plain is None else plain
    with edited(model, *changes):
        after, now = next_token(), predictions(model, others)
    kl = (plain.exp() * (plain - now)).sum(-1).mean().item()
    return Effect((before[0], after[0]), (before[1], after[1]), kl)


@torch.no_grad()
def predictions(model: Any, ids: Tensor) -> Tensor:
    """(rows, length, vocabulary) float32 log-probabilities at ``ids`` (rows, length)."""
    parts = [
        model(input_ids=some, use_cache=False).logits.float().log_softmax(-1)
        for some in ids.split(8)
    ]
    return torch.cat(parts)
