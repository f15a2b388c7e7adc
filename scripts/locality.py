#!/usr/bin/env python3
"""Does distance matter? Converts a teacher by several kernels and initialisers and reads off, on text, how much the distance term of the
kernel varies and what it buys: purity of contexts, support scores. No training.

    python scripts/locality.py recipes/teachers/llama --out recipes/results/llama/locality
"""

import json
import sys
from pathlib import Path
from typing import Annotated

del sys.path[0]  # this folder, whose evaluate.py would hide the evaluate package

import typer  # noqa: E402

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
}


def main(
    teacher: Annotated[str, typer.Argument(help="local folder or hub id")],
    out: Annotated[Path, typer.Option(help="folder of locality.json and table.md")],
    train: Annotated[str, typer.Option(help="text to calibrate on")] = "recipes/text/books-distil.txt",
    test: Annotated[str, typer.Option(help="text to read")] = "recipes/text/books-test.txt",
    tokens: Annotated[int, typer.Option(help="tokens of each")] = 16_384,
    seed: int = 0,
) -> None:
    """Write the figures of every setting into OUT, and print the table."""
    from hf_kernel_ffn import KernelFFNConfig, convert
    from hf_kernel_ffn.data import token_ids
    from hf_kernel_ffn.files import write_text
    from hf_kernel_ffn.loading import load_teacher, load_tokenizer
    from hf_kernel_ffn.locality import locality_report

    model, tokenizer = load_teacher(teacher), load_tokenizer(teacher)
    calibration = token_ids(tokenizer, [train], 256, tokens, spread=True)
    text = token_ids(tokenizer, [test], 128, tokens)
    reports = {}
    for name, settings in SETTINGS.items():
        student, _ = convert(model, KernelFFNConfig(**settings), calibration_ids=calibration, progress=True)
        reports[name] = locality_report(student, model, text, seed)
        typer.echo(name)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "locality.json", json.dumps(reports, indent=1) + "\n")
    write_text(out / "table.md", markdown(reports))
    typer.echo(markdown(reports), nl=False)


def markdown(reports: dict[str, dict]) -> str:
    """One line a setting; AUCs against shuffled and against random tokens."""
    lines = [
        "| | denominator varies over units / tokens | its share of log κ | purity, student / teacher / chance | AUC nearest | AUC mass "
        "| AUC −‖x − mean‖ | AUC −‖x‖ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        denominator, contexts, support = report["denominator"], report["contexts"], report["support"]
        purity = " / ".join(f"{contexts[who]['token']:.3f}" for who in ("student", "teacher", "chance"))
        aucs = " | ".join(
            " / ".join(f"{support[other][score]:.2f}" for other in ("shuffled", "random"))
            for score in ("nearest", "mass", "control", "length")
        )
        lines.append(
            f"| {name} | {denominator['over_units']:.1%} / {denominator['over_tokens']:.1%} "
            f"| {denominator['log_share_weighted']:.2g} | {purity} | {aucs} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
