#!/usr/bin/env python3
"""Convert a model of sentence embeddings, and compare the embeddings of student and teacher.

    python scripts/real_models.py minilm runs/minilm
    python scripts/experiments/sentence_fidelity.py runs/minilm \
        --text recipes/text/books-test.txt --out recipes/results/real/minilm.json

An embedding is the mean of the last hidden states over a sentence's tokens, as
all-MiniLM-L6-v2 takes it.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kernel_ffn import convert, load_student, load_teacher, load_tokenizer
from hf_kernel_ffn.checkpoint_code.settings import make_settings
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.kernel_files import import_kernel
from hf_kernel_ffn.text.packing import read_token_ids

SENTENCES = 1000
SHORTEST = 20
LONGEST = 400
"""Characters of a sentence."""
AT_ONCE = 50


def main(
    model: Annotated[str, typer.Argument(help="folder or hub id of an encoder")],
    text: Annotated[list[str], typer.Option(help="held-out text; may be given several times")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    calibration_text: Annotated[Optional[str], typer.Option()] = None,
    kernel: Annotated[Optional[str], typer.Option()] = None,
    pieces: Annotated[Optional[int], typer.Option()] = None,
    seed: Annotated[int, typer.Option(help="of the model's own tokens")] = 0,
    student: Annotated[
        Optional[str], typer.Option(help="compare this one, instead of converting MODEL")
    ] = None,
) -> None:
    """Convert MODEL, embed sentences of every TEXT by both, and write the figures to OUT."""
    torch.set_num_threads(1)
    given: dict[str, Any] = {} if pieces is None else {"pieces": pieces}
    if kernel is not None:
        given |= {"kernel": import_kernel(kernel), "rows": "tied"}
    teacher = load_teacher(model)
    tokenizer = load_tokenizer(model)
    figures: dict[str, Any] = {"model": Path(model).name}
    if student is None:
        ids = None
        if calibration_text is not None:
            ids = read_token_ids(tokenizer, [calibration_text], 64, 16_384, spread=True)
        start = time.process_time()
        converted, report = convert(teacher, make_settings(given), calibration_ids=ids, seed=seed)
        figures["settings"] = {name: str(value) for name, value in given.items()}
        figures["calibration"] = report.calibration
        figures["calibration_tokens"] = report.calibration_tokens
        figures["conversion_cpu_seconds"] = round(time.process_time() - start, 1)
        figures["layers"] = report.layers
    else:
        converted = load_student(student)
        figures["student"] = Path(student).name
    numbers = [sum(p.numel() for p in whole.parameters()) for whole in (converted, teacher)]
    figures["parameters_ratio"] = numbers[0] / numbers[1]
    figures["texts"] = {}
    for file in text:
        found = compare_embeddings(converted, teacher, tokenizer, Path(file))
        figures["texts"][Path(file).name] = found
        typer.echo(f"{Path(file).name}: {found}")
    write_text(out, json.dumps(figures, indent=1) + "\n")


def compare_embeddings(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
) -> dict[str, float]:
    """Cosines between the embeddings of a text's sentences by both."""
    sentences = find_sentences(file.read_text(encoding="utf-8"))
    ours = embed(student, tokenizer, sentences)
    theirs = embed(teacher, tokenizer, sentences)
    cosine = (ours * theirs).sum(-1)
    return {
        "sentences": len(sentences),
        "mean_cosine": cosine.mean().item(),
        "worst_cosine": cosine.min().item(),
    }


def find_sentences(text: str) -> list[str]:
    """SENTENCES sentences, evenly spaced over ``text``."""
    parts = (part.strip() for part in re.split(r"(?<=[.!?])\s+|\n", text))
    sentences = [part for part in parts if SHORTEST < len(part) < LONGEST]
    return sentences[:: max(1, len(sentences) // SENTENCES)][:SENTENCES]


@torch.no_grad()
def embed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str]
) -> Tensor:
    """(sentences, hidden_size) of length one."""
    found = []
    for start in range(0, len(sentences), AT_ONCE):
        batch = tokenizer(
            sentences[start : start + AT_ONCE],
            padding=True,
            truncation=True,
            max_length=256,
            return_tensors="pt",
        )
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        mean = (states * mask).sum(1) / mask.sum(1)
        found.append(torch.nn.functional.normalize(mean, dim=-1))
    return torch.cat(found)


if __name__ == "__main__":
    typer.run(main)
