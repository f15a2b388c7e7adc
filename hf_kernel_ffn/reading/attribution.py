"""Who wrote a logit: its exact split over the embedding, every head and every prototype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..checkpoint_code.errors import InputError
from .model_parts import (
    get_family,
    get_final_norm,
    get_layer_number,
    get_output_projection,
    get_unembedding,
    get_unembedding_bias,
)
from .norms import linearise_norm
from .rows import Rows
from .tracing import Trace

KINDS = ("embedding", "head", "prototype", "linear", "bias")
"""What a part of a logit may be."""
ROUNDING = 1e-3
"""Largest remainder that passes for rounding, over the largest part."""
ROUNDING_STEPS = 8
"""The same in rounding steps of the model's dtype, over what was rounded. Models that add up stay
below four; this matters for half precision."""


class Part(NamedTuple):
    """One additive part of a logit, in logits: a signed contribution, never a share."""

    kind: str
    """One of :data:`KINDS`."""
    layer: int | None
    name: str
    """``head 3``, a prototype's name in its record, or which bias."""
    amount: float
    """What it adds to the logit (or to the gap between two)."""


class LogitSplit(NamedTuple):
    """A logit, or the gap between two, at one position: ``value = Σ parts + remainder``."""

    position: int
    token: int
    against: int | None
    value: float
    parts: Rows[Part]
    """Largest |amount| first; prototypes that did not fire are left out."""
    remainder: float
    """What no part accounts for: rounding."""

    def kinds(self) -> dict[str, float]:
        """The parts summed by kind; ``linear`` only where some layer has a linear map."""
        kinds = {
            kind: sum(part.amount for part in self.parts if part.kind == kind) for kind in KINDS
        }
        if not any(part.kind == "linear" for part in self.parts):
            del kinds["linear"]
        return kinds

    def carried(self, top: int = 10) -> float:
        """The ``top`` largest prototypes' contributions over ``value``.

        Beyond one where other parts oppose them.
        """
        amounts = [part.amount for part in self.parts if part.kind == "prototype"]
        return sum(amounts[:top]) / self.value


@torch.no_grad()
def logit_split(
    trace: Trace, token: int | None = None, against: int | None = None, position: int = -1
) -> LogitSplit:
    """Split the logit of ``token`` (minus that of ``against``, if given) at ``position``, in
    float64.

    The final norm is linearised at the actual state by holding its scale. What is left is a linear
    map of the residual stream, which is the sum of what was written into it (Elhage et al. 2021,
    "A Mathematical Framework for Transformer Circuits").

    Args:
        token: None for the model's most likely next token.
        against: another token; None for the logit itself.

    Raises:
        InputError: the position was not kept; the final norm is neither a LayerNorm nor an
            RMSNorm; or the parts do not add up to the logit, since the model has writers that the
            table of families does not name, norms on what is written, or scaled logits.
    """
    place = trace.at(position)
    if token is None:
        token = int(trace.logits[place].argmax())
    toward, bias = _read_token(trace, token)
    value = trace.logits[place, token].double().item()
    if against is not None:
        toward_other, bias_other = _read_token(trace, against)
        toward = toward - toward_other
        bias -= bias_other
        value -= trace.logits[place, against].double().item()

    final_state = trace.states[-1][place]
    direction, shift = linearise_norm(get_final_norm(trace.model), final_state, toward)
    embedded = direction @ trace.embedding[place].double()
    parts = Rows(
        [
            Part("embedding", None, "embedding", embedded.item()),
            Part("bias", None, "final norm and unembedding", shift + bias),
            *_attention_parts(trace, direction, place),
            *_ffn_parts(trace, direction, place),
        ]
    )
    parts.sort(key=lambda part: -abs(part.amount))

    remainder = value - sum(part.amount for part in parts)
    rounded = (direction * final_state.double()).norm().item() + sum(
        abs(trace.logits[place, number].item()) for number in (token, against) if number is not None
    )
    _require_rounding(trace, remainder, parts[0].amount, rounded)
    return LogitSplit(trace.positions[place], token, against, value, parts, remainder)


def _read_token(trace: Trace, token: int) -> tuple[Tensor, float]:
    """(hidden_size,) float64 what the logit of ``token`` reads, and what is added to it."""
    bias = get_unembedding_bias(trace.model)
    direction = get_unembedding(trace.model)[token].double()
    return direction, 0.0 if bias is None else bias[token].item()


def _attention_parts(trace: Trace, direction: Tensor, place: int) -> Iterator[Part]:
    """What every head, and the bias of every output projection, wrote along ``direction``."""
    position = trace.positions[place]
    for layer, weights in enumerate(trace.attention):
        for head in range(len(weights)):
            written = trace.head(layer, head, position).output()[0].double()
            yield Part("head", layer, f"head {head}", (direction @ written).item())
        bias = cast(Tensor | None, get_output_projection(trace.model, layer).bias)
        if bias is not None:
            yield Part("bias", layer, "attention", (direction @ bias.double()).item())


def _ffn_parts(trace: Trace, direction: Tensor, place: int) -> Iterator[Part]:
    """What every prototype that fired, and the bias and the linear map of every FFN, wrote along
    ``direction``."""
    for path in trace.ffn_inputs:
        layer = get_layer_number(path)
        record = trace.ffn(path)
        amounts = record.coefficients[place].double() * (record.dictionary.double() @ direction)
        for prototype in amounts.nonzero()[:, 0].tolist():
            name = record.names[prototype]
            yield Part("prototype", layer, name, amounts[prototype].item())
        if record.bias is not None:
            yield Part("bias", layer, "FFN", (direction @ record.bias.double()).item())
        if record.skip is not None:
            yield Part("linear", layer, "FFN", (direction @ record.skip[place].double()).item())


def _require_rounding(trace: Trace, remainder: float, largest: float, rounded: float) -> None:
    """InputError unless ``remainder`` is rounding.

    Args:
        largest: the largest part of the logit.
        rounded: size of the numbers that the model rounded: the final state along what is read, and
            the logits.
    """
    step = torch.finfo(trace.logits.dtype).eps
    tolerance = max(ROUNDING * abs(largest), ROUNDING_STEPS * step * rounded)
    if not abs(remainder) <= tolerance:
        raise InputError(
            f"found a remainder of {remainder:.3g} where the parts of a logit are at most "
            f"{abs(largest):.3g}, expected rounding: a {get_family(trace.model).model_type!r} has "
            "norms on what is written, scaled logits or other writers, so its logits cannot be "
            "split"
        )
