#!/usr/bin/env python3
"""Convert a real model, and compare student and teacher on rows that begin with its start token.

    python scripts/real_models.py smollm2 runs/smollm2
    python scripts/experiments/real_fidelity.py runs/smollm2 --text wikitext2-test.txt \
        --out recipes/results/real/smollm2.json

Without --calibration-text the conversion reads nothing but what the model writes itself. --kernel
relu and relu2 of recipes/examples/kernels/controls.py are the controls.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kernel_ffn import convert, load_student, load_teacher, load_tokenizer
from hf_kernel_ffn.checkpoint_code.settings import make_settings
from hf_kernel_ffn.conversion.calibration_set import CALIBRATION_TOKENS
from hf_kernel_ffn.storage.files import write_text
from hf_kernel_ffn.storage.kernel_files import import_kernel
from hf_kernel_ffn.text.packing import read_token_ids
from hf_kernel_ffn.text.text_format import BosChoice, TextFormat

ROW_LENGTH = 256
ROWS_AT_ONCE = 4


def main(
    model: Annotated[str, typer.Argument(help="folder or hub id of a causal language model")],
    text: Annotated[list[str], typer.Option(help="held-out text; may be given several times")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    tokens: Annotated[int, typer.Option(help="of each text")] = 8192,
    calibration_text: Annotated[Optional[str], typer.Option()] = None,
    calibration_tokens: Annotated[Optional[int], typer.Option(help="as for convert")] = None,
    rows: Annotated[Optional[str], typer.Option()] = None,
    kernel: Annotated[Optional[str], typer.Option()] = None,
    values: Annotated[Optional[str], typer.Option()] = None,
    pieces: Annotated[Optional[int], typer.Option()] = None,
    threads: Annotated[int, typer.Option()] = 1,
    device: Annotated[str, typer.Option()] = "cpu",
    student: Annotated[
        Optional[str], typer.Option(help="measure this one, instead of converting MODEL")
    ] = None,
) -> None:
    """Convert MODEL, measure it on every TEXT, and write the figures to OUT."""
    torch.set_num_threads(threads)
    given: dict[str, Any] = {"rows": rows, "values": values, "pieces": pieces}
    if kernel is not None:
        given["kernel"] = import_kernel(kernel)
    given = {name: value for name, value in given.items() if value is not None}
    teacher = load_teacher(model, device=device)
    tokenizer = load_tokenizer(model)
    figures: dict[str, Any] = {"model": Path(model).name}
    if student is None:
        ids = None
        if calibration_text is not None:
            wanted = CALIBRATION_TOKENS if calibration_tokens is None else calibration_tokens
            ids = read_rows(tokenizer, calibration_text, wanted, spread=True)
        start = time.process_time()
        converted, report = convert(
            teacher,
            make_settings(given),
            calibration_ids=ids,
            calibration_tokens=calibration_tokens,
            progress=True,
        )
        figures |= {
            "settings": given,
            "calibration": report.calibration,
            "calibration_tokens": report.calibration_tokens,
            "conversion_cpu_seconds": round(time.process_time() - start, 1),
            "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
            "layers": report.layers,
        }
    else:
        converted = load_student(student, device=device)
        figures["student"] = Path(student).name
    figures["parameters_ratio"] = count_parameters(converted) / count_parameters(teacher)
    figures["texts"] = {}
    for file in text:
        held_out = read_rows(tokenizer, file, tokens).to(device)
        figures["texts"][Path(file).name] = compare(converted, teacher, held_out)
        typer.echo(f"{Path(file).name}: {figures['texts'][Path(file).name]}")
    write_text(out, json.dumps(figures, indent=1) + "\n")


def read_rows(
    tokenizer: PreTrainedTokenizerBase, file: str, tokens: int, *, spread: bool = False
) -> Tensor:
    """(rows, ROW_LENGTH) token ids of a text, each row with the start token before it, if there is
    one."""
    bos: BosChoice = "auto" if tokenizer.bos_token_id is None else "always"
    text_format = TextFormat(bos=bos)
    return read_token_ids(tokenizer, [file], ROW_LENGTH, tokens, text_format, spread=spread)


def count_parameters(model: PreTrainedModel) -> int:
    """Numbers in all of the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def compare(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> dict[str, float]:
    """ΔCE and KL in nats, and top-1 agreement, over all predicted tokens of ``ids``."""
    sums = {"teacher": 0.0, "student": 0.0, "kl": 0.0, "same": 0.0}
    count = 0
    for batch in ids.split(ROWS_AT_ONCE):
        targets = batch[:, 1:, None]
        theirs = teacher(batch).logits[:, :-1].float().log_softmax(-1)
        ours = student(batch).logits[:, :-1].float().log_softmax(-1)
        sums["teacher"] -= theirs.gather(-1, targets).sum().item()
        sums["student"] -= ours.gather(-1, targets).sum().item()
        sums["kl"] += (theirs.exp() * (theirs - ours)).sum().item()
        sums["same"] += (theirs.argmax(-1) == ours.argmax(-1)).sum().item()
        count += targets.numel()
    return {
        "tokens": count,
        "cross_entropy": round(sums["teacher"] / count, 4),
        "delta_cross_entropy": round((sums["student"] - sums["teacher"]) / count, 5),
        "kl": round(sums["kl"] / count, 5),
        "top1_agreement": round(sums["same"] / count, 4),
    }


if __name__ == "__main__":
    typer.run(main)
