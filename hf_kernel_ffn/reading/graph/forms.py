"""A unit's coefficient as a function of its own scores alone, all else held at the prompt.

A form takes one or two tensors of scores (tokens, units) and returns coefficients of that shape.
At the prompt's own scores it gives the layer's own coefficients, to rounding. What it holds is
named beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint_code.ffn import KernelFFN
from ...checkpoint_code.linears import get_effective_weight
from ...checkpoint_code.record import Readout
from ...checkpoint_code.tied import TiedKernelFFN
from ...checkpoint_code.unit_pieces import Scores
from ...families.weights import FFNWeights

Evaluate = Callable[..., Tensor]
"""Scores (tokens, units), one or two tensors of them, to coefficients (tokens, units)."""

SUPPORT = "which prototypes are kept"
LENGTH = "the length of what an FFN reads, in its kernels' distances"
DENOMINATOR = "denominators and thresholds of shares"
INTENSITY = "intensities"


class Form(NamedTuple):
    """How coefficients follow from scores."""

    evaluate: Evaluate | None
    """None: not from scores, as far as is known here; the coefficients are held whole."""
    held: tuple[str, ...]
    """What is held at its value on the prompt, in words."""


class Rows(NamedTuple):
    """What one kind of score reads: ``score = x · weight.T + bias``."""

    weight: Tensor
    """(units, hidden_size)."""
    bias: Tensor | None
    """(units,)."""

    def scores(self, inputs: Tensor) -> Tensor:
        """(tokens, units) at ``inputs`` (tokens, hidden_size)."""
        return torch.nn.functional.linear(inputs, self.weight, self.bias)


def make_stock_form(weights: FFNWeights) -> tuple[Form, list[Rows]]:
    """The form of an untouched FFN: act(g) · u with a gate, act(z) without."""
    up = Rows(weights.up, weights.up_bias)
    activation = weights.activation
    if weights.gate is None:
        return Form(activation, ()), [up]

    def multiply(gate_score: Tensor, up_score: Tensor) -> Tensor:
        return activation(gate_score) * up_score

    return Form(multiply, ()), [Rows(weights.gate, weights.gate_bias), up]


def make_tied_form(ffn: TiedKernelFFN, inputs: Tensor) -> tuple[Form, list[Rows]]:
    """The form of a layer with tied rows at ``inputs`` (tokens, hidden_size)."""
    rows = [_read_rows(ffn.input_prototypes, inputs)]
    if ffn.config.gated:
        rows.append(_read_rows(ffn.value_proj, inputs))
    square = inputs.square().sum(-1, keepdim=True)

    held = [LENGTH] if ffn.kernel.uses_distance else []
    kept: Tensor | None = None
    if ffn.config.settings.sparse:
        held.append(SUPPORT)
        kept = ffn.coefficients(inputs) != 0

    def mix(first: Tensor, second: Tensor | None = None) -> Tensor:
        coefficients = ffn.mix_scores(Scores(first, second, square))
        return coefficients if kept is None else coefficients * kept

    return Form(mix, tuple(held)), rows


def make_free_form(ffn: KernelFFN, inputs: Tensor, record: Readout) -> tuple[Form, list[Rows]]:
    """The form of a layer with free rows at ``inputs`` (tokens, hidden_size).

    Args:
        record: of the layer at ``inputs``.
    """
    settings = ffn.config.settings
    rows = [_read_rows(ffn.input_prototypes, inputs)]
    is_gated = settings.values == "gated"
    if is_gated:
        rows.append(_read_rows(ffn.value_proj, inputs))
    held = [LENGTH] if ffn.kernel.uses_distance else []
    if settings.sparse:
        held.append(SUPPORT)

    if settings.coefficients_are_kernel:
        mix = _make_kernel_mixture(ffn, inputs, rows[0], record)
    else:
        held += [DENOMINATOR, INTENSITY] if settings.intensity != "none" else [DENOMINATOR]
        share_form = _make_share_form(ffn, inputs, rows[0], record)
        if share_form is None:
            return Form(None, tuple(held)), rows
        mix = share_form

    def evaluate(score: Tensor, up_score: Tensor | None = None) -> Tensor:
        mixture = mix(score)
        return mixture if up_score is None else mixture * up_score

    return Form(evaluate, tuple(held)), rows


def _read_rows(linear: torch.nn.Module, inputs: Tensor) -> Rows:
    """Rows of ``linear``, adapters and quantisation included, in the dtype of ``inputs``."""
    weight, bias = get_effective_weight(linear, inputs)
    bias = None if bias is None else bias.detach().to(inputs.dtype)
    return Rows(weight.detach().to(inputs.dtype), bias)


def _make_distance(ffn: KernelFFN, inputs: Tensor, rows: Rows) -> Callable[[Tensor], Tensor | None]:
    """‖x − w‖² (tokens, units) by the score, ‖x‖² held; None for a kernel that reads none."""
    norms = inputs.square().sum(-1, keepdim=True) + rows.weight.square().sum(-1)

    def measure(score: Tensor) -> Tensor | None:
        if not ffn.kernel.uses_distance:
            return None
        dot = score if rows.bias is None else score - rows.bias
        return (norms - 2 * dot).clamp_min(0)

    return measure


def _make_kernel_mixture(
    ffn: KernelFFN, inputs: Tensor, rows: Rows, record: Readout
) -> Callable[[Tensor], Tensor]:
    """scale · κ by the score, over the prototypes that are kept on the prompt."""
    measure = _make_distance(ffn, inputs, rows)
    parameters = {name: value.to(inputs.dtype) for name, value in ffn.kernel_parameters().items()}
    log_scale = ffn.log_positive("scale").to(inputs.dtype)
    kept: Tensor | None = None
    if ffn.config.settings.sparse and record.shares is not None:
        kept = record.shares > 0

    def mix(score: Tensor) -> Tensor:
        kernel = ffn.kernel.scaled(score, measure(score), log_scale, **parameters)
        return kernel if kept is None else kernel * kept

    return mix


def _make_share_form(
    ffn: KernelFFN, inputs: Tensor, rows: Rows, record: Readout
) -> Callable[[Tensor], Tensor] | None:
    """Intensity times share by the score, the denominator or threshold of the map held.

    None for a map that is not known here.
    """
    shares = record.shares
    assert shares is not None and record.intensity is not None
    measure = _make_distance(ffn, inputs, rows)
    parameters = {name: value.to(inputs.dtype) for name, value in ffn.kernel_parameters().items()}
    temperature = ffn.positive("temperature").to(inputs.dtype)
    intensity = record.intensity[..., None].to(inputs.dtype)
    simplex = ffn.config.settings.simplex

    def log_kernel(score: Tensor) -> Tensor:
        return ffn.kernel.log(score, measure(score), **parameters) / temperature

    on_prompt = log_kernel(rows.scores(inputs))
    fires = shares > 0

    def scale_softmax(score: Tensor) -> Tensor:
        change = log_kernel(score) - on_prompt.where(fires, torch.zeros_like(on_prompt))
        return intensity * (shares * change.exp()).where(fires, torch.zeros_like(shares))

    if simplex in ("softmax", "top-k", "threshold"):
        return scale_softmax
    if simplex not in ("sparsemax", "entmax-1.5"):
        return None

    power = 1 if simplex == "sparsemax" else 2
    best = on_prompt.max(-1, keepdim=True)
    cut = best.values / power - shares.gather(-1, best.indices) ** (1 / power)
    any_fires = fires.any(-1, keepdim=True)

    def cut_scores(score: Tensor) -> Tensor:
        raised = (log_kernel(score) / power - cut).relu() ** power
        return intensity * raised.where(any_fires, torch.zeros_like(raised))

    return cut_scores
