#!/usr/bin/env python3
"""Does the kernel matter? Students that differ in it alone, by what reading them gives.

    python scripts/experiments/real_frontier.py run runs/smollm2 --out runs/kernels \\
        --save runs/kernels --counts 192 --test recipes/text/books-test.txt \\
        --only "half-yat in its place, skip, allocated, untrained;…"
    python scripts/experiments/kernel_readings.py runs/smollm2 runs/kernels/*.safetensors \\
        --out recipes/results/smollm2/kernels.json

The teacher comes first. Of every model: how alike the tokens are that the 100 most used prototypes
of a layer fire at (purity), and how well its support scores know text from the same tokens
scrambled, from code and from another language (AUC, 0.5 is chance), means over layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from real_frontier_saved import load_any, shorten
from transformers import PreTrainedTokenizerBase

from hf_kernel_ffn.reading.contexts import contexts
from hf_kernel_ffn.reading.support import scrambled, separations
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.loading import load_tokenizer
from hf_kernel_ffn.text.packing import read_token_ids
from hf_kernel_ffn.text.text_format import TextFormat

LENGTH = 256
"""Tokens of a row."""
MOST_USED = 100
"""Prototypes whose contexts are looked at per layer."""


def main(
    models: Annotated[list[str], typer.Argument(help="the teacher, and students of it")],
    out: Annotated[Path, typer.Option(help="where to write figures")],
    text: Annotated[str, typer.Option(help="ordinary text")] = "recipes/text/books-distil.txt",
    code: Annotated[Path, typer.Option(help="a file of another domain")] = Path(
        "hf_kernel_ffn/checkpoint_code/ffn.py"
    ),
    language: Annotated[Path, typer.Option(help="a file of another language")] = Path(
        "recipes/text/german.txt"
    ),
    tokens: Annotated[int, typer.Option(help="of the text")] = 16_384,
    bos: Annotated[str, typer.Option(help="auto, always or never a start token")] = "auto",
    seed: Annotated[int, typer.Option(help="of what is scrambled")] = 0,
) -> None:
    """Write the figures of all MODELS into OUT."""
    tokenizer = load_tokenizer(models[0])
    ids = read_token_ids(tokenizer, [text], LENGTH, tokens, TextFormat(bos=bos))
    half = len(ids) // 2
    starts = ids[0, 0].item() == tokenizer.bos_token_id
    others = {
        "scrambled": scrambled(ids[:half], seed),
        "code": read_rows(tokenizer, code, starts=starts),
        "language": read_rows(tokenizer, language, starts=starts),
    }

    rows = []
    for name in models:
        model = load_any(name, models[0])
        used = contexts(model, ids.split(8))
        purities = [layer.purity()[layer.most_used(MOST_USED)].nanmean() for layer in used.values()]
        row: dict[str, object] = {"model": shorten(name), "tokens": ids.numel(), "seed": seed}
        row["purity"] = fmean(purity.item() for purity in purities)
        found = separations(model, ids[:half], others)
        for score in ("nearest", "mass"):
            for against in others:
                aucs = [one.auc for one in found if (one.score, one.against) == (score, against)]
                row[f"auc_{score}_{against}"] = fmean(aucs)
        rows.append(row)
        typer.echo(json.dumps(row))
        write_text(out, json.dumps(rows, indent=1) + "\n")


def read_rows(tokenizer: PreTrainedTokenizerBase, file: Path, *, starts: bool) -> torch.Tensor:
    """(rows, LENGTH) token ids of ``file``, each after the start token where a row ``starts`` with
    it."""
    ids = torch.tensor(tokenizer(file.read_text(encoding="utf-8"))["input_ids"])
    length = LENGTH - int(starts)
    rows = ids[: len(ids) // length * length].view(-1, length)
    if not starts:
        return rows
    return torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], -1)


if __name__ == "__main__":
    typer.run(main)
