"""A distillation from files to files: load, convert if need be, run the stages, save the finished student."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..checkpoint_code.errors import InputError
from ..compat import set_activation_checkpointing
from ..conversion.convert import convert
from ..families.student import check_pair, make_student_from_entry, share_equal_parameters
from ..gpu.trial import choose_kernels
from ..storage.checkpoint import save_converted
from ..storage.files import explain_write_errors, require_empty, sync_to_disk
from ..storage.loading import (
    check_vocabularies,
    get_torch_dtype,
    load_student,
    load_teacher,
    load_tokenizer,
)
from ..text.packing import read_token_ids
from ..text.prediction import make_inputs_for_prediction
from .recipe import Recipe
from .sharding import unsharded
from .state import (
    REMAINS,
    find_state,
    load_facts,
    load_rng,
    load_trained,
    remove_remains,
    remove_state,
)
from .stopping import Stop, on_sigterm
from .teacher_signal import load_records
from .trainer import Run, make_accelerator


def distill(recipe: Recipe, *, resume: bool = False, progress: bool = True) -> Path:
    """Run ``recipe`` and save the finished student in its ``output_dir``, in the dtype that the teacher is stored in.

    Args:
        resume: go on from the state that an interrupted run left in ``output_dir``; the finished weights are bit-equal to
            those of an uninterrupted run on one process.
        progress: show a bar with loss, tokens/s and time left.

    Raises:
        InputError: paths, text, models or the state to resume from are not what the recipe says.
        FloatingPointError: the loss became NaN or infinite; the stage, the step, the layer and the last state are named.
        Terminated: the process got SIGTERM, and the state is saved.
    """
    with on_sigterm() as stop:
        return _distill(recipe, resume, progress, stop)


def _distill(recipe: Recipe, resume: bool, progress: bool, stop: Stop) -> Path:
    out = Path(recipe.output_dir)
    state = find_state(out)
    if resume and state is None:
        hint = "it is finished" if (out / "config.json").exists() else "start without --resume"
        raise InputError(f"found no state to resume from in {out}: {hint}")
    if not resume:
        if state is not None:
            raise InputError(
                f"found an interrupted distillation in {out}: go on by --resume, or remove the folder"
            )
        if out.is_dir() and all(
            path.name in REMAINS for path in out.iterdir()
        ):  # killed before the first state was whole
            remove_remains(out)
        require_empty(out)
    recorded = json.loads(recipe.model_dump_json())
    if state is not None:
        _same_recipe(load_facts(state)["recipe"], recorded)

    accelerator = make_accelerator(recipe)
    torch.manual_seed(recipe.seed)
    tokenizer, teacher = teacher_of(recipe, accelerator.device)
    records = load_records(recipe, teacher)
    student: Any = student_of(recipe, teacher, tokenizer, state)
    teacher.requires_grad_(False)
    student.requires_grad_(False)
    for ffn in student.kernel_ffns().values():
        ffn.float().requires_grad_(True)
    autocast = None if recipe.dtype == "float32" else get_torch_dtype(recipe.dtype)
    plain = choose_kernels(student, recipe.fused, autocast)
    trainee = _with_lora(student, recipe) if recipe.lora else student
    if recipe.gradient_checkpointing:
        set_activation_checkpointing(student, True)
        for (
            module
        ) in student.modules():  # blocks recompute only in training mode; their dropout stays off
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    run = Run(recipe, accelerator, tokenizer, teacher, student, trainee, progress, stop, records)
    if state is not None:
        load_trained(state, run.kept)
        load_rng(state)
    if recipe.trackers:
        accelerator.init_trackers("hf_kernel_ffn", config={"recipe": json.dumps(recorded)})
    facts = {"recipe": recorded, "kernel_ffn": student.config.kernel_ffn}
    stop.between_steps = True
    run.stages(facts, state)
    stop.between_steps = False
    if run.sharded:
        student = trainee = unsharded(student, teacher)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(
            out,
            trainee,
            student,
            recipe,
            {"skipped_steps": run.skipped, **({"not_fused": plain} if plain else {})},
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()  # last: it ends the process group
    return out


def teacher_of(recipe: Recipe, device: torch.device) -> tuple[Any, Any]:
    """The tokenizer and the model that ``recipe`` names.

    Raises:
        InputError: they cannot be loaded, or cannot read sequences as long as the recipe's.
    """
    tokenizer = load_tokenizer(recipe.teacher)
    teacher = load_teacher(recipe.teacher, recipe.dtype, device)
    limit = getattr(teacher.config, "max_position_embeddings", None)
    if limit is not None and recipe.data.sequence_length > limit:
        raise InputError(
            f"found sequence_length {recipe.data.sequence_length}, expected at most the teacher's {limit}"
        )
    return tokenizer, teacher


def student_of(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer, state: Path | None = None
) -> Any:
    """The student that ``recipe`` starts from, or that ``state`` holds the weights of: loaded, or converted from ``teacher``."""
    if recipe.student is not None:
        student = load_student(
            recipe.student, recipe.dtype, teacher.device, recipe.trust_remote_code
        )
        check_pair(student, teacher)
        check_vocabularies(recipe.student, recipe.teacher)
        share_equal_parameters(student, teacher)
        return student
    if state is not None:
        return make_student_from_entry(teacher, load_facts(state)["kernel_ffn"])
    data = recipe.data
    ids = read_token_ids(
        tokenizer,
        data.sources,
        data.sequence_length,
        recipe.calibration_tokens,
        data.text_field,
        spread=True,
    )
    student, _ = convert(
        teacher, recipe.kernel_settings(), recipe.kernel_ffn.get("layers"),
        calibration_ids=make_inputs_for_prediction(teacher, tokenizer, ids, recipe.seed), calibration_tokens=recipe.calibration_tokens,
        seed=recipe.seed,
    )  # fmt: skip
    return student


def _with_lora(student: Any, recipe: Recipe) -> nn.Module:
    """The student inside peft, with adapters on every projection outside the converted FFNs and the head."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError(
            "lora needs the peft package: pip install 'hf-kernel-ffn[lora]'"
        ) from error
    from transformers.pytorch_utils import Conv1D

    assert recipe.lora is not None
    inside: tuple[nn.Module, ...] = tuple(student.kernel_ffns().values())
    skipped = {id(module) for ffn in inside for module in ffn.modules()} | {
        id(student.get_output_embeddings())
    }
    targets = [
        name
        for name, module in student.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in skipped
    ]
    for name in targets:  # merging writes into these weights, which the teacher has a share in
        module = student.get_submodule(name)
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=targets,
    )
    wrapped = get_peft_model(student, config)
    for ffn in inside:
        ffn.requires_grad_(True)
    return wrapped


def _same_recipe(before: dict, now: dict) -> None:
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise InputError(
                f"found {key} = {now.get(key)!r}, but the run to resume has {before.get(key)!r}: use the same recipe"
            )


def _finish(out: Path, trainee: Any, student: Any, recipe: Recipe, facts: dict) -> None:
    """Write the student beside, then move it into ``out``, config.json last; remove the state to resume from."""
    if recipe.lora:
        student = trainee.merge_and_unload()
    if recipe.gradient_checkpointing:
        set_activation_checkpointing(student, False)
    made = out / "finished.new"
    shutil.rmtree(made, ignore_errors=True)
    with explain_write_errors(f"the finished student in {out}"):
        made.mkdir(parents=True)
        save_converted(
            student,
            recipe.teacher,
            made,
            recipe=json.loads(recipe.model_dump_json()),
            distillation=facts,
        )
        sync_to_disk(made)
        for file in sorted(made.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, out / file.name)
        sync_to_disk(out)
    remove_state(out)
