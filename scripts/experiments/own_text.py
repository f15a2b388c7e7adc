#!/usr/bin/env python3
"""Let a language model write text, and mix it with another one: what a student is distilled on.

    python scripts/experiments/own_text.py runs/smollm2 runs/mixed.jsonl --device cuda \\
        --dtype bfloat16 --batch-size 2048 --beside recipes/text/books-distil.txt

The model samples from its start token in one half of the texts and from a random token in the
other. What it writes is what it was trained on, as far as it knows it, so that a student does not
learn the style of one book. Blocks of both texts alternate in OUT. What a conversion calibrates on,
hf_kernel_ffn.conversion.sampling.write_own_text, is drawn on the CPU, so that it is the same on
every device; this is drawn on the device, since there are a hundred times as many tokens.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from transformers import PreTrainedModel, set_seed

from hf_kernel_ffn import load_teacher, load_tokenizer
from hf_kernel_ffn.evaluation.generation import GREEDY
from hf_kernel_ffn.progress import track_progress
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.text.documents import read_documents
from hf_kernel_ffn.text.inputs import find_longest_row

LENGTH = 256
"""Tokens of a text."""
BLOCKS = 64
"""Blocks that each of both texts is cut into."""


def main(
    model: Annotated[str, typer.Argument(help="folder or hub id of a causal language model")],
    out: Annotated[Path, typer.Argument(help="JSON lines to write, each with a text")],
    tokens: Annotated[int, typer.Option(help="that the model writes")] = 1_500_000,
    beside: Annotated[Optional[str], typer.Option(help="text to mix it with")] = None,
    temperature: Annotated[float, typer.Option(help="1: as the model predicts")] = 0.8,
    batch_size: Annotated[int, typer.Option(help="texts that are written at once")] = 64,
    dtype: Annotated[str, typer.Option(help="of the model while it writes")] = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Write OUT."""
    teacher = load_teacher(model, device=device).to(getattr(torch, dtype))
    tokenizer = load_tokenizer(model)
    set_seed(seed)
    texts = []
    count = max(1, tokens // LENGTH)
    for start in track_progress(range(0, count, batch_size), "writing", True):
        ids = sample(teacher, min(batch_size, count - start), temperature)
        texts += tokenizer.batch_decode(ids)  # with special tokens: they mark turns

    others = []
    if beside is not None:
        others = [text for text, _ in read_documents(beside, "text")]
    lines = [json.dumps({"text": text}) for text in alternate(texts, others)]
    write_text(out, "\n".join(lines) + "\n")
    typer.echo(f"{len(texts)} texts of the model and {len(others)} of {beside} in {out}")


@torch.no_grad()
def sample(model: PreTrainedModel, rows: int, temperature: float) -> torch.Tensor:
    """(rows, LENGTH) token ids that ``model`` draws, ends of texts and what follows included; fewer
    where it has fewer positions."""
    first = torch.randint(model.config.vocab_size, (rows, 1), device=model.device)
    if isinstance(model.config.bos_token_id, int):
        first[::2] = model.config.bos_token_id
    return model.generate(
        first,
        attention_mask=torch.ones_like(first),
        # Nothing of the model's own generation settings is left to bend what it predicts.
        **{**GREEDY, "do_sample": True, "temperature": temperature, "top_k": 0},
        max_length=min(LENGTH, find_longest_row(model) or LENGTH),
        max_new_tokens=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def alternate(texts: list[str], others: list[str]) -> list[str]:
    """Blocks of ``texts`` and of ``others`` in turn, each text in its own order."""
    joined = []
    for block in range(BLOCKS):
        for each in (texts, others):
            joined += islice(each, len(each) * block // BLOCKS, len(each) * (block + 1) // BLOCKS)
    return joined


if __name__ == "__main__":
    typer.run(main)
