"""Who wrote a logit: its exact split over the embedding, every attention head and every prototype of every FFN."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from .rows import Rows
from .tracing import Trace, described, get_attention, get_layer_number, unembedding


class Part(NamedTuple):
    """One additive part of a logit, in logits: a signed contribution, never a share."""

    kind: str
    """embedding, head, prototype or bias."""
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
    """What no part accounts for: rounding, unless the model has writers that the table of architectures does not name."""

    def kinds(self) -> dict[str, float]:
        """The parts summed by kind."""
        return {
            k: sum(p.amount for p in self.parts if p.kind == k)
            for k in ("embedding", "head", "prototype", "bias")
        }

    def carried(self, top: int = 10) -> float:
        """Σ of the ``top`` largest prototypes' contributions over ``value``: beyond one where others oppose them."""
        return sum([p.amount for p in self.parts if p.kind == "prototype"][:top]) / self.value


@torch.no_grad()
def logit_split(
    trace: Trace, token: int | None = None, against: int | None = None, position: int = -1
) -> LogitSplit:
    """Split the logit of ``token`` (minus that of ``against``, if given) at ``position``, in float64.

    The final norm is linearised at the actual state by holding its scale: what is left is a linear map of the residual stream,
    which is the sum of what was written into it (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").

    Args:
        token: None for the model's most likely next token.
        against: another token; None for the logit itself.

    Raises:
        InputError: the position was not kept, or the final norm is neither a LayerNorm nor an RMSNorm.
    """
    place, model = trace.at(position), trace.model
    logits = trace.logits[place].double()
    token = int(logits.argmax()) if token is None else token
    toward = unembedding(model)[token].double()
    offset = getattr(model.get_output_embeddings(), "bias", None)
    constant = 0.0 if offset is None else offset[token].item()
    value = logits[token].item()
    if against is not None:
        toward = toward - unembedding(model)[against].double()
        constant -= 0.0 if offset is None else offset[against].item()
        value -= logits[against].item()
    direction, shift = frozen_norm(final_norm(model), trace.states[-1][place].double(), toward)
    parts: Rows[Part] = Rows(
        [Part("embedding", None, "embedding", (direction @ trace.embedding[place].double()).item())]
    )
    parts.append(Part("bias", None, "final norm and unembedding", shift + constant))
    for layer, weights in enumerate(trace.attention):
        for head in range(len(weights)):
            wrote = trace.head(layer, head, trace.positions[place]).output()[0].double()
            parts.append(Part("head", layer, f"head {head}", (direction @ wrote).item()))
        bias = getattr(get_attention(model, layer), described(model, "attention_out")).bias
        if bias is not None:
            parts.append(Part("bias", layer, "attention", (direction @ bias.double()).item()))
    for path in trace.ffn_inputs:
        record = trace.ffn(path)
        amounts = record.coefficients[place].double() * (record.dictionary.double() @ direction)
        fired = amounts.nonzero()[:, 0].tolist()
        parts += [
            Part("prototype", get_layer_number(path), record.names[i], amounts[i].item())
            for i in fired
        ]
        if record.bias is not None:
            bias = record.bias if record.bias.ndim == 1 else record.bias[place]
            parts.append(
                Part("bias", get_layer_number(path), "FFN", (direction @ bias.double()).item())
            )
    parts.sort(key=lambda part: -abs(part.amount))
    return LogitSplit(
        trace.positions[place], token, against, value, parts, value - sum(p.amount for p in parts)
    )


def final_norm(model: Any) -> nn.Module:
    """The norm before the unembedding."""
    return model.base_model.get_submodule(described(model, "final_norm"))


def frozen_norm(norm: nn.Module, state: Tensor, direction: Tensor) -> tuple[Tensor, float]:
    """``u`` (hidden_size,) and ``a`` with ``direction · norm(h) = u · h + a`` at ``state`` and wherever the scale is the same
    (float64). InputError if ``norm`` is neither a LayerNorm nor an RMSNorm."""
    weight: Any = getattr(norm, "weight", None)
    gain = torch.ones_like(direction) if weight is None else weight.detach().double()
    if isinstance(norm, nn.LayerNorm):
        scaled = gain * direction
        u = (scaled - scaled.mean()) / (state.var(correction=0) + norm.eps).sqrt()
        return u, 0.0 if norm.bias is None else (norm.bias.double() @ direction).item()
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if epsilon is None or getattr(norm, "bias", None) is not None:
        raise InputError(
            f"found a {type(norm).__name__} as the norm, expected a LayerNorm or an RMSNorm: it cannot be linearised"
        )
    return gain * direction / (state.square().mean() + epsilon).sqrt(), 0.0
