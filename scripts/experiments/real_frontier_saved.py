"""Students of real_frontier.py in files of their FFNs alone, controls too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_kernel_ffn.evaluation.baselines import teacher_as_student, transcoder_student
from hf_kernel_ffn.storage.exporting import apply_surgery, export_surgery
from hf_kernel_ffn.storage.loading import load_model, load_teacher

SUFFIX = ".safetensors"
CONTROL = "real_frontier_control"
"""The entry of a file's metadata that says what a control was made by."""


def save_row(student: PreTrainedModel, kind: str, settings: dict[str, Any], file: Path) -> None:
    """Write the FFNs of ``student``, a row's of that ``kind`` and ``settings``.

    A kernel of one's own has no place in such a file: its student is a whole checkpoint beside it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if ":" in settings.get("kernel", ""):
        student.save_pretrained(file.with_suffix(""))
        return
    if kind == "kernel":
        export_surgery(student, file)
        return
    tensors = {
        f"{path}.{name}": tensor.contiguous()
        for path, ffn in student.kernel_ffns().items()
        for name, tensor in ffn.state_dict().items()
    }
    made_by = json.dumps({"kind": kind, "settings": settings})
    save_file(tensors, file, metadata={CONTROL: made_by})


def load_any(name: str, teacher: str) -> PreTrainedModel:
    """The model of a folder, or the student of ``teacher`` of a file by :func:`save_row`."""
    if name.endswith(SUFFIX):
        return load_row(Path(name), load_teacher(teacher))
    return load_model(name, trust_remote_code=True)


def shorten(name: str) -> str:
    """What a model of :func:`load_any` is called in a table."""
    return Path(name).name.removesuffix(SUFFIX)


def load_row(file: Path, teacher: PreTrainedModel) -> PreTrainedModel:
    """The student that :func:`save_row` has written, the rest shared with ``teacher``."""
    with safe_open(file, "pt") as opened:
        made_by = (opened.metadata() or {}).get(CONTROL)
    if made_by is None:
        return apply_surgery(file, teacher)
    control = json.loads(made_by)
    make = {"teacher": teacher_as_student, "transcoder": transcoder_student}[control["kind"]]
    # What is fitted to these tokens is in the file.
    ids = torch.zeros(1, 256, dtype=torch.int64)
    student = make(teacher, ids, **control["settings"])
    tensors = load_file(file)
    for path, ffn in student.kernel_ffns().items():
        start = f"{path}."
        state = {name[len(start) :]: tensors[name] for name in tensors if name.startswith(start)}
        ffn.load_state_dict(state)
    return student.eval()
