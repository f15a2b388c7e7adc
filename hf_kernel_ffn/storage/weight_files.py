"""The files that a stock model's weights are in."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.untrusted_files import weight_files
from ..compat import find_cached_file


def find_weight_files(name: str) -> list[Path]:
    """Return the safetensors files of the checkpoint ``name``, a folder or a hub id.

    Raises:
        InputError: it has none, or one is missing.
    """
    if Path(name).is_dir():
        return weight_files(name)
    try:
        whole = find_cached_file(name, SAFE_WEIGHTS_NAME)
        index = find_cached_file(name, SAFE_WEIGHTS_INDEX_NAME) if whole is None else None
        if index is None:
            files = [cached_file(name, SAFE_WEIGHTS_NAME)]
        else:
            files = get_checkpoint_shard_files(name, str(index))[0]
    except OSError as error:
        raise InputError(
            f"found no safetensors at {name}, expected them: save the model by save_pretrained "
            "first"
        ) from error
    return [Path(str(file)) for file in files]


def fingerprint_files(name: str) -> str | None:
    """Return the SHA-256 of the safetensors files of the checkpoint ``name``, one after the other.

    None where there are none: a GGUF file, or weights that are pickled.
    """
    try:
        files = find_weight_files(name)
    except InputError:
        return None
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
