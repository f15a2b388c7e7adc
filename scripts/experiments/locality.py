#!/usr/bin/env python3
"""Does distance matter? Converts a teacher by several kernels and initialisers and reads off, on
text, how much the distance term of the kernel varies and what it buys: purity of contexts, support
scores. No training.

"clusters": input prototypes at the k-means centroids of the calibration text's inputs, output
prototypes solved for them. "standardised": the same teacher, written so that every dimension of an
FFN's input has the same spread (and no mean, where the norm has a bias).

    python scripts/experiments/locality.py recipes/teachers/llama \\
        --out recipes/results/llama/locality
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.checkpoint_code.ffn import KernelFFN
from hf_kernel_ffn.conversion.calibration_set import split_fitted_and_held
from hf_kernel_ffn.conversion.ridge import calibrate_ffn
from hf_kernel_ffn.conversion.sampling import read_ffn_inputs, read_fit_sample
from hf_kernel_ffn.evaluation.locality import locality_report
from hf_kernel_ffn.families.hooks import watch_ffn_input
from hf_kernel_ffn.families.lookup import find_stock_ffn, find_stock_ffns
from hf_kernel_ffn.families.registry import get_architecture_of_model
from hf_kernel_ffn.families.weights import FFNWeights, read_stock_weights
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_teacher, load_tokenizer
from hf_kernel_ffn.text.packing import read_token_ids

SETTINGS: dict[str, dict[str, str]] = {
    "half-yat": {},
    "half-yat, data-scale": {"init": "data-scale"},
    "yat": {"kernel": "yat"},
    "yat, data-scale": {"kernel": "yat", "init": "data-scale"},
    "imq, data-scale": {"kernel": "imq"},
    "gaussian, data-scale": {"kernel": "gaussian"},
    "half-yat, firing means": {"init": "firing-means"},
    "yat, firing means": {"kernel": "yat", "init": "firing-means"},
    "imq, firing means": {"kernel": "imq", "init": "firing-means"},
    "gaussian, firing means": {"kernel": "gaussian", "init": "firing-means"},
    "half-yat, firing means, standardised": {"init": "firing-means"},
    "yat, firing means, standardised": {"kernel": "yat", "init": "firing-means"},
    "half-yat, clusters": {"init": "firing-means"},
    "yat, clusters": {"kernel": "yat", "init": "firing-means"},
    "imq, clusters": {"kernel": "imq", "init": "firing-means"},
    "imq, clusters, standardised": {"kernel": "imq", "init": "firing-means"},
}
"""Of KernelFFNConfig, by what is printed."""
HEAD = (
    "| | FVU | denominator varies over units / tokens | its share of log κ "
    "| purity, student / teacher / chance | AUC nearest | AUC mass "
    "| AUC −‖x − mean‖ | AUC −‖x‖ |"
)
"""Of table.md. AUCs are against shuffled and against random tokens."""
SCORES = ("nearest", "mass", "control", "length")
SAME_FUNCTION = 1e-3
"""How far logits of the standardised teacher may be from the teacher's own: rounding."""


def main(
    teacher: Annotated[str, typer.Argument(help="local folder or hub id")],
    out: Annotated[Path, typer.Option(help="folder of locality.json and table.md")],
    train: Annotated[
        str, typer.Option(help="text to calibrate on")
    ] = "recipes/text/books-distil.txt",
    test: Annotated[str, typer.Option(help="text to read")] = "recipes/text/books-test.txt",
    tokens: Annotated[int, typer.Option(help="tokens of each")] = 16_384,
    seed: int = 0,
) -> None:
    """Write the figures of every setting into OUT, and print the table."""
    model = load_teacher(teacher)
    tokenizer = load_tokenizer(teacher)
    calibration = read_token_ids(tokenizer, [train], 256, tokens, spread=True)
    text = read_token_ids(tokenizer, [test], 128, tokens)
    even = standardise(model, calibration)

    reports = {}
    for name in SETTINGS:
        source = even if "standardised" in name else model
        reports[name] = measure(name, source, calibration, text, seed)
        typer.echo(name)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "locality.json", json.dumps(reports, indent=1) + "\n")
    write_text(out / "table.md", format_markdown(reports))
    typer.echo(format_markdown(reports), nl=False)


def measure(
    name: str, teacher: PreTrainedModel, calibration: Tensor, text: Tensor, seed: int
) -> dict[str, Any]:
    """Convert ``teacher`` by the setting ``name``, and take the readings."""
    settings = KernelFFNConfig(**SETTINGS[name])
    student, report = convert(teacher, settings, calibration_ids=calibration, progress=True)
    fvus = [layer["fvu"] for layer in report.layers.values()]
    if "clusters" in name:
        fvus = move_to_clusters(student, teacher, calibration, seed)
    return {"fvu": fmean(fvus), **locality_report(student, teacher, text, seed)}


@torch.no_grad()
def standardise(teacher: PreTrainedModel, ids: Tensor) -> PreTrainedModel:
    """Copy ``teacher`` with unit variance of FFN inputs in every dimension over ``ids``, and zero
    mean where the norm before the FFN has a bias: norm and W_in are written anew, the function
    stays."""
    model = copy.deepcopy(teacher)
    expected = model(ids[:1]).logits
    norms = find_norms(model, ids)
    for path, ffn in find_stock_ffns(model, get_architecture_of_model(model)).items():
        inputs = torch.cat(list(read_ffn_inputs(model, path, ids))).float()
        rescale(norms[path], read_stock_weights(model, ffn), inputs)
    tolerance = {"rtol": SAME_FUNCTION, "atol": SAME_FUNCTION}
    torch.testing.assert_close(model(ids[:1]).logits, expected, **tolerance)
    return model


def find_norms(model: PreTrainedModel, ids: Tensor) -> dict[str, nn.Module]:
    """Find, by the FFN's path, the norm whose output it reads."""
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    norms: dict[str, nn.Module] = {}

    def keep_output(module: nn.Module, args: tuple, output: Tensor) -> None:
        outputs[output.data_ptr()] = (module, output)  # held, so that no other takes its place

    def watch(path: str) -> torch.utils.hooks.RemovableHandle:
        def see(inputs: Tensor) -> None:
            norms[path] = outputs[inputs.data_ptr()][0]

        return watch_ffn_input(model.base_model, path, see)

    hooks = [
        module.register_forward_hook(keep_output)
        for module in model.modules()
        if "Norm" in type(module).__name__
    ]
    hooks += [watch(path) for path in find_stock_ffns(model, get_architecture_of_model(model))]
    model(ids[:1])
    for hook in hooks:
        hook.remove()
    return norms


def rescale(norm: nn.Module, weights: FFNWeights, inputs: Tensor) -> None:
    """Divide what ``norm`` puts out by its spread over ``inputs``, and W_in the other way."""
    scale = inputs.std(0)
    centre = inputs.mean(0)
    for rows, bias in ((weights.up, weights.up_bias), (weights.gate, weights.gate_bias)):
        if rows is None:
            continue
        if bias is not None and norm.bias is not None:
            bias += rows @ centre
        rows *= scale
    if getattr(norm, "bias", None) is not None:
        norm.bias.copy_((norm.bias - centre) / scale)
    norm.weight /= scale


def move_to_clusters(
    student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, seed: int
) -> list[float]:
    """Move the prototypes of ``student`` to the centroids of its inputs at ``ids``, and solve its
    output prototypes for them; the variance left unexplained, by layer."""
    fvus = []
    for path, ffn in student.kernel_ffns().items():
        stock = find_stock_ffn(teacher, path)
        fitted, held = (
            torch.cat(list(read_ffn_inputs(teacher, path, rows))).float()
            for rows in split_fitted_and_held(ids)
        )
        with torch.no_grad():
            place_at_centroids(ffn, fitted, stock(fitted).float(), seed)
            sample = read_fit_sample(teacher, path, ids)
            temperature = ffn.config.settings.temperature
            figures = calibrate_ffn(
                ffn, stock, sample, fitted=[fitted], held=[held], temperature=temperature
            )
        fvus.append(figures["fvu"])
    return fvus


def place_at_centroids(ffn: KernelFFN, inputs: Tensor, outputs: Tensor, seed: int) -> None:
    """Put input prototypes at centroids of ``inputs`` (k-means from random tokens), and output
    prototypes at the mean of the ``outputs`` that belong to each."""
    rows, nearest = kmeans2(inputs.numpy(), ffn.config.prototypes, minit="points", rng=seed)
    centroids = torch.from_numpy(rows)
    member = nn.functional.one_hot(torch.from_numpy(nearest).long(), len(centroids)).float()
    mean = outputs.mean(0)
    ffn.input_prototypes.weight.copy_(centroids)
    if ffn.kernel.uses_bias:  # zero scores on average, as for firing means
        ffn.input_prototypes.bias.copy_(-(centroids @ inputs.mean(0)))
    ffn.output_prototypes.weight.copy_((outputs - mean).T @ member / member.sum(0).clamp_min(1))
    ffn.output_prototypes.bias.copy_(mean)


def format_markdown(reports: dict[str, dict]) -> str:
    """Format the table, one line a setting."""
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for name, report in reports.items():
        denominator = report["denominator"]
        contexts = report["contexts"]
        support = report["support"]
        purity = [f"{contexts[who]['token']:.3f}" for who in ("student", "teacher", "chance")]
        aucs = [
            " / ".join(f"{support[other][score]:.2f}" for other in ("shuffled", "random"))
            for score in SCORES
        ]
        lines.append(
            f"| {name} | {report['fvu']:.3f} "
            f"| {denominator['over_units']:.1%} / {denominator['over_tokens']:.1%} "
            f"| {denominator['log_share_weighted']:.2g} | {' / '.join(purity)} "
            f"| {' | '.join(aucs)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
