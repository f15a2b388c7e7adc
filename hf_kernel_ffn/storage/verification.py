"""Is a checkpoint what it says: its config, its weights, their checksums, and whose code it carries."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import __version__
from ..checkpoint_code.errors import InputError
from ..checkpoint_code.integrity import (
    CHECKSUMS,
    check_folder,
    check_model,
    compute_checksums,
    read_json,
)
from ..checkpoint_code.settings import FORMAT
from .kernel_files import has_custom_kernel
from .loading import get_student_class, load_pretrained

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    found: str
    good: bool


def verify_folder(folder: str | Path) -> list[Finding]:
    """What there is to say about the converted checkpoint in the local ``folder``. Nothing of its code runs.

    Raises:
        InputError: it is no converted checkpoint, or its config or weights cannot be read.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"found no config.json in {folder}, expected the folder of a converted model: check the path"
        )
    config = read_json(folder / "config.json")
    if config.get("kernel_ffn") is None:
        raise InputError(
            f"found no kernel_ffn entry in {folder}/config.json, expected a converted model: run hf-kernel-ffn convert"
        )
    (kind, brought), entry, own = (
        get_student_class(config, str(folder)),
        config["kernel_ffn"],
        has_custom_kernel(str(folder)),
    )
    if kind is None:
        raise InputError(
            f"found a family with code of its own in {folder}, expected one of transformers': read {folder}/{brought}"
        )
    tensors = check_folder(folder)
    if not own:  # its sizes are known without running anything of the checkpoint's
        settings = load_pretrained(kind.config_class.from_pretrained, str(folder))
        if tensors is not None:
            with torch.device("meta"):
                check_model(kind(settings), tensors, folder)
    found = [
        Finding(
            "config",
            f"format {entry.get('format')}, converted by hf_kernel_ffn {entry.get('package_version')}",
            True,
        ),
        Finding(
            "weights",
            "quantised: not looked into"
            if tensors is None
            else f"{len(tensors)} tensors, as the config has them",
            True,
        ),
        *_checksums(folder),
        *_code(folder, config, kind.config_class, own),
    ]
    pickles = sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLES)
    return [*found, Finding("pickles", ", ".join(pickles) or "none", not pickles)]


def _checksums(folder: Path) -> list[Finding]:
    if not (folder / CHECKSUMS).is_file():
        return [Finding("checksums", "none recorded: save it again to have them", False)]
    recorded, now = read_json(folder / CHECKSUMS).get("sha256"), compute_checksums(folder)
    if not isinstance(recorded, dict):
        return [Finding("checksums", f"{CHECKSUMS} is damaged", False)]
    odd = sorted(name for name in {*recorded, *now} if recorded.get(name) != now.get(name))
    return [
        Finding(
            "checksums",
            f"changed since saved: {', '.join(odd)}" if odd else f"{len(now)} files as saved",
            not odd,
        )
    ]


def _code(folder: Path, config: dict, kind: Any, own: bool) -> list[Finding]:
    """The code in ``folder`` beside that which this package would write there for the config class ``kind``."""
    carried = {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.py")
    }
    with tempfile.TemporaryDirectory() as scratch:
        kind(kernel_ffn={"format": FORMAT, "activation": {}, "layers": {}}).save_pretrained(scratch)
        ours = {file.name: file.read_bytes() for file in Path(scratch).glob("*.py")}
        auto_map = read_json(Path(scratch, "config.json"))["auto_map"]
    if own:
        carried.pop("custom_kernel.py")
        ours.pop("custom_kernel.py")
    other = sorted(name for name in {*carried, *ours} if carried.get(name) != ours.get(name))
    same = f"that of the installed hf_kernel_ffn {__version__}, byte by byte"
    wrote = f"written by {config['kernel_ffn'].get('package_version')}, installed is {__version__}"
    return [
        Finding(
            "code",
            f"differs ({wrote}): {', '.join(other)}" if other else f"{len(ours)} files, {same}",
            not other,
        ),
        Finding(
            "own kernel",
            "custom_kernel.py, its author's: read it before you allow it" if own else "none",
            True,
        ),
        Finding(
            "auto_map",
            "that code" if config.get("auto_map") == auto_map else "other code",
            config.get("auto_map") == auto_map,
        ),
    ]
