#!/usr/bin/env python3
"""Circuits scored: how few units keep a logit gap, and whether a graph foretells ablations.

On prompts made from templates, each with a right and a wrong next token, of which a model has to
prefer the right one:

* circuit size: the least number of pairs of unit and token that bring the gap between both logits
  80% of the way back, or further, from where it is when all coefficients are their means over the
  task's prompts of the same length, place by place (or over text, ``--baseline text``). Pairs are
  taken in the order of their first-order effects, the same rule for all models. Prompts for which
  the means have 80% of the gap have no circuit.
* completeness: for the most influential units of the pruned graph, the correlation of the change
  of the gap that the graph's signed paths foretell with what setting the unit to its mean does; and
  beside it that of what the gradient foretells, with attention patterns and norms that move.

A model is a folder, or a file that real_frontier.py saved of a student or control of the first one.

    python scripts/experiments/graph_scores.py TEACHER STUDENT … \\
        --out recipes/results/graphs/scores.json
"""

from __future__ import annotations

import json
from collections import Counter
from enum import StrEnum
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any, NamedTuple, Optional

import torch
import typer
from graph_circuits import (
    Asked,
    Layer,
    changed,
    count_circuit,
    measure_gaps,
    measure_place_means,
    measure_text_means,
    read_layers,
)
from graph_questions import TASKS, make_questions
from real_frontier_saved import load_any, shorten
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kernel_ffn.evaluation.baselines import TeacherFFN, Transcoder
from hf_kernel_ffn.reading.graph import (
    Graph,
    attribution_graph,
    influences,
    measure_effects,
    prune,
)
from hf_kernel_ffn.reading.graph.targets import find_token
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_tokenizer
from hf_kernel_ffn.text.packing import read_token_ids
from hf_kernel_ffn.text.prompts import encode_prompt
from hf_kernel_ffn.text.text_format import TextFormat

FEWEST = 8
"""Prompts of one length that a mean is taken over; tasks have no others."""
ABLATED = 16
"""Units of each graph that are set to their mean, one at a time."""


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


class Ablation(NamedTuple):
    """How much the gap changes when a unit is set to its mean."""

    by_graph: float
    by_gradient: float
    actual: float


@torch.no_grad()
def compare_ablations(
    model: PreTrainedModel,
    layers: list[Layer],
    means: list[Tensor],
    graph: Graph,
    asked: Asked,
) -> list[Ablation]:
    """For the most influential units: the change of the gap as foretold, and as it is, when one is
    set to its mean. Those that are at their mean, as all at the start token, are not among them."""
    gap = measure_gaps(model, asked.ids[None], asked).item()
    graph = measure_effects(graph, model)
    foretold = foretell(graph)
    at_mean: dict[int, Tensor] = {}
    ways = torch.zeros(len(graph.edges), dtype=torch.float64)
    for place, node in enumerate(graph.nodes[: len(ways)]):
        if node.kind == "unit":
            # Over text, a mean is the same at every place.
            by_place = means[node.layer].expand(len(asked.ids), -1)
            at_mean[place] = by_place[node.position, node.number]
            ways[place] = 1 - at_mean[place].item() / node.value
    order = (influences(graph)[: len(ways)] * ways.abs()).argsort(descending=True)

    ablations = []
    for place in order[:ABLATED].tolist():
        node = graph.nodes[place]
        if not ways[place]:
            break
        mean = at_mean[place]

        def set_to_mean(number: int, coefficients: Tensor, node=node, mean=mean) -> Tensor:  # noqa: ANN001
            if number != node.layer:
                return coefficients
            coefficients = coefficients.clone()
            coefficients[0, node.position, node.number] = mean
            return coefficients

        with changed(layers, set_to_mean):
            changed_gap = measure_gaps(model, asked.ids[None], asked).item()
        by_graph = (foretold[place] * ways[place]).item()
        by_gradient = graph.effects[place] * ways[place].item()
        ablations.append(Ablation(by_graph, by_gradient, changed_gap - gap))
    return ablations


def correlate(foretold: list[float], actual: list[float]) -> float | None:
    """Pearson's correlation; None of fewer than three pairs."""
    if len(actual) < 3:
        return None
    pairs = torch.tensor([foretold, actual], dtype=torch.float64)
    return torch.corrcoef(pairs)[0, 1].item()


class Scored(NamedTuple):
    """A model with what is needed to change it."""

    name: str
    model: PreTrainedModel
    layers: list[Layer]
    text_means: list[Tensor] | None
    """Over ordinary text, where they are the baseline."""

    @property
    def has_graphs(self) -> bool:
        """Whether graphs of it can be made: controls have none."""
        return not isinstance(self.layers[0].module, (TeacherFFN, Transcoder))

    def measure_means(self, questions: list[Asked]) -> dict[int, list[Tensor]]:
        """What coefficients are set to, by the length of the prompt."""
        lengths = {len(each.ids) for each in questions}
        if self.text_means is not None:
            return dict.fromkeys(lengths, self.text_means)
        means = {}
        for length in lengths:
            ids = torch.stack([each.ids for each in questions if len(each.ids) == length])
            means[length] = measure_place_means(self.model, self.layers, ids)
        return means


def load_models(names: list[str], text: Tensor | None, first: int) -> list[Scored]:
    """The teacher and the others, with means over ``text`` (rows, length) from ``first`` on."""
    scored = []
    for name in names:
        model = load_any(name, names[0]).requires_grad_(False)
        layers = read_layers(model)
        means = None if text is None else measure_text_means(model, layers, text, first)
        scored.append(Scored(shorten(name), model, layers, means))
    return scored


def ask_all(
    tokenizer: PreTrainedTokenizerBase, task: str, count: int, seed: int, text_format: TextFormat
) -> list[Asked]:
    """``count`` questions of a ``task`` as token ids, or fewer, none of a rare length."""
    asked = []
    for question in make_questions(tokenizer, task, 2 * count, seed):
        ids = encode_prompt(tokenizer, question.prompt, text_format)
        right, wrong = (
            find_token(tokenizer, answer) for answer in (question.right, question.wrong)
        )
        asked.append(Asked(torch.tensor(ids), right, wrong, begins_with_start(tokenizer, ids)))
    lengths = Counter(len(each.ids) for each in asked)
    usual = [each for each in asked if lengths[len(each.ids)] >= min(FEWEST, count)]
    return usual[:count]


def begins_with_start(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """1 if ``ids`` begin with the start token, else 0."""
    return int(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)


def score(
    scored: Scored,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[Asked],
    means: dict[int, list[Tensor]],
    *,
    graphs: int,
    nodes: int,
) -> dict[str, Any]:
    """The figures of one model on one task, of the first ``graphs`` questions with graphs."""
    model = scored.model
    found = [count_circuit(model, scored.layers, means[len(one.ids)], one) for one in asked]
    counts = [count for count in found if count is not None]
    ablations: list[Ablation] = []
    for one in asked[:graphs] if scored.has_graphs else []:
        graph = attribution_graph(
            model, tokenizer, one.ids, target=one.right, against=one.wrong, nodes=nodes
        )
        at_mean = means[len(one.ids)]
        ablations += compare_ablations(model, scored.layers, at_mean, prune(graph), one)
    by_graph, by_gradient, actual = (
        [ablation[part] for ablation in ablations] for part in range(3)
    )
    return {
        "model": scored.name,
        "circuits": len(counts),
        "circuit_size": median(counts) if counts else None,
        "quartiles": quantiles(counts, n=4)[::2] if len(counts) > 3 else None,
        "ablations": len(ablations),
        "correlation": correlate(by_graph, actual),
        "foretold_over_actual": _ratio(by_graph, actual),
        "correlation_of_gradient": correlate(by_gradient, actual),
    }


class Baseline(StrEnum):
    """What coefficients outside a circuit are set to."""

    TASK = "task"
    TEXT = "text"


def main(
    models: Annotated[list[str], typer.Argument(help="the teacher, then students of it")],
    out: Annotated[Path, typer.Option(help="where to write figures")],
    baseline: Annotated[Baseline, typer.Option(help="that means are taken over")] = Baseline.TASK,
    text: Annotated[str, typer.Option(help="ordinary text")] = "recipes/text/books-test.txt",
    prompts: Annotated[int, typer.Option(min=1, help="of each task")] = 50,
    graphs: Annotated[int, typer.Option(min=0, help="prompts of each task with a graph")] = 5,
    nodes: Annotated[int, typer.Option(min=1, help="units of a graph")] = 128,
    tokens: Annotated[int, typer.Option(help="of the text")] = 16_384,
    bos: Annotated[str, typer.Option(help="auto, always or never a start token")] = "auto",
    only: Annotated[
        Optional[list[str]],
        typer.Option(help="score this one of the models, which all choose the prompts"),
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Score the models on the same prompts: those on which all of them prefer the right token."""
    tokenizer = load_tokenizer(models[0])
    text_format = TextFormat(bos=bos)
    ids = None
    first = 0
    if baseline is Baseline.TEXT:
        ids = read_token_ids(tokenizer, [text], 128, tokens, text_format)
        first = begins_with_start(tokenizer, ids[0].tolist())
    all_scored = load_models(models, ids, first)

    rows = []
    for task in TASKS:
        questions = ask_all(tokenizer, task, prompts, seed, text_format)
        prefers = torch.tensor([find_right(scored.model, questions) for scored in all_scored])
        common = prefers.all(0).tolist()
        asked = [one for one, is_common in zip(questions, common, strict=True) if is_common]
        for scored, own in zip(all_scored, prefers, strict=True):
            if only and scored.name not in only:
                continue
            means = scored.measure_means(questions)
            figures = score(scored, tokenizer, asked, means, graphs=graphs, nodes=nodes)
            of = {"prompts": len(asked), "of": len(questions), "right": int(own.sum())}
            rows.append({"task": task, "baseline": baseline, **of, **figures})
            typer.echo(json.dumps(rows[-1]))
            write_text(out, json.dumps(rows, indent=1) + "\n")


@torch.no_grad()
def find_right(model: PreTrainedModel, questions: list[Asked]) -> list[bool]:
    """Whether ``model`` prefers the right token, by question."""
    return [measure_gaps(model, one.ids[None], one).item() > 0 for one in questions]


def _ratio(foretold: list[float], actual: list[float]) -> float | None:
    """Slope of what is foretold by what happens, through zero."""
    square = sum(each * each for each in actual)
    products = (one * other for one, other in zip(foretold, actual, strict=True))
    return sum(products) / square if square else None


if __name__ == "__main__":
    typer.run(main)
