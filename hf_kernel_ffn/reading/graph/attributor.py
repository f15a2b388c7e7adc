"""Rows of exact edges: what every source of a pass adds to one node."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model_parts import list_ffn_paths
from .frozen_pass import FrozenPass, Leaf, run_frozen
from .sources import SourceTable
from .units import Units, read_units

ROUNDING = 1e-3
"""What no edge accounts for is rounding up to this share of the edges' sizes; beyond, it is an edge
from the remainder of the node's layer and token."""


class Target(NamedTuple):
    """A node whose inputs are asked for."""

    kind: str
    """unit, head or logit."""
    layer: int
    """Its block; the number of blocks for a logit."""
    position: int
    number: int
    """The unit or head; the token of a logit."""


class EdgeRows(NamedTuple):
    """Edges into B targets from all S sources: ``sums + gaps = values``."""

    edges: Tensor
    """(B, S)."""
    sums: Tensor
    """(B,) float64 of the edges."""
    sizes: Tensor
    """(B,) float64 of the edges' absolute values."""
    values: Tensor
    """(B,) float64: coefficients, logits, or the lengths of what heads wrote."""
    gaps: Tensor
    """(B,) float64: rounding."""


class Attributor:
    """A frozen pass with the units of all FFNs, from which rows of edges are read."""

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        *,
        heads: bool,
        rule: str,
        against: int | None,
        folds_start: bool,
    ):
        """Run ``model`` over ``ids`` (T,).

        Args:
            heads: whether heads are nodes.
            rule: of the step from scores to coefficients.
            against: token whose logit is subtracted; None for the mean over the vocabulary.
            folds_start: whether the units and heads of the first token are one source a layer.
        """
        self.folds_start = folds_start
        self.name = _name_model(model)
        self.passed: FrozenPass = run_frozen(model, ids, heads)
        self.units: list[Units] = []
        for path in list_ffn_paths(model):
            inputs = self.passed.ffn_inputs[path].detach()[0]
            outputs = self.passed.ffn_outputs[path][0]
            self.units.append(read_units(model, path, inputs, outputs, rule))
        self.head_count = model.config.num_attention_heads
        self.against = against
        self.table = SourceTable(
            len(ids),
            [len(units.dictionary) for units in self.units],
            self.head_count if heads else 0,
        )
        self.final_logits = self.passed.logits[0, -1]

    def read_rows(self, targets: list[Target]) -> EdgeRows:
        """The edges into ``targets``."""
        outputs, seeds, values = self._make_seeds(targets)
        gradients = self.passed.pull_back(outputs, seeds)
        rows = self.final_logits.new_zeros(len(targets), self.table.total)
        for leaf, gradient in zip(self.passed.leaves, gradients, strict=True):
            if gradient is not None:
                self._add_leaf(rows, leaf, gradient)
        self._add_own_parts(rows, targets)

        # Row by row: a sum in float64 copies what it sums.
        sums = torch.stack([row.sum(dtype=torch.float64) for row in rows]).cpu()
        sizes = torch.stack([row.abs().sum() for row in rows]).double().cpu()
        gaps = values - sums
        for number, target in enumerate(targets):
            if gaps[number].abs() > ROUNDING * sizes[number]:
                place = self.table.number("remainder", target.layer, target.position)
                rows[number, place] += gaps[number].to(rows)
                sums[number] += gaps[number]
                sizes[number] += gaps[number].abs()
                gaps[number] = 0.0
        return EdgeRows(rows, sums, sizes, values, gaps)

    @torch.no_grad()
    def _make_seeds(self, targets: list[Target]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What is pulled back of which tensors, and the targets' values."""
        outputs: dict[tuple[str, int], Tensor] = {}
        seeds: dict[tuple[str, int], Tensor] = {}
        values = torch.zeros(len(targets), dtype=torch.float64)
        for number, target in enumerate(targets):
            key = target.kind, target.layer
            if key not in outputs:
                outputs[key] = self._get_output(target)
                seeds[key] = outputs[key].new_zeros(len(targets), *outputs[key].shape)
            if target.kind == "logit":
                row, value = self._seed_logit(target)
                seeds[key][number] = row
            elif target.kind == "head":
                place, row, value = self._seed_head(target)
                seeds[key][number, 0, target.position, place] = row
            else:
                units = self.units[target.layer]
                row = units.direction(target.position, target.number)
                value = units.coefficients[target.position, target.number].item()
                seeds[key][number, 0, target.position] = row
            values[number] = value
        return list(outputs.values()), list(seeds.values()), values

    def _get_output(self, target: Target) -> Tensor:
        """The tensor of the pass that ``target`` reads."""
        if target.kind == "logit":
            return self.final_logits
        if target.kind == "head":
            return self.passed.heads[target.layer]
        return self.passed.ffn_inputs[self.units[target.layer].path]

    def _seed_logit(self, target: Target) -> tuple[Tensor, float]:
        """A token's logit less the mean over the vocabulary, or less that of another token."""
        logits = self.final_logits.detach()
        row = torch.zeros_like(logits)
        if self.against is None:
            row -= 1 / len(row)
            row[target.number] += 1.0
            value = logits[target.number].double() - logits.double().mean()
        else:
            row[target.number] += 1.0
            row[self.against] -= 1.0
            value = logits[target.number].double() - logits[self.against].double()
        return row, value.item()

    def _seed_head(self, target: Target) -> tuple[slice, Tensor, float]:
        """The direction of what a head wrote, which is held, and its length."""
        written = self.passed.heads[target.layer].detach()[0, target.position]
        size = len(written) // self.head_count
        place = slice(target.number * size, (target.number + 1) * size)
        length = written[place].norm()
        tiny = torch.finfo(length.dtype).tiny
        return place, written[place] / length.clamp_min(tiny), length.item()

    @torch.no_grad()
    def _add_leaf(self, rows: Tensor, leaf: Leaf, gradient: Tensor) -> None:
        """Add what ``leaf`` writes along ``gradient`` (B, *its shape) to ``rows`` (B, S)."""
        if leaf.kind == "ffn":
            self._add_ffn(rows, leaf.layer, gradient[:, 0])
            return
        if leaf.tensor.ndim == 1:
            last = self.table.tokens - 1
            rows[:, self.table.number("bias", leaf.layer, last)] += gradient @ leaf.tensor
            return
        products = (gradient * leaf.tensor)[:, 0]
        if leaf.kind == "head":
            products = products.unflatten(-1, (self.head_count, -1))
        rows[:, self.table.place(leaf.kind, leaf.layer)] += products.sum(-1).flatten(1)
        if leaf.kind == "head":
            self._fold_start(rows, "head", leaf.layer)

    def _add_ffn(self, rows: Tensor, layer: int, gradient: Tensor) -> None:
        """Add what the units of an FFN write along ``gradient`` (B, T, hidden_size)."""
        units = self.units[layer]
        edges = (gradient @ units.dictionary.T).mul_(units.coefficients)
        rows[:, self.table.place("unit", layer)] = edges.flatten(1)
        self._fold_start(rows, "unit", layer)
        if units.bias is not None:
            rows[:, self.table.place("bias", layer)] += gradient @ units.bias
        if units.remainder is not None:
            written = (gradient * units.remainder).sum(-1)
            rows[:, self.table.place("remainder", layer)] += written

    def _fold_start(self, rows: Tensor, kind: str, layer: int) -> None:
        """Make the layer's sources of one kind at the first token one, if that is asked for."""
        if not self.folds_start:
            return
        begin = self.table.number(kind, layer, 0)
        end = self.table.number(kind, layer, 1)
        rows[:, self.table.number("start", layer, 0)] += rows[:, begin:end].sum(-1)
        rows[:, begin:end] = 0.0

    def _add_own_parts(self, rows: Tensor, targets: list[Target]) -> None:
        """Add what units owe to their own biases and baseline, and what their step leaves."""
        for number, target in enumerate(targets):
            if target.kind != "unit":
                continue
            units = self.units[target.layer]
            bias = self.table.number("bias", target.layer, target.position)
            rows[number, bias] += units.constant(target.position, target.number)
            rest = units.step.rest[target.position, target.number]
            remainder = self.table.number("remainder", target.layer, target.position)
            rows[number, remainder] += rest


def _name_model(model: PreTrainedModel) -> str:
    """The folder or repository that ``model`` came from, or its class."""
    name = getattr(model.config, "_name_or_path", "") or ""
    return Path(name).name or type(model).__name__
