"""Kernels of a user's own: the file that registers one, and the one that a checkpoint brings."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

from ..checkpoint_code import custom_kernel
from ..checkpoint_code.errors import InputError
from .model_files import find_file, first_line

CUSTOM_KERNEL = "custom_kernel.py"
"""The file of a checkpoint in which its author's own kernel stands."""


def has_custom_kernel(name: str) -> bool:
    """Return whether the checkpoint at ``name`` brings a kernel file of its author's own."""
    file = find_file(name, CUSTOM_KERNEL)
    return file is not None and file.read_bytes() != Path(custom_kernel.__file__).read_bytes()


def import_kernel(kernel: str) -> str:
    """Run the file in ``FILE.py:NAME``, which registers its kernels.

    The file becomes a module under a name of its own: one called statistics.py does not take the
    place of the standard library's.

    Returns:
        NAME; ``kernel`` itself if it is a plain name.

    Raises:
        InputError: the file does not exist, or cannot be run.
    """
    file, colon, name = kernel.rpartition(":")
    if not colon:
        return kernel

    path = Path(file)
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    module_name = f"hf_kernel_ffn_kernel_{path.stem}_{digest[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise InputError(f"found no Python file {file!r}, expected FILE.py:NAME: check the path")

    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where the source of its classes is looked for
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if not isinstance(error, Exception):
            raise
        raise InputError(
            f"found {file} failing when run ({first_line(error)}): repair it"
        ) from error
    return name
