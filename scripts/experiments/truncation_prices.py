#!/usr/bin/env python3
"""Which units should a sparse FFN keep: those that write most, or those that matter most?

The teacher's own FFNs are truncated, untrained, by two rules of the same form, one threshold a
layer on |c_i| times a price of the unit:

* length: ‖v_i‖, the rule of the package;
* fisher: √(v_i · F v_i), F the Fisher information of the predictions about what the layer writes,
  E[g gᵀ] of the gradient g of the log-probability of a token that the model itself draws.

    python scripts/experiments/truncation_prices.py runs/smollm2 --test recipes/text/books-test.txt
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Annotated

import torch
import typer
from real_fidelity import compare, read_rows
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_kernel_ffn import load_teacher, load_tokenizer
from hf_kernel_ffn.conversion.sampling import read_fit_sample
from hf_kernel_ffn.evaluation.baselines import TeacherFFN, teacher_as_student
from hf_kernel_ffn.families.lookup import find_stock_ffn
from hf_kernel_ffn.families.weights import read_stock_weights

ROWS_AT_ONCE = 4


class PricedFFN(TeacherFFN):
    """A truncated FFN whose units have prices in place of their lengths."""

    prices: Tensor

    def loudness(self, coefficients: Tensor) -> Tensor:
        """|c_i| times the price, (..., units)."""
        return coefficients.detach().abs() * self.prices


def measure_fisher(
    teacher: PreTrainedModel, paths: list[str], ids: Tensor, seed: int
) -> dict[str, Tensor]:
    """(hidden_size, hidden_size) by path: Σ g gᵀ over the tokens of ``ids`` (rows, length) but the
    first of each row."""
    generator = torch.Generator().manual_seed(seed)
    written: dict[str, Tensor] = {}
    embedding = teacher.get_input_embeddings()
    sums: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in paths:
            last = find_stock_ffn(teacher, path).output_path
            handle = teacher.base_model.get_submodule(last).register_forward_hook(
                lambda module, args, output, path=path: written.update({path: output})
            )
            stack.callback(handle.remove)
        for rows in ids.split(ROWS_AT_ONCE):
            inputs = embedding(rows).detach().requires_grad_()
            logits = teacher(inputs_embeds=inputs, use_cache=False).logits.flatten(0, 1)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
            gradients = torch.autograd.grad(loss, [written[path] for path in paths])
            for path, gradient in zip(paths, gradients, strict=True):
                later = gradient[:, 1:].flatten(0, 1)
                sums[path] = sums.get(path, torch.zeros(())) + later.T @ later
    return sums


def main(
    teacher: Annotated[str, typer.Argument(help="local folder or hub id")],
    test: Annotated[list[str], typer.Option(help="held-out text; may be given several times")],
    train: Annotated[
        str, typer.Option(help="text for thresholds and prices")
    ] = "recipes/text/books-distil.txt",
    count: Annotated[int, typer.Option(help="active units per token and layer")] = 192,
    tokens: Annotated[int, typer.Option(help="of every text")] = 4096,
    seed: int = 0,
) -> None:
    """Print the fidelity of both rules on every test text."""
    model = load_teacher(teacher).requires_grad_(False)
    tokenizer = load_tokenizer(teacher)
    ids = read_rows(tokenizer, train, tokens, spread=True)
    tests = {name: read_rows(tokenizer, name, tokens) for name in test}

    student = teacher_as_student(model, ids=ids, simplex="threshold", top_k=count)
    ffns = student.kernel_ffns()
    fisher = measure_fisher(model, list(ffns), ids, seed)
    for rule in ("length", "fisher"):
        for path, ffn in ffns.items():
            dictionary = ffn.output_prototypes.weight.detach()
            priced = dictionary if rule == "length" else fisher[path] @ dictionary
            weights = read_stock_weights(model, find_stock_ffn(model, path))
            truncated = PricedFFN(weights, "threshold", count)
            truncated.prices = (dictionary * priced).sum(0).clamp_min(0).sqrt()
            truncated.fit_threshold(read_fit_sample(model, path, ids))
            student.base_model.set_submodule(path, truncated)
        figures = {name: compare(student, model, rows) for name, rows in tests.items()}
        typer.echo(json.dumps({"rule": rule, "count": count, **figures}))


if __name__ == "__main__":
    typer.run(main)
