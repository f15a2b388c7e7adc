"""What a graph does not hold: how a logit moves when a unit is taken away and all else follows.

A graph holds attention patterns and the scales of norms, and so describes the prompt. Taking a unit
away moves both. To first order what then happens is a gradient of the model as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...checkpoint_code.record import ReadableFFN
from ...families.lookup import find_stock_ffn
from ..model_parts import get_embedding_weight, list_ffn_paths
from .frozen_pass import freeze_parameters
from .graph import Graph
from .units import Units, read_units


class _Pass:
    """What the FFNs of a pass read and wrote, by path, and a zero beside what each wrote."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.zeros: dict[str, Tensor] = {}


def measure_effects(graph: Graph, model: PreTrainedModel) -> Graph:
    """Give every unit of ``graph`` its effect on the first logit, less that of ``against``.

    That is how much the logit changes, to first order, when the unit writes nothing: minus what it
    writes, times the gradient of the logit, with attention patterns and norms following. A unit
    that is set to another coefficient has the same share of it. Where effects and edges disagree,
    the unit acts through what the graph holds.

    Returns:
        the graph with ``effects``; nan for all nodes but units.
    """
    paths = list_ffn_paths(model)
    seen = _Pass()
    ids = torch.tensor(graph.ids, device=get_embedding_weight(model).device)
    with ExitStack() as stack:
        stack.enter_context(freeze_parameters(model.eval()))
        stack.enter_context(_watch_ffns(model, paths, seen))
        stack.enter_context(torch.enable_grad())
        logits = model(input_ids=ids[None], use_cache=False).logits[0, -1]
        other = logits.mean() if graph.against is None else logits[graph.against]
        gap = logits[graph.nodes[0].number] - other
        gradients = torch.autograd.grad(gap, [seen.zeros[path] for path in paths])

    layers = sorted({node.layer for node in graph.nodes if node.kind == "unit"})
    units = {
        layer: read_units(
            model,
            paths[layer],
            seen.inputs[paths[layer]][0],
            seen.outputs[paths[layer]][0],
            graph.rule,
        )
        for layer in layers
    }
    effects = [
        _measure_unit(units[node.layer], gradients[node.layer][0], node.position, node.number)
        if node.kind == "unit"
        else float("nan")
        for node in graph.nodes
    ]
    return replace(graph, effects=effects)


def _measure_unit(units: Units, gradient: Tensor, token: int, unit: int) -> float:
    """Minus what a unit writes, times the ``gradient`` (T, hidden_size)."""
    written = units.coefficients[token, unit] * units.dictionary[unit]
    return -(written.double() @ gradient[token].double()).item()


@contextmanager
def _watch_ffns(model: PreTrainedModel, paths: list[str], seen: _Pass) -> Iterator[None]:
    """Note in ``seen`` what the FFNs at ``paths`` read and write while the context is open."""
    handles = []
    try:
        for path in paths:
            ffn = model.base_model.get_submodule(path)
            last = ffn
            if not isinstance(ffn, ReadableFFN):
                last = model.base_model.get_submodule(find_stock_ffn(model, path).output_path)
            handles += _hook(ffn, last, path, seen)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    ffn: nn.Module, last: nn.Module, path: str, seen: _Pass
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that fill ``seen``; ``last`` is the module whose output is the FFN's."""

    def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.inputs[path] = (args[0] if args else kwargs["hidden_states"]).detach()

    def add_zero(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        zero = torch.zeros_like(output).requires_grad_()
        seen.zeros[path] = zero
        seen.outputs[path] = output.detach()
        return output + zero

    return [
        ffn.register_forward_pre_hook(keep_input, with_kwargs=True),
        last.register_forward_hook(add_zero),
    ]
