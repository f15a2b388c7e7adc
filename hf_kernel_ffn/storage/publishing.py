"""Model cards, and pushing a converted checkpoint to a hub."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from .. import __version__
from ..checkpoint_code.errors import InputError
from ..checkpoint_code.integrity import read_json
from .files import write_text
from .model_files import get_auto_class

FIGURES = ("delta_cross_entropy", "kl", "top1_agreement", "loss_recovered")
CARD = """---
{front}---

# {name}

[{base}]({link}) with {count} of its FFNs replaced by **kernel-readout FFNs** (hf_kernel_ffn {version}): each output is a mixture of
output prototypes, weighted by a nonnegative kernel between the input and input prototypes.

## Load it

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
readouts = model(**tokenizer("Hello", return_tensors="pt"), output_readouts=True).readouts
```

The code in this repository is that of hf_kernel_ffn; `hf-kernel-ffn verify FOLDER` checks that, and the weights' checksums.

## Settings

| FFN | {columns} |
|---|{rules}|
{settings}

## Evaluation

{evaluation}
"""


def write_model_card(
    folder: str | Path, base_model: str, report: dict | None = None, name: str | None = None
) -> str:
    """The README.md of the converted checkpoint in ``folder``: what it was made from and with, how to load it, and the
    ``report`` of evaluate_student, if there is one."""
    config = read_json(Path(folder) / "config.json")
    entry = config.get("kernel_ffn")
    if not isinstance(entry, dict):
        raise InputError(
            f"found no kernel_ffn entry in {folder}/config.json, expected a converted model: run hf-kernel-ffn convert"
        )
    keys = ("kernel", "simplex", "intensity", "init", "values", "top_k")
    rows = [
        [path, *(str(layer["settings"].get(key)) for key in keys), f"{layer['prototypes']:,}"]
        for path, layer in entry["layers"].items()
    ]
    front = {
        "library_name": "transformers",
        "base_model": base_model,
        "tags": ["kernel-ffn", "custom_code"],
    }
    if report is None:
        evaluation = "Not evaluated."
    else:
        lines = [f"| figure | over {report['tokens']:,} predicted tokens |", "|---|---|"]
        lines += [f"| {key} | {report[key]:.4f} |" for key in FIGURES]
        evaluation = "\n".join(lines)
    return CARD.format(
        auto=get_auto_class(config, (config.get("architectures") or [""])[0]).__name__,
        front=yaml.safe_dump(front, sort_keys=False), name=name or Path(folder).name, base=base_model, count=len(rows),
        link=f"https://huggingface.co/{base_model}" if not Path(base_model).exists() else base_model, version=__version__,
        columns=" | ".join([*keys, "prototypes"]), rules="---|" * len(keys) + "---",
        settings="\n".join("| " + " | ".join(row) + " |" for row in rows), evaluation=evaluation,
    )  # fmt: skip


def base_model_of(folder: str | Path) -> str:
    """What the card in ``folder`` says that the model was made from."""
    card = Path(folder) / "README.md"
    parts = card.read_text(encoding="utf-8").split("---\n") if card.is_file() else []
    try:
        return str(yaml.safe_load(parts[1])["base_model"])
    except (IndexError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(
            f"found no base_model in {card}, expected a card made by convert or distill: name it by --base-model"
        ) from error


def push_to_hub(
    folder: str | Path,
    repo: str,
    base_model: str | None = None,
    report: Path | None = None,
    private: bool = False,
) -> str:
    """Write the card of the converted checkpoint in ``folder``, with the ``report`` file if there is one, and upload the folder to
    the hub's ``repo``; its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    figures = None if report is None else read_json(report)
    if figures is not None and not {"tokens", *FIGURES} <= figures.keys():
        raise InputError(
            f"found no evaluation in {report}, expected a file written by hf-kernel-ffn evaluate --json: check the path"
        )
    write_text(
        Path(folder) / "README.md",
        write_model_card(folder, base_model or base_model_of(folder), figures, repo),
    )
    api = HfApi()
    try:
        made = api.create_repo(repo, exist_ok=True, private=private)
        api.upload_folder(
            folder_path=str(folder), repo_id=repo, commit_message="Upload by hf_kernel_ffn"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = json.dumps(" ".join(str(error).split())[:300])
        raise InputError(
            f"could not push {folder} to {repo} ({reason}): check the name and your token"
        ) from error
    return str(made)
