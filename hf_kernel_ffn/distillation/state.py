"""The state to resume from: tensors in safetensors, the rest in JSON, written beside and renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = "resume"
"""Folder of the state, inside output_dir while a distillation runs."""


def save_state(output_dir: Path, trained: dict[str, Tensor], optimizers: Sequence[torch.optim.Optimizer], facts: dict) -> None:
    """Replace the state in ``output_dir`` by this one; killed at any moment, either the old or the new one is there.

    Args:
        trained: every tensor that a stage may train or that is not the teacher's, by name.
        optimizers: of the running stage; none between stages.
        facts: JSON: where the distillation stands, and what it needs to start again.
    """
    target, fresh, old = (output_dir / f"{FOLDER}{suffix}" for suffix in ("", ".new", ".old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in trained.items()}, fresh / "trained.safetensors")
    tensors, groups = _flat(optimizers)
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps({**facts, "groups": groups}))
    for file in fresh.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


def find_state(output_dir: Path) -> Path | None:
    """The folder of the last whole state in ``output_dir``, or None."""
    for suffix in ("", ".old"):  # between the two renames there is only the one before
        folder = output_dir / f"{FOLDER}{suffix}"
        if (folder / "state.json").is_file():
            return folder
    return None


def load_facts(folder: Path) -> dict:
    """The JSON part of a state."""
    return json.loads((folder / "state.json").read_text())


def load_trained(folder: Path, trained: dict[str, Tensor]) -> None:
    """Put a state's tensors into ``trained``."""
    for name, tensor in load_file(folder / "trained.safetensors").items():
        trained[name].data.copy_(tensor)


def load_rng(folder: Path) -> None:
    """Put a state's random state back."""
    tensors = load_file(folder / "optimizer.safetensors")
    torch.set_rng_state(tensors["rng"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def load_optimizers(folder: Path, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put a state's optimiser tensors and group settings back."""
    tensors = {k: v for k, v in load_file(folder / "optimizer.safetensors").items() if not k.startswith("rng")}
    for number, (optimizer, groups) in enumerate(zip(optimizers, load_facts(folder)["groups"], strict=True)):
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            owner, index, name = key.split(".", 2)
            if int(owner) == number:
                state.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _flat(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], list]:
    packed = [optimizer.state_dict() for optimizer in optimizers]
    tensors = {
        f"{number}.{index}.{name}": value.contiguous()
        for number, part in enumerate(packed)
        for index, entry in part["state"].items()
        for name, value in entry.items()
    }
    return tensors, [part["param_groups"] for part in packed]
