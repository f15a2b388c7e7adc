"""What lies in the folder of a converted model, and how it comes to lie there.

- ``config.json`` with the ``kernel_ffn`` entry, ``generation_config.json``, and the code that loads
  the checkpoint where the package is not installed: the config class writes it;
- the weights, in one safetensors file or in several with an index;
- ``checksums.json`` of weights and config, which ``hf-kernel-ffn verify`` checks;
- the companions: whatever the teacher has beside weights and config (tokenizer, processors, chat
  templates), a model card, and reports as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import SAFE_WEIGHTS_NAME

from ..checkpoint_code.integrity import record_checksums
from .companions import copy_companions
from .files import write_text
from .gguf_header import is_gguf
from .loading import Place, load_tokenizer, read_stored_dtype
from .publishing import write_model_card

if TYPE_CHECKING:
    from ..families.student import ConvertedModel

Report = Mapping[str, object]
"""What is saved as one JSON file."""


def save_converted(
    student: ConvertedModel,
    source: Place,
    out: Path,
    *,
    place: str | Path | None = None,
    **reports: Report,
) -> None:
    """Save ``student`` with all that belongs to it in the folder ``out``.

    Args:
        source: of its teacher, a local folder, a GGUF file or a hub id. The student is saved in the
            dtype in which that is stored, and is in it afterwards; in its own if it is from a GGUF
            file, which has several.
        place: where it will lie in the end, for the model card; None: in ``out``.
        reports: each is saved as JSON under its name.
    """
    source = os.fspath(source)
    dtype = student.dtype if is_gguf(source) else read_stored_dtype(source)
    student.to(dtype=dtype).save_pretrained(out)
    save_companions(source, out, place=place, **reports)


def save_around_weights(
    student: ConvertedModel,
    weights: Path,
    source: str,
    out: Path,
    *,
    place: str | Path | None = None,
    **reports: Report,
) -> None:
    """Save a student in ``out`` whose weights have been written already.

    The result is what :func:`save_converted` makes.

    Args:
        student: on the meta device, in the dtype of the weights.
        weights: the folder that holds the weight files and nothing else. They are moved, and it is
            removed.
        source: of its teacher, a local folder or a hub id.
        place: where it will lie in the end, for the model card; None: in ``out``.
        reports: each is saved as JSON under its name.
    """
    _save_all_but_weights(student, out)
    for file in weights.iterdir():
        file.rename(out / file.name)
    weights.rmdir()
    record_checksums(out)
    save_companions(source, out, place=place, **reports)


def save_companions(
    source: str, out: Path, *, place: str | Path | None = None, **reports: Report
) -> None:
    """Put what belongs beside weights and config into ``out``: companions, model card, reports.

    Args:
        source: of the teacher, a local folder, a GGUF file or a hub id, from which the companions
            are taken.
        place: where it will lie in the end, for the model card; None: in ``out``.
        reports: each is saved as JSON under its name.
    """
    if is_gguf(source):
        load_tokenizer(source).save_pretrained(out)
    else:
        copy_companions(source, out)
    write_text(out / "README.md", write_model_card(out, source, name=str(place or out)))
    for name, report in reports.items():
        write_text(out / f"{name}.json", json.dumps(report, indent=1) + "\n")


def _save_all_but_weights(student: ConvertedModel, out: Path) -> None:
    """Save config and code of ``student`` in ``out``."""
    student.save_pretrained(out, state_dict={})
    (out / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # a file without a tensor
