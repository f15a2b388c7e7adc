"""The units or prototypes of one FFN at every token of a prompt, as nodes of a graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...checkpoint_code.linears import get_effective_weight
from ...checkpoint_code.record import ReadableFFN
from ...families.lookup import find_stock_ffn
from ...families.weights import read_stock_weights, read_teacher_readout
from ..model_parts import get_layer_number, has_tied_rows, is_kernel_ffn
from .forms import Form, Rows, make_free_form, make_stock_form, make_tied_form
from .steps import Step, take_step

REMAINDER = 1e-3
"""What an FFN writes beside its record is rounding below this share of its output."""


class Units(NamedTuple):
    """One FFN over T tokens: U units with coefficients, and what each is a linear function of."""

    path: str
    layer: int
    coefficients: Tensor
    """(T, U), signed."""
    dictionary: Tensor
    """(U, hidden_size): what a unit writes per coefficient."""
    bias: Tensor | None
    """(hidden_size,), written whatever fires."""
    remainder: Tensor | None
    """(T, hidden_size): what the FFN writes beside its record; None if that is rounding."""
    rows: list[Rows]
    """What the scores read, one or two."""
    step: Step
    held: tuple[str, ...]
    names: tuple[str, ...]
    """Names of units, without a side where the coefficient's sign says it."""
    is_tied: bool

    def constant(self, token: int, unit: int) -> float:
        """What a coefficient owes to no input: its baseline, and the biases of its scores."""
        total = self.step.constant[token, unit].item()
        for slope, rows in zip(self.step.slopes, self.rows, strict=True):
            if rows.bias is not None:
                total += (slope[token, unit] * rows.bias[unit]).item()
        return total

    def direction(self, token: int, unit: int) -> Tensor:
        """(hidden_size,) what a coefficient reads of the FFN's input, by its step."""
        total = torch.zeros_like(self.dictionary[unit])
        for slope, rows in zip(self.step.slopes, self.rows, strict=True):
            total += slope[token, unit] * rows.weight[unit]
        return total

    def name(self, token: int, unit: int) -> str:
        """``17+`` or ``17-`` by the side that a tied unit writes; otherwise its name in the
        record."""
        if not self.is_tied:
            return self.names[unit]
        return f"{unit}{'+' if self.coefficients[token, unit] >= 0 else '-'}"


@torch.no_grad()
def read_units(
    model: PreTrainedModel, path: str, inputs: Tensor, outputs: Tensor, rule: str
) -> Units:
    """The units of the FFN at ``path``.

    Args:
        inputs, outputs: (T, hidden_size) what it reads and writes.
        rule: how coefficients are split over scores, one of :data:`~.steps.RULES`.
    """
    ffn = model.base_model.get_submodule(path)
    is_tied = has_tied_rows(ffn)
    rows: list[Rows] = []
    form = Form(None, ())
    if has_tied_rows(ffn):
        coefficients = ffn.coefficients(inputs).to(inputs.dtype)
        weight, bias = get_effective_weight(ffn.output_prototypes, inputs)
        dictionary = weight.T
        names: tuple[str, ...] = ()
        form, rows = make_tied_form(ffn, inputs)
    else:
        if isinstance(ffn, ReadableFFN):
            record = ffn.readout(inputs)
            if is_kernel_ffn(ffn):
                form, rows = make_free_form(ffn, inputs, record)
        else:
            weights = read_stock_weights(model, find_stock_ffn(model, path))
            record = read_teacher_readout(weights, inputs)
            form, rows = make_stock_form(weights)
        coefficients = record.coefficients
        dictionary = record.dictionary
        bias = record.bias
        names = record.names

    scores = [row.scores(inputs) for row in rows]
    return Units(
        path=path,
        layer=get_layer_number(path),
        coefficients=coefficients,
        dictionary=dictionary.detach(),
        bias=None if bias is None else bias.detach(),
        remainder=_find_remainder(coefficients, dictionary, bias, outputs),
        rows=rows,
        step=take_step(form, scores, coefficients, rule),
        held=form.held,
        names=names,
        is_tied=is_tied,
    )


def _find_remainder(
    coefficients: Tensor, dictionary: Tensor, bias: Tensor | None, outputs: Tensor
) -> Tensor | None:
    """What ``outputs`` (T, hidden_size) are beside the record, or None if that is rounding."""
    written = coefficients @ dictionary
    if bias is not None:
        written = written + bias
    remainder = outputs - written
    if remainder.norm() <= REMAINDER * outputs.norm():
        return None
    return remainder
