"""Saving what a conversion or a distillation has made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .files import write_text
from .loading import load_tokenizer, read_stored_dtype
from .publishing import write_model_card

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "added_tokens.json", "chat_template.jinja", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def save_converted(student: Any, source: str, out: Path, **reports: dict) -> None:
    """Save ``student`` in ``out``, in the dtype in which its teacher at ``source`` is stored, with that one's tokenizer and, as
    JSON, whatever reports are given by name."""
    student.to(dtype=read_stored_dtype(source)).save_pretrained(out)
    save_companions(source, out, **reports)


def save_companions(source: str, out: Path, **reports: dict) -> None:
    """Put what belongs beside the weights and the config into ``out``: the tokenizer at ``source``, a model card, the reports."""
    if Path(source).is_dir():
        for file in Path(source).iterdir():
            if file.is_file() and file.name in TOKENIZER_FILES:
                shutil.copyfile(file, out / file.name)
    else:
        load_tokenizer(source).save_pretrained(out)
    write_text(out / "README.md", write_model_card(out, source))
    for name, report in reports.items():
        (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
