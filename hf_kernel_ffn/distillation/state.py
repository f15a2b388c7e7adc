"""The state to resume from: tensors in safetensors, the rest in JSON, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint_code.errors import InputError
from ..storage.files import explain_write_errors, save_tensors, sync_to_disk
from .sharding import gather_full, shard_like

FOLDER = "resume"
"""Folder of the state, inside output_dir while a distillation runs."""
REMAINS = (f"{FOLDER}.new", f"{FOLDER}.done", "finished.new")
"""What a killed run may leave beside the state: half-written, or about to be removed."""
NEEDED = {"recipe", "kernel_ffn", "position", "groups", "text"}
"""Keys of state.json without which nothing can be resumed."""


@dataclass
class Position:
    """Where a distillation stands."""

    part: int = 0
    """Number of the part that is running."""
    step: int = 0
    """Steps of it that are made."""
    sequences: int = 0
    """Read so far, by all parts and processes."""
    skipped: int = 0
    """Steps left out because their numbers were not finite."""


def save_state(
    output_dir: Path,
    *,
    trained: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    text: Mapping[str, object],
    facts: Mapping[str, object],
    writes: bool = True,
) -> None:
    """Replace the state in ``output_dir`` by this one.

    Killed at any moment, either the old or the new one is there. Every process calls this, since
    tensors may be sharded.

    Args:
        trained: every tensor that a stage may train or that is not the teacher's, by name.
        optimizers: of the running stage; none between stages.
        text: where the reading of the text stands: tensors, and what JSON can hold.
        facts: JSON: where the distillation stands, and what it needs to start again.
        writes: whether this process is the one that writes.

    Raises:
        InputError: there is no room; the old state is untouched.
    """
    whole = {name: gather_full(tensor.detach()).contiguous() for name, tensor in trained.items()}
    optimizer_tensors, groups = _flatten_optimizers(optimizers)
    if not writes:
        return

    optimizer_tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        optimizer_tensors["rng.cuda"] = torch.cuda.get_rng_state()
    text_tensors = {name: value for name, value in text.items() if isinstance(value, Tensor)}
    text_facts = {name: value for name, value in text.items() if name not in text_tensors}
    content = json.dumps({**facts, "groups": groups, "text": text_facts})

    fresh = output_dir / f"{FOLDER}.new"
    try:
        with explain_write_errors(f"the state of the distillation in {output_dir}"):
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            save_tensors(whole, fresh / "trained.safetensors")
            save_tensors(optimizer_tensors, fresh / "optimizer.safetensors")
            save_tensors(text_tensors, fresh / "text.safetensors")
            (fresh / "state.json").write_text(content, encoding="utf-8")
            sync_to_disk(fresh)
    except InputError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _replace_state(output_dir, fresh)


def _replace_state(output_dir: Path, fresh: Path) -> None:
    """Let the whole state at ``fresh`` take the old one's place."""
    target = output_dir / FOLDER
    old = output_dir / f"{FOLDER}.old"
    # If there is none, a run was killed between the renames, and the old state is the only one.
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(fresh, target)
    sync_to_disk(output_dir)
    shutil.rmtree(old, ignore_errors=True)


def find_state(output_dir: Path) -> Path | None:
    """The folder of the last whole state in ``output_dir``, or None."""
    for suffix in ("", ".old"):  # between the two renames there is only the one before
        folder = output_dir / f"{FOLDER}{suffix}"
        if (folder / "state.json").is_file():
            return folder
    return None


def remove_state(output_dir: Path) -> None:
    """Remove the state in ``output_dir`` and what killed runs left there.

    Killed at any moment, no part of a state looks whole.
    """
    for suffix in (".old", ""):
        if (output_dir / f"{FOLDER}{suffix}").exists():
            shutil.rmtree(output_dir / f"{FOLDER}.done", ignore_errors=True)
            os.rename(output_dir / f"{FOLDER}{suffix}", output_dir / f"{FOLDER}.done")
    remove_remains(output_dir)


def remove_remains(output_dir: Path) -> None:
    """Remove what is of no use to anyone."""
    for name in REMAINS:
        shutil.rmtree(output_dir / name, ignore_errors=True)


def load_facts(folder: Path) -> dict[str, Any]:
    """The JSON part of a state.

    Raises:
        InputError: it is damaged.
    """
    try:
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, error) from error
    if not isinstance(facts, dict) or not facts.keys() >= NEEDED:
        raise _damaged(folder, "state.json lacks a key")
    return facts


def load_position(folder: Path) -> Position:
    """Where the distillation of a state stood.

    Raises:
        InputError: the state is damaged.
    """
    try:
        return Position(**load_facts(folder)["position"])
    except TypeError as error:
        raise _damaged(folder, error) from error


def load_text(folder: Path) -> dict[str, object]:
    """Where a state's reading of the text stood.

    Raises:
        InputError: the state is damaged.
    """
    return {**load_facts(folder)["text"], **_load_tensors(folder / "text.safetensors")}


def load_trained(folder: Path, trained: Mapping[str, Tensor]) -> None:
    """Put a state's tensors into ``trained``.

    Raises:
        InputError: the state is damaged, or of other tensors.
    """
    tensors = _load_tensors(folder / "trained.safetensors")
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != {name: tensor.shape for name, tensor in trained.items()}:
        raise _damaged(folder, "other tensors than the recipe trains")
    with torch.no_grad():
        for name, tensor in tensors.items():
            trained[name].copy_(shard_like(tensor, trained[name]))


def load_rng(folder: Path) -> None:
    """Put a state's random state back."""
    tensors = _load_tensors(folder / "optimizer.safetensors")
    torch.set_rng_state(tensors["rng"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def load_optimizers(folder: Path, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put a state's optimiser tensors and group settings back."""
    tensors = _load_tensors(folder / "optimizer.safetensors")
    packed_groups = load_facts(folder)["groups"]
    for number, (optimizer, groups) in enumerate(zip(optimizers, packed_groups, strict=True)):
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        for key, tensor in tensors.items():
            if key.startswith("rng"):
                continue
            owner, index, name = key.split(".", 2)
            if int(owner) == number:
                parameter = parameters[int(index)]
                state.setdefault(int(index), {})[name] = shard_like(tensor, parameter)
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error


def _damaged(what: Path, why: object) -> InputError:
    return InputError(
        f"found {what} damaged ({why}), expected a state to resume from: "
        "remove the output_dir and start again"
    )


def _flatten_optimizers(
    optimizers: Sequence[torch.optim.Optimizer],
) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors by optimiser, parameter and name, and the groups of each optimiser."""
    packed = [optimizer.state_dict() for optimizer in optimizers]
    tensors = {
        f"{number}.{index}.{name}": gather_full(value).contiguous()
        for number, part in enumerate(packed)
        for index, entry in part["state"].items()
        for name, value in entry.items()
    }
    return tensors, [part["param_groups"] for part in packed]
