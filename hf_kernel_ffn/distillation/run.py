"""A distillation from files to files: load, convert if need be, train, save the student."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from ..compat import set_activation_checkpointing
from ..conversion.convert import convert
from ..families.student import check_pair, make_student_from_entry, share_equal_parameters
from ..storage.checkpoint import save_converted
from ..storage.files import explain_write_errors, require_empty, sync_to_disk
from ..storage.loading import (
    check_tokenizer,
    check_vocabularies,
    load_stock_on_meta,
    load_student,
    load_teacher,
    load_tokenizer,
)
from ..storage.model_files import read_stock_config
from ..text.documents import require_readable
from ..text.inputs import find_longest_row
from ..text.packing import read_token_ids
from ..text.prediction import (
    make_inputs_for_prediction,
    predicts_masked,
    require_head,
    require_mask,
    require_text_input,
)
from ..text.row_frame import find_row_frame
from .accelerator import check_trackers, make_accelerator
from .fused import choose_fused_readouts
from .metrics import METRICS, Listener, MetricsFile, Trackers
from .models import (
    Models,
    add_adapters,
    enable_gradient_checkpointing,
    freeze_all_but_ffns,
    require_gradient_checkpointing,
)
from .recipe import Recipe
from .records import can_do_without_teacher
from .state import (
    REMAINS,
    find_state,
    load_facts,
    load_position,
    remove_remains,
    remove_state,
)
from .stopping import Stop, on_stop_signals
from .teacher_signal import make_signals
from .trainer import Trainer

if TYPE_CHECKING:
    from ..families.student import ConvertedModel


PROJECT = "hf_kernel_ffn"
"""The name that trackers are given."""


def distill(recipe: Recipe, *, resume: bool = False, progress: bool = True) -> Path:
    """Run ``recipe`` and save the finished student in its ``output_dir``.

    It is saved in the dtype that the teacher is stored in. While the stages run, metrics.jsonl in
    ``output_dir`` gets a line for every step.

    Args:
        resume: go on from the state that an interrupted run left in ``output_dir``; the finished
            weights are bit-equal to those of an uninterrupted run on one process.
        progress: show a bar with loss, tokens/s and time left.

    Raises:
        InputError: paths, text, models, trackers or the state to resume from are not what the
            recipe says.
        FloatingPointError: the loss became NaN or infinite; the stage, the step, the layer and the
            last state are named.
        Terminated: the process got SIGTERM or SIGINT (Ctrl-C), and the state is saved.
    """
    with on_stop_signals() as stop:
        return _distill(recipe, resume=resume, progress=progress, stop=stop)


def _distill(recipe: Recipe, *, resume: bool, progress: bool, stop: Stop) -> Path:
    check_trackers(recipe)
    state = _find_start(recipe, resume)
    accelerator = make_accelerator(recipe)
    torch.manual_seed(recipe.seed)

    models = _load_models(recipe, accelerator.device, state)
    before = None if state is None else load_facts(state).get("fused")
    fused = choose_fused_readouts(models.student, recipe, before)
    models = _prepare_trainee(models, recipe)
    metrics = _open_metrics(recipe, state) if accelerator.is_main_process else None
    listeners: list[Listener] = [] if metrics is None else [metrics]
    trainer = Trainer(recipe, accelerator, models, stop=stop, progress=progress)

    recorded = json.loads(recipe.model_dump_json())
    if recipe.trackers:
        accelerator.init_trackers(PROJECT, config={"recipe": json.dumps(recorded)})
        listeners.append(Trackers(accelerator))
    trainer.listeners += listeners
    facts = {
        "recipe": recorded,
        "kernel_ffn": models.student.config.kernel_ffn,
        "fused": fused.to_json(),
    }
    stop.between_steps = True
    try:
        trainer.run(facts, state)
    finally:
        stop.between_steps = False
        if metrics is not None:
            metrics.close()

    models = trainer.gather_models()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report: dict[str, object] = {"skipped_steps": trainer.position.skipped}
        if fused.refused:
            report["not_fused"] = fused.refused
        _finish(models, recipe, report)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # last: it ends the process group
    return Path(recipe.output_dir)


def _find_start(recipe: Recipe, resume: bool) -> Path | None:
    """The state to go on from, or None: then output_dir is left new or empty.

    Raises:
        InputError: there is no state, or one that is not to be gone on from, or of another recipe.
    """
    out = Path(recipe.output_dir)
    state = find_state(out)
    if resume and state is None:
        hint = "it is finished" if (out / "config.json").exists() else "start without --resume"
        raise InputError(f"found no state to resume from in {out}: {hint}")
    if resume and state is not None:
        _require_same_recipe(load_facts(state)["recipe"], json.loads(recipe.model_dump_json()))
        return state
    if state is not None:
        raise InputError(
            f"found an interrupted distillation in {out}: go on by --resume, or remove the folder"
        )
    left_by_killed = {*REMAINS, METRICS}  # before the first state was whole
    if out.is_dir() and all(path.name in left_by_killed for path in out.iterdir()):
        remove_remains(out)
        (out / METRICS).unlink(missing_ok=True)
    require_empty(out)
    return None


def _require_same_recipe(before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """InputError unless the run before had the recipe of ``now``, what is new in it by default."""
    with suppress(ValidationError):
        before = json.loads(Recipe.model_validate(before).model_dump_json())
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise InputError(
                f"found {key} = {now.get(key)!r}, but the run to resume has {before.get(key)!r}: "
                "use the same recipe"
            )


def _load_models(recipe: Recipe, device: torch.device, state: Path | None) -> Models:
    """Everything that the stages run on, the student's FFNs ready to be trained."""
    require_readable([*recipe.data.sources, *recipe.data.validation_sources])
    tokenizer, teacher = teacher_of(recipe, device, empty=can_do_without_teacher(recipe))
    if recipe.gradient_checkpointing:
        require_gradient_checkpointing(teacher)
    signals = make_signals(recipe, teacher)
    student = student_of(recipe, teacher, tokenizer, state, device=device)
    freeze_all_but_ffns(student, teacher)
    return Models(tokenizer, signals, student, student)


def _prepare_trainee(models: Models, recipe: Recipe) -> Models:
    """The models with what the recipe asks of the rest of the student."""
    trainee: nn.Module = models.student
    if recipe.lora is not None:
        trainee = add_adapters(models.student, recipe.lora)
    if recipe.gradient_checkpointing:
        enable_gradient_checkpointing(models.student)
    return replace(models, trainee=trainee)


def _open_metrics(recipe: Recipe, state: Path | None) -> MetricsFile:
    """The file of metrics, with no lines of steps that will be made again."""
    sequences = 0 if state is None else load_position(state).sequences
    return MetricsFile(Path(recipe.output_dir), sequences * recipe.data.sequence_length)


def teacher_of(
    recipe: Recipe, device: torch.device, *, empty: bool = False
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the model that ``recipe`` names.

    Args:
        empty: leave the model's weights where they are, and the model on the meta device.

    Raises:
        InputError: they cannot be loaded, or cannot read what the recipe gives them: sequences as
            long, a chat, the start token, or all tokens.
    """
    read_stock_config(recipe.teacher)
    tokenizer = load_tokenizer(recipe.teacher)
    find_row_frame(tokenizer, recipe.data.text_format)  # refuses before the model is loaded
    if empty:
        teacher = load_stock_on_meta(recipe.teacher, recipe.dtype, recipe.trust_remote_code)
    else:
        teacher = load_teacher(recipe.teacher, recipe.dtype, device, recipe.trust_remote_code)
    check_tokenizer(tokenizer, teacher)
    require_text_input(teacher)
    if any(stage.name == "logits" for stage in recipe.stages):
        require_head(teacher)
    if predicts_masked(teacher):
        require_mask(teacher, tokenizer)
    limit = find_longest_row(teacher)
    if limit is not None and recipe.data.sequence_length > limit:
        raise InputError(
            f"found sequence_length {recipe.data.sequence_length}, "
            f"expected at most the teacher's {limit}"
        )
    return tokenizer, teacher


def student_of(
    recipe: Recipe,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: Path | None = None,
    *,
    device: torch.device | None = None,
) -> ConvertedModel:
    """The student that ``recipe`` starts from: loaded onto ``device`` (None: the teacher's), or
    converted from ``teacher``.

    Where there is a ``state``, a converted one is empty, since the state holds its weights.
    """
    if recipe.student is not None:
        place = teacher.device if device is None else device
        student = load_student(recipe.student, recipe.dtype, place, recipe.trust_remote_code)
        check_pair(student, teacher)
        check_vocabularies(recipe.student, recipe.teacher)
        if teacher.device.type != "meta":
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
        data.text_format,
        spread=True,
    )
    student, _ = convert(
        teacher,
        recipe.kernel_settings(),
        cast(Any, recipe.kernel_ffn.get("layers")),
        calibration_ids=make_inputs_for_prediction(teacher, tokenizer, ids, recipe.seed),
        calibration_tokens=recipe.calibration_tokens,
        allocate=bool(recipe.kernel_ffn.get("allocate", False)),
        seed=recipe.seed,
    )
    return student


def _finish(models: Models, recipe: Recipe, report: Mapping[str, object]) -> None:
    """Put the finished student into output_dir, and remove the state to resume from.

    It is written beside and moved, config.json last.
    """
    student = models.student
    if recipe.lora:
        student = cast(Any, models.trainee).merge_and_unload()
    if recipe.gradient_checkpointing:
        set_activation_checkpointing(student, False)

    out = Path(recipe.output_dir)
    fresh = out / "finished.new"
    shutil.rmtree(fresh, ignore_errors=True)
    with explain_write_errors(f"the finished student in {out}"):
        fresh.mkdir(parents=True)
        save_converted(
            student,
            recipe.teacher,
            fresh,
            place=out,
            recipe=json.loads(recipe.model_dump_json()),
            distillation=dict(report),
        )
        sync_to_disk(fresh)
        for file in sorted(fresh.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, out / file.name)
        sync_to_disk(out)
    remove_state(out)
