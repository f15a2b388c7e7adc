#!/usr/bin/env python3
"""Circuits scored: how few units keep a logit gap, and whether a graph foretells ablations.

On prompts made from templates, each with a right and a wrong next token, of which a model has to
prefer the right one:

* circuit size: the least number of pairs of unit and token with which the gap between both logits
  is back by 80%, to either side, from where it is when all coefficients are their means over text.
  Pairs are taken in the order of |gradient · (coefficient − mean)|, the same rule for all models.
* completeness: for the most influential units of the pruned graph, the correlation of the change
  of the gap that the graph's signed paths foretell with what setting the coefficient to zero does.

    python scripts/experiments/graph_scores.py TEACHER STUDENT … \\
        --text recipes/text/books-test.txt --out recipes/results/graphs/scores.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import torch
import typer
from graph_questions import TASKS, make_questions
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_kernel_ffn.checkpoint_code.record import ReadableFFN
from hf_kernel_ffn.families.lookup import find_stock_ffn
from hf_kernel_ffn.families.weights import read_stock_weights
from hf_kernel_ffn.reading.graph import Graph, attribution_graph, influences, prune
from hf_kernel_ffn.reading.graph.targets import find_token
from hf_kernel_ffn.reading.model_parts import has_tied_rows, list_ffn_paths
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_model, load_tokenizer
from hf_kernel_ffn.text.packing import read_token_ids

KEPT = 0.8
"""Share of the way back to the gap that a circuit has to make."""
ABLATED = 16
"""Units of each graph that are set to zero, one at a time."""


class Layer(NamedTuple):
    """An FFN as coefficients over a dictionary, both with gradients."""

    module: nn.Module
    coefficients: Callable[[Tensor], Tensor]
    dictionary: Tensor
    """(units, hidden_size)."""
    bias: Tensor | float
    skip: nn.Module | None
    """The linear map beside the mixture."""


def read_layers(model: PreTrainedModel) -> list[Layer]:
    """The FFNs of ``model``, stock or converted, whose unit of counting is the teacher's unit where
    rows are tied, and else the prototype."""
    layers = []
    for path in list_ffn_paths(model):
        ffn = model.base_model.get_submodule(path)
        if isinstance(ffn, ReadableFFN):
            record = ffn.readout(torch.zeros(1, model.config.hidden_size))
            count = len(record.dictionary) // (2 if has_tied_rows(ffn) else 1)
            bias = 0.0 if record.bias is None else record.bias
            skip = getattr(ffn, "skip", None)
            dictionary = record.dictionary[:count].detach()
            layers.append(Layer(ffn, ffn.coefficients, dictionary, bias, skip))
            continue
        weights = read_stock_weights(model, find_stock_ffn(model, path))
        bias = 0.0 if weights.down_bias is None else weights.down_bias
        layers.append(Layer(ffn, weights.coefficients, weights.down, bias, None))
    return layers


Change = Callable[[int, Tensor], Tensor]
"""(layer, coefficients (1, T, units)) to other coefficients."""


@contextmanager
def changed(layers: list[Layer], change: Change) -> Iterator[None]:
    """Let ``change`` have its way with all coefficients while the context is open."""

    def make_hook(number: int, layer: Layer) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        def write(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            coefficients = change(number, layer.coefficients(args[0]))
            written = coefficients.to(output.dtype) @ layer.dictionary + layer.bias
            return written if layer.skip is None else written + layer.skip(args[0])

        return write

    handles = [
        layer.module.register_forward_hook(make_hook(number, layer))
        for number, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_means(model: PreTrainedModel, layers: list[Layer], ids: Tensor) -> list[Tensor]:
    """(units,) the mean coefficients of every layer over ``ids`` (rows, length)."""
    sums: list[Tensor] = [torch.zeros(len(layer.dictionary)) for layer in layers]

    def add(number: int, coefficients: Tensor) -> Tensor:
        sums[number] += coefficients.sum((0, 1))
        return coefficients

    with changed(layers, add):
        for row in ids.split(4):
            model(input_ids=row)
    return [total / ids.numel() for total in sums]


def measure_gap(model: PreTrainedModel, ids: Tensor, right: int, wrong: int) -> Tensor:
    """The gap between two logits after ``ids`` (T,)."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, -1]
    return logits[right] - logits[wrong]


def count_circuit(
    model: PreTrainedModel,
    layers: list[Layer],
    means: list[Tensor],
    ids: Tensor,
    answers: tuple[int, int],
) -> int:
    """The least number of pairs, by the order of their first-order effects, with which the gap is
    back; to 2%, and by bisection, so that it may be missed where the gap comes and goes."""
    held: dict[int, Tensor] = {}

    def hold(number: int, coefficients: Tensor) -> Tensor:
        held[number] = coefficients.detach().requires_grad_()
        # The gradient of what is written, by way of later layers too.
        return held[number] + (coefficients - coefficients.detach())

    with changed(layers, hold), torch.enable_grad():
        gap = measure_gap(model, ids, *answers)
        gradients = torch.autograd.grad(gap, [held[number] for number in range(len(layers))])
    effects = torch.cat(
        [
            (gradient * (held[number].detach() - means[number])).abs().flatten()
            for number, gradient in enumerate(gradients)
        ]
    )
    rank = torch.empty(len(effects), dtype=torch.int64)
    rank[effects.argsort(descending=True)] = torch.arange(len(effects))
    ranks = rank.split([held[number].numel() for number in range(len(layers))])

    @torch.no_grad()
    def keep(count: int) -> float:
        def cut(number: int, coefficients: Tensor) -> Tensor:
            is_kept = (ranks[number] < count).view_as(coefficients)
            return torch.where(is_kept, coefficients, means[number])

        with changed(layers, cut):
            return measure_gap(model, ids, *answers).item()

    allowed = (1 - KEPT) * abs(gap.item() - keep(0))

    def suffices(count: int) -> bool:
        return abs(keep(count) - gap.item()) <= allowed

    low = 0
    high = 1
    while high < len(effects) and not suffices(high):
        low = high
        high *= 2
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        if suffices(middle):
            high = middle
        else:
            low = middle
    return min(high, len(effects))


@torch.no_grad()
def foretell(graph: Graph) -> Tensor:
    """(E,) the change of the first logit if each node with inputs were zero, by all signed paths.

    A node that loses part of its inputs loses so much of its value, and passes on that share.
    """
    count = len(graph.edges)
    edges = graph.edges[:, :count].double()
    passed_on = edges / graph.values()[None]
    effects = torch.linalg.solve(torch.eye(count, dtype=torch.float64) - passed_on, edges)
    return -effects[0]


@torch.no_grad()
def compare_ablations(
    model: PreTrainedModel, layers: list[Layer], graph: Graph, ids: Tensor, answers: tuple[int, int]
) -> list[tuple[float, float]]:
    """For the most influential units: the change of the gap as foretold, and as it is."""
    gap = measure_gap(model, ids, *answers).item()
    foretold = foretell(graph)
    order = influences(graph).argsort(descending=True).tolist()
    units = [place for place in order if graph.nodes[place].kind == "unit"][:ABLATED]
    pairs = []
    for place in units:
        node = graph.nodes[place]

        def silence(number: int, coefficients: Tensor, node=node) -> Tensor:  # noqa: ANN001
            if number != node.layer:
                return coefficients
            coefficients = coefficients.clone()
            coefficients[0, node.position, node.number] = 0.0
            return coefficients

        with changed(layers, silence):
            pairs.append((foretold[place].item(), measure_gap(model, ids, *answers).item() - gap))
    return pairs


def correlate(pairs: list[tuple[float, float]]) -> float | None:
    """Pearson's correlation; None of fewer than three pairs."""
    if len(pairs) < 3:
        return None
    return torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1].item()


def main(
    models: Annotated[list[str], typer.Argument(help="the teacher, then students of it")],
    text: Annotated[str, typer.Option(help="ordinary text, for means")],
    out: Annotated[Path, typer.Option(help="where to write figures")],
    prompts: Annotated[int, typer.Option(min=1, help="of each task")] = 50,
    graphs: Annotated[int, typer.Option(min=0, help="prompts of each task with a graph")] = 5,
    nodes: Annotated[int, typer.Option(min=1, help="units of a graph")] = 128,
    tokens: Annotated[int, typer.Option(help="of the text")] = 16_384,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Score the models on the same prompts: those on which all of them prefer the right token."""
    tokenizer = load_tokenizer(models[0])
    loaded = {name: load_model(name).requires_grad_(False) for name in models}
    layers = {name: read_layers(model) for name, model in loaded.items()}
    ids = read_token_ids(tokenizer, [text], 128, tokens)
    means = {name: measure_means(model, layers[name], ids) for name, model in loaded.items()}

    rows = []
    for task in TASKS:
        questions = make_questions(tokenizer, task, prompts, seed)
        asked = []
        for question in questions:
            prompt = torch.tensor(tokenizer(question.prompt)["input_ids"])
            answers = find_token(tokenizer, question.right), find_token(tokenizer, question.wrong)
            with torch.no_grad():
                gaps = [measure_gap(model, prompt, *answers) for model in loaded.values()]
            if min(gaps) > 0:
                asked.append((prompt, answers))
        for name, model in loaded.items():
            counts = []
            pairs: list[tuple[float, float]] = []
            for number, (prompt, answers) in enumerate(asked):
                arguments = model, layers[name], means[name], prompt, answers
                counts.append(count_circuit(*arguments))
                if number < graphs:
                    graph = attribution_graph(
                        model,
                        tokenizer,
                        prompt,
                        target=answers[0],
                        against=answers[1],
                        nodes=nodes,
                    )
                    pairs += compare_ablations(model, layers[name], prune(graph), prompt, answers)
            row = {
                "task": task,
                "model": Path(name).name,
                "prompts": len(asked),
                "of": len(questions),
                "circuit_size": median(counts) if counts else None,
                "ablations": len(pairs),
                "correlation": correlate(pairs),
                "foretold_over_actual": _ratio(pairs),
            }
            rows.append(row)
            typer.echo(json.dumps(row))
    write_text(out, json.dumps(rows, indent=1) + "\n")


def _ratio(pairs: list[tuple[float, float]]) -> float | None:
    """Slope of what is foretold by what happens, through zero."""
    square = sum(actual * actual for _, actual in pairs)
    return sum(one * other for one, other in pairs) / square if square else None


if __name__ == "__main__":
    typer.run(main)
