#!/usr/bin/env python3
"""Does distance matter? Converts a teacher by several kernels and initialisers and reads off, on
text, how much the distance term of the kernel varies and what it buys: purity of contexts, support
scores. No training.

"clusters": input prototypes at the k-means centroids of the calibration text's inputs, output
prototypes solved for them. "standardised": the same teacher, written so that every dimension of an
FFN's input has the same spread (and no mean, where the norm has a bias).

    python scripts/experiments/locality.py recipes/teachers/llama --out
    recipes/results/llama/locality
"""

import json
from pathlib import Path
from typing import Annotated

import typer

SETTINGS = {
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
    from hf_kernel_ffn import KernelFFNConfig, convert
    from hf_kernel_ffn.evaluation.locality import locality_report
    from hf_kernel_ffn.storage.files import write_text
    from hf_kernel_ffn.storage.loading import load_teacher, load_tokenizer
    from hf_kernel_ffn.text.packing import read_token_ids

    model, tokenizer = load_teacher(teacher), load_tokenizer(teacher)
    calibration = read_token_ids(tokenizer, [train], 256, tokens, spread=True)
    text = read_token_ids(tokenizer, [test], 128, tokens)
    even = standardised(model, calibration)
    reports = {}
    for name, settings in SETTINGS.items():
        source = even if "standardised" in name else model
        student, report = convert(
            source, KernelFFNConfig(**settings), calibration_ids=calibration, progress=True
        )
        fvus = [layer["fvu"] for layer in report.layers.values()]
        if "clusters" in name:
            fvus = at_clusters(student, source, calibration, seed)
        reports[name] = {
            "fvu": sum(fvus) / len(fvus),
            **locality_report(student, source, text, seed),
        }
        typer.echo(name)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "locality.json", json.dumps(reports, indent=1) + "\n")
    write_text(out / "table.md", markdown(reports))
    typer.echo(markdown(reports), nl=False)


def standardised(teacher, ids):
    """A copy of ``teacher``, the same function, whose FFN inputs have unit variance in every
    dimension over ``ids``, and zero mean where the norm before the FFN has a bias: norm and W_in
    are written anew."""
    import copy

    import torch

    from hf_kernel_ffn.conversion.sampling import read_ffn_inputs
    from hf_kernel_ffn.families.hooks import watch_ffn_input
    from hf_kernel_ffn.families.lookup import find_stock_ffns
    from hf_kernel_ffn.families.registry import get_architecture_of_model
    from hf_kernel_ffn.families.weights import read_stock_weights

    model, made = copy.deepcopy(teacher), {}
    before, after = {}, []
    hooks = [
        module.register_forward_hook(
            lambda module, args, out: made.__setitem__(out.data_ptr(), (module, out))
        )
        for module in model.modules()
        if "Norm" in type(module).__name__
    ]
    ffns = find_stock_ffns(model, get_architecture_of_model(model))
    for path in ffns:
        hooks.append(
            watch_ffn_input(
                model.base_model,
                path,
                lambda x, path=path: before.__setitem__(path, made[x.data_ptr()][0]),
            )
        )
    with torch.no_grad():
        after.append(model(ids[:1]).logits)
        for hook in hooks:
            hook.remove()
        for path, ffn in ffns.items():
            norm, weights = before[path], read_stock_weights(model, ffn)
            x = torch.cat(list(read_ffn_inputs(model, path, ids))).float()
            scale, centre = x.std(0), x.mean(0)
            for rows, bias in ((weights.up, weights.up_bias), (weights.gate, weights.gate_bias)):
                if rows is None:
                    continue
                if bias is not None and norm.bias is not None:
                    bias += rows @ centre
                rows *= scale
            if getattr(norm, "bias", None) is not None:
                norm.bias.copy_((norm.bias - centre) / scale)
            norm.weight /= scale
        after.append(model(ids[:1]).logits)
    torch.testing.assert_close(*after, rtol=1e-3, atol=1e-3)
    return model


def at_clusters(student, teacher, ids, seed: int) -> list[float]:
    """Move the prototypes of ``student`` to the centroids of its inputs at ``ids`` (k-means from
    random tokens), solve its output prototypes for them, and return the variance left unexplained,
    by layer."""
    import torch
    from scipy.cluster.vq import kmeans2

    from hf_kernel_ffn.conversion.calibration_set import split_fitted_and_held
    from hf_kernel_ffn.conversion.ridge import calibrate_ffn
    from hf_kernel_ffn.conversion.sampling import read_ffn_inputs, read_fit_sample
    from hf_kernel_ffn.families.lookup import find_stock_ffn

    fvus = []
    for path, ffn in student.kernel_ffns().items():
        stock = find_stock_ffn(teacher, path)
        fitted, held = (
            torch.cat(list(read_ffn_inputs(teacher, path, some))).float()
            for some in split_fitted_and_held(ids)
        )
        rows, nearest = kmeans2(fitted.numpy(), ffn.config.prototypes, minit="points", rng=seed)
        with torch.no_grad():
            rows, member = (
                torch.from_numpy(rows),
                torch.nn.functional.one_hot(torch.from_numpy(nearest).long(), len(rows)).float(),
            )
            outputs = stock(fitted).float()
            ffn.input_prototypes.weight.copy_(rows)
            if ffn.kernel.uses_bias:  # zero scores on average, as for firing means
                ffn.input_prototypes.bias.copy_(-(rows @ fitted.mean(0)))
            ffn.output_prototypes.weight.copy_(
                (outputs - outputs.mean(0)).T @ member / member.sum(0).clamp_min(1)
            )
            ffn.output_prototypes.bias.copy_(outputs.mean(0))
            sample = read_fit_sample(teacher, path, ids)
            fvus.append(
                calibrate_ffn(
                    ffn, stock, sample, [fitted], [held], ffn.config.settings.temperature
                )["fvu"]
            )
    return fvus


def markdown(reports: dict[str, dict]) -> str:
    """One line a setting; AUCs against shuffled and against random tokens."""
    lines = [
        "| | FVU | denominator varies over units / tokens | its share of log κ | purity, student / teacher / chance | AUC nearest | AUC mass "
        "| AUC −‖x − mean‖ | AUC −‖x‖ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        denominator, contexts, support = (
            report["denominator"],
            report["contexts"],
            report["support"],
        )
        purity = " / ".join(
            f"{contexts[who]['token']:.3f}" for who in ("student", "teacher", "chance")
        )
        aucs = " | ".join(
            " / ".join(f"{support[other][score]:.2f}" for other in ("shuffled", "random"))
            for score in ("nearest", "mass", "control", "length")
        )
        lines.append(
            f"| {name} | {report['fvu']:.3f} | {denominator['over_units']:.1%} / {denominator['over_tokens']:.1%} "
            f"| {denominator['log_share_weighted']:.2g} | {purity} | {aucs} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
