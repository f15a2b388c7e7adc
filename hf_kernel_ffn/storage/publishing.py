"""Model cards, and pushing a converted checkpoint to a hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..checkpoint_code.errors import InputError
from ..checkpoint_code.untrusted_files import read_json
from .files import write_text
from .model_files import get_auto_class, require_readable_files

FIGURES = ("delta_cross_entropy", "kl", "top1_agreement", "loss_recovered")
"""Figures of an evaluation that stand in a card."""
SETTINGS = ("kernel", "simplex", "intensity", "init", "values", "top_k")
"""Settings of an FFN that stand in a card."""
CARD = """---
{front}---

# {title}

{base} with {count} of its FFNs replaced by **kernel-readout FFNs** \
(hf_kernel_ffn {version}): each output is a mixture of
output prototypes, weighted by a nonnegative kernel between the input and input prototypes.

## Load it

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
readouts = model(**tokenizer("Hello", return_tensors="pt"), output_readouts=True).readouts
```

The code in this repository is that of hf_kernel_ffn; `hf-kernel-ffn verify FOLDER` \
checks that, and the weights' checksums.

## Settings

| FFN | {columns} |
|---|{rules}|
{settings}

## Evaluation

{evaluation}
"""
LONGEST_REASON = 300
"""Characters of what a hub says that are passed on: some hubs answer with a page."""


def write_model_card(
    folder: str | Path,
    base_model: str,
    report: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> str:
    """Return the README.md of the converted checkpoint in ``folder``.

    It says what the model was made from and with, how to load it, and how it was evaluated.

    Args:
        base_model: the teacher, a local folder or a hub id.
        report: of evaluate_student; None: not evaluated.
        name: what the model is loaded by, a place on the disk or a hub id; None: ``folder``.

    Raises:
        InputError: the model in ``folder`` is not converted.
    """
    config = read_json(Path(folder) / "config.json")
    entry = config.get("kernel_ffn")
    if not isinstance(entry, dict):
        raise InputError(
            f"found no kernel_ffn entry in {folder}/config.json, expected a converted model: "
            "run hf-kernel-ffn convert"
        )
    layers: dict[str, Any] = entry["layers"]
    head = (config.get("architectures") or [""])[0]
    front_matter: dict[str, object] = {"library_name": "transformers"}
    base = f"`{Path(base_model).absolute().name}`, a local model,"
    if not Path(base_model).exists():  # a place on somebody's disk is no model of a hub
        front_matter["base_model"] = base_model
        base = f"[{base_model}](https://huggingface.co/{base_model})"
    front_matter["tags"] = ["kernel-ffn", "custom_code"]
    place = str(name or folder)
    return CARD.format(
        front=yaml.safe_dump(front_matter, sort_keys=False),
        title=Path(place).absolute().name if Path(place).exists() else place.rpartition("/")[2],
        name=place.replace("\\", "\\\\").replace('"', '\\"'),
        base=base,
        count=len(layers),
        version=__version__,
        auto=get_auto_class(config, head).__name__,
        columns=" | ".join([*SETTINGS, "prototypes"]),
        rules="---|" * len(SETTINGS) + "---",
        settings="\n".join(_write_settings_row(path, layer) for path, layer in layers.items()),
        evaluation=_write_evaluation(report),
    )


def base_model_of(folder: str | Path) -> str:
    """Return which model of a hub the card in ``folder`` says that this one was made from.

    Raises:
        InputError: there is no card, or it does not say so: the model may be a local one.
    """
    card = Path(folder) / "README.md"
    parts = card.read_text(encoding="utf-8").split("---\n") if card.is_file() else []
    try:
        return str(yaml.safe_load(parts[1])["base_model"])
    except (IndexError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(
            f"found no base_model in {card}, expected a card made by convert or distill from a "
            "model of a hub: name it by --base-model"
        ) from error


def push_to_hub(
    folder: str | Path,
    repo: str,
    base_model: str | None = None,
    *,
    report: Path | None = None,
    private: bool = False,
) -> str:
    """Write the card of the converted checkpoint in ``folder`` and upload the folder to a hub.

    Args:
        repo: of the hub, such as ``me/llama-kernel``; it is made if it is not there.
        base_model: the teacher; None: as the card in the folder has it.
        report: the file of an evaluation, for the card.
        private: whether a repository that has to be made is private.

    Returns:
        the repository's address.

    Raises:
        InputError: the folder or the report is not what it should be, or the hub refuses.
    """
    from huggingface_hub import HfApi

    require_readable_files(Path(folder))
    figures = None if report is None else read_json(report)
    if figures is not None and not {"tokens", *FIGURES} <= figures.keys():
        raise InputError(
            f"found no evaluation in {report}, "
            "expected a file written by hf-kernel-ffn evaluate --json: check the path"
        )
    card = write_model_card(folder, base_model or base_model_of(folder), figures, repo)
    file = Path(folder) / "README.md"
    before = file.read_bytes() if file.is_file() else None

    api = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True, private=private)
        write_text(file, card)
        api.upload_folder(
            folder_path=str(folder), repo_id=repo, commit_message="Upload by hf_kernel_ffn"
        )
    except Exception as error:  # of the hub, or of whichever library carries the bytes
        _put_back(file, before)
        reason = json.dumps(" ".join(str(error).split())[:LONGEST_REASON])
        raise InputError(
            f"could not push {folder} to {repo} ({reason}): check the name and your token"
        ) from error
    return str(address)


def _put_back(file: Path, content: bytes | None) -> None:
    """Let ``file`` be what it was; None: it was not there."""
    if content is None:
        file.unlink(missing_ok=True)
    else:
        file.write_bytes(content)


def _write_settings_row(path: str, layer: Mapping[str, Any]) -> str:
    """Return the row of a card's table for one FFN."""
    settings = [str(layer["settings"].get(name)) for name in SETTINGS]
    cells = [path, *settings, f"{layer['prototypes']:,}"]
    return f"| {' | '.join(cells)} |"


def _write_evaluation(report: Mapping[str, Any] | None) -> str:
    """Return what a card says of an evaluation."""
    if report is None:
        return "Not evaluated."
    lines = [f"| figure | over {report['tokens']:,} predicted tokens |", "|---|---|"]
    lines += [f"| {name} | {report[name]:.4f} |" for name in FIGURES]
    return "\n".join(lines)
