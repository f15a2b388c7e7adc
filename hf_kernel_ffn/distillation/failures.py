"""What to say of a run whose numbers are no longer finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.hooks import capture_ffn_inputs_and_outputs, capture_inputs_and_outputs
from ..families.lookup import find_stock_ffn
from ..text.inputs import Inputs, make_forward_arguments
from .collectives import average_in_place
from .models import Models
from .part import Part
from .sharding import local_part
from .state import find_state, load_position


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all of ``tensors`` are, on every process. There is at least one."""
    flags = [torch.isfinite(local_part(tensor)).all() for tensor in tensors]
    finite = torch.stack(flags).all().float()
    average_in_place(finite)
    return finite.item() == 1


def describe_divergence(
    what: str,
    *,
    part: Part,
    step: int,
    models: Models,
    sharded: bool,
    skipped: int,
    output_dir: Path,
) -> str:
    """The sentence that names ``what`` was found, the step, the layer, and what is left."""
    where = _locate(part, models, sharded)
    skips = f" after {skipped} skipped steps" if skipped else ""
    left = describe_last_state(output_dir)
    return (
        f"found {what} at step {step} of stage {part.stage.name!r}{skips}, {where}, expected "
        f"finite ones ({left}): lower its learning_rate and start again in another output_dir"
    )


@torch.no_grad()
def find_first_bad_ffn(
    ffns: Mapping[str, nn.Module],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Inputs,
    *,
    layer_wise: bool,
) -> str | None:
    """Path of the first FFN with a weight, input or output that is not finite, or None.

    The student reads ``batch``; where its stage is layer-wise, the FFNs are given what the teacher
    gives its own.
    """
    for path, ffn in ffns.items():
        if not all(torch.isfinite(parameter).all() for parameter in ffn.parameters()):
            return path
    if layer_wise:
        return _first_bad_on_teacher_inputs(ffns, teacher, batch)

    base = student.base_model
    modules = {path: base.get_submodule(path) for path in ffns}
    with capture_inputs_and_outputs(modules) as seen:
        base(**make_forward_arguments(base, batch))
    for path, (inputs, outputs) in seen.items():
        if not (torch.isfinite(inputs).all() and torch.isfinite(outputs).all()):
            return path
    return None


def describe_last_state(output_dir: Path) -> str:
    """Which state an error may say is left."""
    state = find_state(output_dir)
    if state is None:
        return "no state was saved before"
    position = load_position(state)
    return f"the last good state is {state}, of step {position.step} of part {position.part}"


def _locate(part: Part, models: Models, sharded: bool) -> str:
    """In which layer numbers are not finite, when the step's batches are read."""
    if sharded:
        return "in a layer that is not looked for in a sharded run"
    for batch in part.batches:
        path = find_first_bad_ffn(
            part.ffns, models.student, models.teacher, batch, layer_wise=part.layer_wise
        )
        if path is not None:
            return f"first in {path}"
    return "in no FFN's own numbers"


def _first_bad_on_teacher_inputs(
    ffns: Mapping[str, nn.Module], teacher: PreTrainedModel, batch: Inputs
) -> str | None:
    base = teacher.base_model
    stock_ffns = {path: find_stock_ffn(teacher, path) for path in ffns}
    with capture_ffn_inputs_and_outputs(base, stock_ffns) as seen:
        base(**make_forward_arguments(base, batch))
    for path, (inputs, outputs) in seen.items():
        device = next(ffns[path].parameters()).device
        predicted = ffns[path](inputs.to(device))
        # A squared error overflows before its parts do.
        error = (predicted.float() - outputs.to(device).float()).square().mean()
        if not (torch.isfinite(inputs).all() and torch.isfinite(error)):
            return path
    return None
