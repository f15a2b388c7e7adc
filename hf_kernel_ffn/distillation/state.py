"""The state to resume from: tensors in safetensors, the rest in JSON, written beside and renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint_code.errors import InputError
from ..storage.files import explain_write_errors, sync_to_disk
from .sharding import gather_full, shard_like

FOLDER = "resume"
"""Folder of the state, inside output_dir while a distillation runs."""
REMAINS = (f"{FOLDER}.new", f"{FOLDER}.done", "finished.new")
"""What a killed run may leave beside the state: half-written, or about to be removed."""


def save_state(
    output_dir: Path,
    trained: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    facts: dict,
    writes: bool = True,
) -> None:
    """Replace the state in ``output_dir`` by this one; killed at any moment, either the old or the new one is there. Every process
    calls this, since tensors may be sharded; one writes.

    Args:
        trained: every tensor that a stage may train or that is not the teacher's, by name.
        optimizers: of the running stage; none between stages.
        facts: JSON: where the distillation stands, and what it needs to start again.
    """
    target, fresh, old = (output_dir / f"{FOLDER}{suffix}" for suffix in ("", ".new", ".old"))
    trained = {name: gather_full(tensor.detach()).contiguous() for name, tensor in trained.items()}
    tensors, groups = _flat(optimizers)
    if not writes:
        return
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    try:
        with explain_write_errors(f"the state of the distillation in {output_dir}"):
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            save_file(trained, fresh / "trained.safetensors")
            save_file(tensors, fresh / "optimizer.safetensors")
            (fresh / "state.json").write_text(json.dumps({**facts, "groups": groups}))
            sync_to_disk(fresh)
    except InputError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if (
        target.exists()
    ):  # if not, a run was killed between the renames, and the old state is the only one
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
    """Remove the state in ``output_dir`` and what killed runs left there; killed at any moment, no part of a state looks whole."""
    for suffix in (".old", ""):
        if (output_dir / f"{FOLDER}{suffix}").exists():
            shutil.rmtree(output_dir / f"{FOLDER}.done", ignore_errors=True)
            os.rename(output_dir / f"{FOLDER}{suffix}", output_dir / f"{FOLDER}.done")
    remove_remains(output_dir)


def remove_remains(output_dir: Path) -> None:
    """Remove what is of no use to anyone."""
    for name in REMAINS:
        shutil.rmtree(output_dir / name, ignore_errors=True)


def load_facts(folder: Path) -> dict:
    """The JSON part of a state."""
    try:
        facts = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, error) from error
    if (
        not isinstance(facts, dict)
        or not {"recipe", "kernel_ffn", "position", "groups"} <= facts.keys()
    ):
        raise _damaged(folder, "state.json lacks a key")
    return facts


def load_trained(folder: Path, trained: dict[str, Tensor]) -> None:
    """Put a state's tensors into ``trained``."""
    tensors = _tensors(folder / "trained.safetensors")
    if {name: tensor.shape for name, tensor in tensors.items()} != {
        name: tensor.shape for name, tensor in trained.items()
    }:
        raise _damaged(folder, "other tensors than the recipe trains")
    for name, tensor in tensors.items():
        trained[name].data.copy_(shard_like(tensor, trained[name]))


def load_rng(folder: Path) -> None:
    """Put a state's random state back."""
    tensors = _tensors(folder / "optimizer.safetensors")
    torch.set_rng_state(tensors["rng"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def load_optimizers(folder: Path, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put a state's optimiser tensors and group settings back."""
    tensors = {
        k: v
        for k, v in _tensors(folder / "optimizer.safetensors").items()
        if not k.startswith("rng")
    }
    for number, (optimizer, groups) in enumerate(
        zip(optimizers, load_facts(folder)["groups"], strict=True)
    ):
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        for key, tensor in tensors.items():
            owner, index, name = key.split(".", 2)
            if int(owner) == number:
                state.setdefault(int(index), {})[name] = shard_like(tensor, parameters[int(index)])
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error


def _damaged(what: Path, why: object) -> InputError:
    return InputError(
        f"found {what} damaged ({why}), expected a state to resume from: remove the output_dir and start again"
    )


def _flat(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], list]:
    packed = [optimizer.state_dict() for optimizer in optimizers]
    tensors = {
        f"{number}.{index}.{name}": gather_full(value).contiguous()
        for number, part in enumerate(packed)
        for index, entry in part["state"].items()
        for name, value in entry.items()
    }
    return tensors, [part["param_groups"] for part in packed]
