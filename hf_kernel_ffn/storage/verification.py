"""Is a checkpoint what it says: its config, weights and checksums, and whose code it carries."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .. import __version__
from ..checkpoint_code.errors import InputError
from ..checkpoint_code.integrity import CHECKSUMS, check_folder, check_model, compute_checksums
from ..checkpoint_code.layer_config import FORMAT
from ..checkpoint_code.untrusted_files import read_json
from .kernel_files import CUSTOM_KERNEL, has_custom_kernel
from .model_classes import get_student_class
from .model_files import load_pretrained, require_readable_files

if TYPE_CHECKING:
    from ..families.student import ConvertedModel

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Ends of the names of files that run code when they are read."""

TRAINING_STATE = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
"""Beginnings of the names of what a Trainer needs to go on, in the folder of a checkpoint."""
TRAINER_STATE = "trainer_state.json"
"""The file by which a Trainer's checkpoint is known."""

Sources = dict[str, bytes]
"""Content by name of files of code."""


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    """Its name: config, weights, checksums, code, …"""
    found: str
    """What it is like."""
    good: bool
    """Whether it is as it should be."""


def verify_folder(folder: str | Path) -> list[Finding]:
    """Return what there is to say about the converted checkpoint in the local ``folder``.

    Nothing of its code runs.

    Raises:
        InputError: it is no converted checkpoint, or its config or weights cannot be read.
    """
    folder = Path(folder)
    require_readable_files(folder)
    config = _read_converted_config(folder)
    entry = config["kernel_ffn"]
    student_class, author_file = get_student_class(config, str(folder))
    if student_class is None:
        raise InputError(
            f"found a family with code of its own in {folder}, "
            f"expected one of transformers': read {folder}/{author_file}"
        )

    tensors = check_folder(folder)
    has_own_kernel = has_custom_kernel(str(folder))
    # With a kernel of the author's own nothing is made: that would run it.
    if not has_own_kernel:
        student_config = load_pretrained(student_class.config_class.from_pretrained, str(folder))
        if tensors is not None:
            with torch.device("meta"):
                check_model(student_class(student_config), tensors, folder)

    version = entry.get("package_version")
    weights = "quantised: not looked into"
    if tensors is not None:
        weights = f"{len(tensors)} tensors, as the config has them"
    has_both = all(
        (folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if has_both:
        weights += f"; saved twice: {SAFE_WEIGHTS_NAME} is read, the shards of the index are not"
    return [
        Finding(
            "config", f"format {entry.get('format')}, converted by hf_kernel_ffn {version}", True
        ),
        Finding("weights", weights, not has_both),
        _look_at_checksums(folder),
        *_look_at_code(folder, config, student_class, has_own_kernel),
        _look_at_pickles(folder),
    ]


def _read_converted_config(folder: Path) -> dict[str, Any]:
    """Return config.json in ``folder``; InputError if it is not that of a converted model."""
    if not (folder / "config.json").is_file():
        raise InputError(
            f"found no config.json in {folder}, "
            "expected the folder of a converted model: check the path"
        )
    config = read_json(folder / "config.json")
    if config.get("kernel_ffn") is None:
        raise InputError(
            f"found no kernel_ffn entry in {folder}/config.json, expected a converted model: "
            "run hf-kernel-ffn convert"
        )
    return config


def _look_at_checksums(folder: Path) -> Finding:
    """Compare the files in ``folder`` with the checksums recorded when they were saved."""
    if not (folder / CHECKSUMS).is_file():
        return Finding("checksums", "none recorded: save it again to have them", False)
    recorded = read_json(folder / CHECKSUMS).get("sha256")
    if not isinstance(recorded, dict):
        return Finding("checksums", f"{CHECKSUMS} is damaged", False)

    computed = compute_checksums(folder)
    changed = _list_differences(recorded, computed)
    if changed:
        return Finding("checksums", f"changed since saved: {', '.join(changed)}", False)
    return Finding("checksums", f"{len(computed)} files as saved", True)


def _look_at_code(
    folder: Path,
    config: Mapping[str, Any],
    student_class: type[ConvertedModel],
    has_own_kernel: bool,
) -> list[Finding]:
    """Compare the code in ``folder`` with what this package would write there."""
    carried = {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.py")
    }
    expected, auto_map = _write_own_code(student_class)
    if has_own_kernel:
        carried.pop(CUSTOM_KERNEL)
        expected.pop(CUSTOM_KERNEL)

    differing = _list_differences(carried, expected)
    if differing:
        wrote = config["kernel_ffn"].get("package_version")
        code = f"differs (written by {wrote}, installed is {__version__}): {', '.join(differing)}"
    else:
        installed = f"that of the installed hf_kernel_ffn {__version__}, byte by byte"
        code = f"{len(expected)} files, {installed}"

    own_kernel = "none"
    if has_own_kernel:
        own_kernel = f"{CUSTOM_KERNEL}, its author's: read it before you allow it"
    same_auto_map = config.get("auto_map") == auto_map
    return [
        Finding("code", code, not differing),
        Finding("own kernel", own_kernel, True),
        Finding("auto_map", "that code" if same_auto_map else "other code", same_auto_map),
    ]


def _write_own_code(student_class: type[ConvertedModel]) -> tuple[Sources, Any]:
    """Return the code that this package writes into checkpoints of a class, and its auto_map."""
    empty_entry = {"format": FORMAT, "activation": {}, "layers": {}}
    with tempfile.TemporaryDirectory() as scratch:
        student_class.config_class(kernel_ffn=empty_entry).save_pretrained(scratch)
        sources = {file.name: file.read_bytes() for file in Path(scratch).glob("*.py")}
        return sources, read_json(Path(scratch, "config.json"))["auto_map"]


def _look_at_pickles(folder: Path) -> Finding:
    """List the files in ``folder`` that run code when they are read.

    Those of a Trainer's checkpoint are no part of the model, which loads without them.
    """
    names = sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLES)
    is_trainers = (folder / TRAINER_STATE).is_file()
    odd = [name for name in names if not (is_trainers and name.startswith(TRAINING_STATE))]
    if names and not odd:
        listed = ", ".join(names)
        return Finding("pickles", f"a Trainer's state, which the model needs not: {listed}", True)
    return Finding("pickles", ", ".join(odd) or "none", not odd)


def _list_differences(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Return the names, in order, for which the two have different values, or one has none."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
