"""The loop: load, convert if need be, run the stages on accelerate, save the finished student."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data import blocks, token_ids
from ..errors import InputError
from ..loading import check_vocabularies, load_student, load_teacher, load_tokenizer, torch_dtype
from ..surgery import check_pair, convert, require_empty, save_converted, share_equal, student_from_entry
from .objectives import OBJECTIVES
from .recipe import Data, Recipe, Stage
from .state import FOLDER, find_state, load_facts, load_optimizers, load_rng, load_trained, save_state


class PackedText(IterableDataset):
    """Packed sequences (sequence_length,) without end: the text, shuffled anew each time it is read, from sequence ``skip`` on."""

    def __init__(self, tokenizer, data: Data, seed: int, skip: int = 0):
        self.tokenizer, self.data, self.seed, self.skip = tokenizer, data, seed, skip

    def __iter__(self) -> Iterator[Tensor]:
        skip, epoch = self.skip, 0
        while True:
            read = blocks(self.tokenizer, self.data.sources, self.data.sequence_length, self.data.text_field)
            for block in _shuffled(read, self.data.shuffle_buffer, random.Random(f"{self.seed} {epoch}")):
                if skip:
                    skip -= 1
                else:
                    yield block
            epoch += 1


def _shuffled(items: Iterator[Tensor], size: int, rng: random.Random) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for item in items:
        held.append(item)
        if len(held) >= size:
            index = rng.randrange(len(held))
            held[index], held[-1] = held[-1], held[index]
            yield held.pop()
    rng.shuffle(held)
    yield from held


def distill(recipe: Recipe, *, resume: bool = False, progress: bool = True) -> Path:
    """Run ``recipe`` and save the finished student in its ``output_dir``, in the dtype that the teacher is stored in.

    Args:
        resume: go on from the state that an interrupted run left in ``output_dir``; the finished weights are bit-equal to
            those of an uninterrupted run on one process.
        progress: show a bar with loss, tokens/s and time left.

    Raises:
        InputError: paths, text, models or the state to resume from are not what the recipe says.
        FloatingPointError: the loss became NaN or infinite; the stage and step are named.
    """
    out = Path(recipe.output_dir)
    state = find_state(out)
    if resume and state is None:
        raise InputError(f"found no state to resume from in {out}: start without --resume")
    if not resume:
        if state is not None:
            raise InputError(f"found an interrupted distillation in {out}: go on by --resume, or remove the folder")
        require_empty(out)
    recorded = json.loads(recipe.model_dump_json())
    if state is not None:
        _same_recipe(load_facts(state)["recipe"], recorded)

    accelerator = Accelerator(
        log_with=recipe.trackers or None,
        project_dir=str(out),
        gradient_accumulation_steps=1,
        step_scheduler_with_optimizer=False,
        # A dispatching loader drops the generator it is given, and draws from the one that LoRA's dropout draws from.
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
    )
    torch.manual_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.teacher)
    teacher = load_teacher(recipe.teacher, recipe.dtype, accelerator.device)
    limit = getattr(teacher.config, "max_position_embeddings", None)
    if limit is not None and recipe.data.sequence_length > limit:
        raise InputError(f"found sequence_length {recipe.data.sequence_length}, expected at most the teacher's {limit}")
    student: Any = _student(recipe, teacher, tokenizer, state)
    teacher.requires_grad_(False)
    student.requires_grad_(False)
    for ffn in student.kernel_ffns().values():
        ffn.float().requires_grad_(True)
    trainee = _with_lora(student, recipe) if recipe.lora else student
    if recipe.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
        for module in student.modules():  # blocks recompute only in training mode; their dropout stays off
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    run = _Run(recipe, accelerator, tokenizer, teacher, student, trainee, progress)
    if state is not None:
        load_trained(state, run.kept)
        load_rng(state)
    if recipe.trackers:
        accelerator.init_trackers("hf_kernel_ffn", config={"recipe": json.dumps(recorded)})
    facts = {"recipe": recorded, "kernel_ffn": student.config.kernel_ffn}
    run.stages(facts, state)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(out, trainee, student, recipe)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # last: it ends the process group
    return out


class _Run:
    """One distillation on its way: what its stages share."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, tokenizer, teacher, student, trainee, progress: bool):
        self.recipe, self.accelerator, self.tokenizer = recipe, accelerator, tokenizer
        self.teacher, self.student, self.trainee, self.progress = teacher, student, trainee, progress
        self.trained = {name: p for name, p in trainee.named_parameters() if p.requires_grad}
        self.kept: dict[str, Tensor] = dict(self.trained)  # with what else a converted FFN holds: its units
        for path, ffn in student.kernel_ffns().items():
            self.kept.update((f"{path}.{name}", buffer) for name, buffer in ffn.named_buffers())

    def stages(self, facts: dict, state: Path | None) -> None:
        """Run every part of every stage, from the state on if there is one."""
        done = load_facts(state)["position"] if state is not None else {"part": 0, "step": 0, "sequences": 0}
        sequences = done["sequences"]
        parts = list(self._parts())
        for number in range(done["part"], len(parts)):
            stage, ffns = parts[number]
            here = state if number == done["part"] and done["step"] else None
            step = done["step"] if here else 0

            def keep(step: int, sequences: int, optimizers=(), number: int = number) -> None:
                position = {"part": number, "step": step, "sequences": sequences}
                if self.accelerator.is_main_process:
                    save_state(Path(self.recipe.output_dir), self.kept, optimizers, {**facts, "position": position})

            sequences = self._stage(stage, ffns, step, sequences, here, keep)
            keep(0, sequences, (), number + 1)

    def _parts(self) -> Iterator[tuple[Stage, dict[str, nn.Module]]]:
        """Stages, a layer-wise one cut into its groups of layers."""
        ffns = self.student.kernel_ffns()
        for stage in self.recipe.stages:
            size = stage.layers_at_once if stage.name == "layer-wise" and stage.layers_at_once else len(ffns)
            paths = list(ffns)
            for low in range(0, len(paths), size):
                yield stage, {path: ffns[path] for path in paths[low : low + size]}

    def _stage(self, stage: Stage, ffns, first: int, sequences: int, state: Path | None, keep: Callable) -> int:
        accelerator, data = self.accelerator, self.recipe.data
        layer_wise = stage.name == "layer-wise"
        parameters = [p for ffn in ffns.values() for p in ffn.parameters()] if layer_wise else list(self.trained.values())
        for parameter in self.trained.values():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizers = _optimizers(self.trainee, parameters, stage)
        if state is not None:
            load_optimizers(state, optimizers)
        per_step = stage.batch_size * accelerator.num_processes
        steps = math.ceil(stage.tokens / (per_step * data.sequence_length))
        loader = DataLoader(
            PackedText(self.tokenizer, data, self.recipe.seed, sequences),
            batch_size=stage.batch_size,
            generator=torch.Generator(),
        )
        loader = accelerator.prepare_data_loader(loader)
        student = self.trainee if layer_wise else accelerator.prepare_model(self.trainee)
        every = max(1, self.recipe.save_every_tokens // (per_step * data.sequence_length))
        batches = iter(loader)
        with _Bar(stage, steps, first, per_step * data.sequence_length, self.progress and accelerator.is_main_process) as bar:
            for step in range(first, steps):
                for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                    group["lr"] = group["peak"] * _schedule(step, steps, stage.warmup)
                ids = next(batches)
                with self._autocast():
                    loss = OBJECTIVES[stage.name](stage, self.teacher, student, ffns, ids, accelerator.backward)
                value = accelerator.reduce(loss, "mean").item() if accelerator.num_processes > 1 else loss.item()
                if not math.isfinite(value):
                    raise _diverged(f"loss {value}", stage, step)
                if layer_wise and accelerator.num_processes > 1:
                    for parameter in parameters:
                        parameter.grad = accelerator.reduce(parameter.grad, "mean")
                if not layer_wise:
                    accelerator.clip_grad_norm_(parameters, stage.clip)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                sequences += per_step
                bar.advance(value)
                saves = (step + 1) % every == 0 or step + 1 == steps
                if saves and not all(torch.isfinite(parameter).all() for parameter in parameters):
                    raise _diverged("weights that are not finite", stage, step)
                if self.recipe.trackers:
                    accelerator.log({f"{stage.name}/loss": value, f"{stage.name}/step": step})
                if (step + 1) % every == 0 and step + 1 < steps:
                    keep(step + 1, sequences, optimizers)
        return sequences

    def _autocast(self):
        if self.recipe.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, torch_dtype(self.recipe.dtype))


def _diverged(what: str, stage: Stage, step: int) -> FloatingPointError:
    return FloatingPointError(
        f"found {what} at step {step} of stage {stage.name!r}, expected finite ones: "
        "lower its learning_rate and start again in another output_dir"
    )


def _schedule(step: int, steps: int, warmup: float) -> float:
    rise = max(1.0, warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


MUON_STEP = 0.2
"""Root mean square of Muon's update at learning rate 1 when it is matched to AdamW's (torch.optim.Muon)."""


def _optimizers(model: nn.Module, parameters: list[nn.Parameter], stage: Stage) -> list[torch.optim.Optimizer]:
    groups = _groups(model, parameters, stage)
    if stage.optimizer == "adamw":
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95))]
    matrices = [group for group in groups if min(group["params"][0].shape) > 1 and group["params"][0].ndim == 2]
    vectors = [group for group in groups if not any(group is matrix for matrix in matrices)]
    for group in matrices:
        group["peak"] /= MUON_STEP
    return [
        torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(vectors, betas=(0.9, 0.95)),
    ]


def _groups(model: nn.Module, parameters: list[nn.Parameter], stage: Stage) -> list[dict]:
    """One optimiser group per tensor, its peak learning rate in proportion to the tensor's scale."""
    wanted = {id(p) for p in parameters}
    groups = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in wanted:
                continue
            scale = parameter.detach().square().mean().sqrt().item()
            if leaf == "bias" and weight is not None:  # added to weight @ x, with x of order one per feature
                scale = max(scale, weight.detach().square().mean().sqrt().item() * weight.shape[1] ** 0.5)
            if ".log_ratio" in name or scale == 0:
                scale = 1.0 if parameter.numel() == 1 else parameter.shape[-1] ** -0.5
            decay = stage.weight_decay if parameter.ndim == 2 else 0.0
            groups.append({"params": [parameter], "peak": stage.learning_rate * scale, "weight_decay": decay})
    return groups


def _student(recipe: Recipe, teacher: PreTrainedModel, tokenizer, state: Path | None) -> Any:
    if recipe.student is not None:
        student = load_student(recipe.student, recipe.dtype, teacher.device, recipe.trust_remote_code)
        check_pair(student, teacher)
        check_vocabularies(recipe.student, recipe.teacher)
        share_equal(student, teacher)
        return student
    if state is not None:
        return student_from_entry(teacher, load_facts(state)["kernel_ffn"])
    data = recipe.data
    ids = token_ids(tokenizer, data.sources, data.sequence_length, recipe.calibration_tokens, data.text_field, spread=True)
    student, _ = convert(
        teacher, recipe.kernel_settings(), recipe.kernel_ffn.get("layers"),
        calibration_ids=ids, calibration_tokens=recipe.calibration_tokens, seed=recipe.seed,
    )  # fmt: skip
    return student


def _with_lora(student: Any, recipe: Recipe) -> nn.Module:
    """The student inside peft, with adapters on every projection outside the converted FFNs and the head."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("lora needs the peft package: pip install 'hf-kernel-ffn[lora]'") from error
    from transformers.pytorch_utils import Conv1D

    assert recipe.lora is not None
    inside: tuple[nn.Module, ...] = tuple(student.kernel_ffns().values())
    skipped = {id(module) for ffn in inside for module in ffn.modules()} | {id(student.get_output_embeddings())}
    targets = [
        name
        for name, module in student.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in skipped
    ]
    for name in targets:  # merging writes into these weights, which the teacher has a share in
        module = student.get_submodule(name)
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    config = LoraConfig(
        r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, lora_dropout=recipe.lora.dropout, target_modules=targets
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


def _finish(out: Path, trainee: Any, student: Any, recipe: Recipe) -> None:
    """Write the student beside, then move it into ``out``, config.json last; remove the state to resume from."""
    if recipe.lora:
        student = trainee.merge_and_unload()
    if recipe.gradient_checkpointing:
        student.gradient_checkpointing_disable()
    made = out / "finished.new"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    save_converted(student, recipe.teacher, made, recipe=json.loads(recipe.model_dump_json()))
    for file in sorted(made.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, out / file.name)
    made.rmdir()
    for suffix in ("", ".new", ".old"):
        shutil.rmtree(out / f"{FOLDER}{suffix}", ignore_errors=True)


class _Bar:
    """A progress bar with loss, tokens/s and time left; silent when not shown."""

    def __init__(self, stage: Stage, steps: int, first: int, tokens_per_step: int, shown: bool):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.tokens = tokens_per_step
        self.average: float | None = None
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"), TimeRemainingColumn(), disable=not shown,
        )  # fmt: skip
        self.task = self.bar.add_task(stage.name, total=steps, completed=first, loss="–", speed="–")

    def __enter__(self):
        self.bar.__enter__()
        return self

    def __exit__(self, *error):
        self.bar.__exit__(*error)

    def advance(self, loss: float) -> None:
        self.average = loss if self.average is None else 0.95 * self.average + 0.05 * loss
        speed = self.bar.tasks[0].speed
        self.bar.update(self.task, advance=1, loss=f"{self.average:.5f}", speed=f"{speed * self.tokens:,.0f}" if speed else "–")
