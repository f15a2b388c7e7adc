"""The plans by which transformers shards a model, after its FFNs were replaced.

A plan maps patterns of names to styles. In a pattern ``*`` stands for every number: transformers
puts it for the numbers of a name before it looks the name up, so that no entry can name one layer.
A stock plan has entries for the stock FFNs. Where these are gone, so are their entries, and where
rows are tied, there are others instead:

    input_prototypes, value_proj    colwise: each process has the rows of its own units
    pieces                          their last dimension, the units: the style of rowwise weights
    output_prototypes               rowwise: outputs are summed, then the bias is added once
    log_ratio                       no entry: every process has all of it

Coefficients of tied rows are of their unit alone, so this is exact. Shares of free rows are over
all of them: they have no entries, and every process computes them whole.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from .compat import get_parallel_plan, set_parallel_plan
from .experts import KernelExperts
from .ffn import KernelFFN
from .tied import AnyKernelFFN, TiedKernelFFN

NUMBER = re.compile(r"\.\d+(?=\.|$)")
"""A number that is a name of its own, as transformers finds it."""

Style = TypeVar("Style")


def fit_plans(model: nn.Module) -> None:
    """Let the plans of ``model``, and of the models in it, name what is there.

    Plans of tensor parallelism gain entries for tied rows, on the models and on their configs.
    Those of experts lose the entries of experts that were converted. config.json holds no plan.
    """
    fitted_configs: list[object] = []
    for module in model.modules():
        tensor_plan = get_parallel_plan(module, "tp")
        if tensor_plan:
            set_parallel_plan(module, "tp", _fit_tensor_plan(module, tensor_plan))
        expert_plan = get_parallel_plan(module, "ep")
        if expert_plan:
            set_parallel_plan(module, "ep", keep_valid_entries(module, expert_plan))

        config: Any = getattr(module, "config", None)
        is_base = getattr(module, "base_model", None) is module
        stock_plan = getattr(type(config), "base_model_tp_plan", None)
        # A part of a base model may have the same config: the plan is of the whole.
        if is_base and stock_plan and not any(config is fitted for fitted in fitted_configs):
            config.base_model_tp_plan = _fit_tensor_plan(module, stock_plan)
            fitted_configs.append(config)


def _fit_tensor_plan(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    return {**keep_valid_entries(model, plan), **name_tied_entries(model)}


def keep_valid_entries(model: nn.Module, plan: Mapping[str, Style]) -> dict[str, Style]:
    """The entries of ``plan`` that name a module or parameter of ``model``.

    Without those that are around a converted FFN in some layer: they would sum its output over
    the processes once more. Where other layers have a stock FFN there, it goes unsharded.
    """
    replaced = {_make_pattern(path) for path in _find_replaced_paths(model)}
    blocked = [pattern for pattern in plan if pattern in replaced]

    valid = {}
    patterns = _list_patterns(model)
    for pattern, style in plan.items():
        is_blocked = any(f"{pattern}.".startswith(f"{parent}.") for parent in blocked)
        if pattern in patterns and not is_blocked:
            valid[pattern] = style
    return valid


def name_tied_entries(model: nn.Module) -> dict[str, str]:
    """Entries for the converted FFNs of ``model`` whose rows are tied.

    Layers of one pattern share their entries: there are none if rows of one of them are free.
    """
    ffns = _find_ffns(model)
    free = {_make_pattern(path) for path, ffn in ffns.items() if isinstance(ffn, KernelFFN)}

    entries: dict[str, str] = {}
    for path, ffn in ffns.items():
        pattern = _make_pattern(path)
        if pattern in free or not isinstance(ffn, TiedKernelFFN):
            continue
        entries[f"{pattern}.input_prototypes"] = "colwise"
        if ffn.config.gated:
            entries[f"{pattern}.value_proj"] = "colwise"
        for name in ffn.pieces:
            entries[f"{pattern}.pieces.{name}"] = "rowwise"
        entries[f"{pattern}.output_prototypes"] = "rowwise"
    return entries


def _find_ffns(model: nn.Module) -> dict[str, AnyKernelFFN]:
    """The converted FFNs by their path under ``model``."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (KernelFFN, TiedKernelFFN))
    }


def _find_replaced_paths(model: nn.Module) -> list[str]:
    """Paths under ``model`` where something else stands than in the stock model."""
    paths = []
    for path, module in model.named_modules():
        if isinstance(module, (KernelExperts, KernelFFN, TiedKernelFFN)):
            paths.append(path)
        if isinstance(module, nn.Identity):  # what a readout has absorbed
            paths.append(path)
    return paths


def _list_patterns(model: nn.Module) -> set[str]:
    """The pattern of every module and parameter of ``model``."""
    names = [name for name, _ in model.named_modules()]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {_make_pattern(name) for name in names}


def _make_pattern(name: str) -> str:
    """``name`` with ``*`` for its numbers, as transformers looks it up."""
    return NUMBER.sub(".*", name)
