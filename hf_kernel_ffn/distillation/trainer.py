"""Running the stages of a recipe on a student in memory: batches, steps, states to resume from."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ..checkpoint_code.errors import InputError
from ..families.hooks import capture_inputs_and_outputs
from ..storage.loading import get_torch_dtype
from ..text.inputs import Inputs, make_forward_arguments
from ..text.packing import pack_blocks
from ..text.prediction import make_inputs_for_prediction
from .objectives import OBJECTIVES
from .optimizers import optimizers, schedule
from .recipe import Data, Recipe, Stage
from .sharding import local_part, shard
from .state import find_state, load_facts, load_optimizers, save_state
from .stopping import Stop, Terminated
from .teacher_signal import Record, load_records, stored_logits
from .thresholds import Watch


class PackedText(IterableDataset):
    """Packed sequences (sequence_length,) without end: the text, shuffled anew each time it is read, from sequence ``skip`` on."""

    def __init__(self, tokenizer, data: Data, seed: int, skip: int = 0):
        self.tokenizer, self.data, self.seed, self.skip = tokenizer, data, seed, skip

    def __iter__(self) -> Iterator[Tensor]:
        skip, epoch = self.skip, 0
        while True:
            read = pack_blocks(
                self.tokenizer, self.data.sources, self.data.sequence_length, self.data.text_field
            )
            for block in _shuffled(
                read, self.data.shuffle_buffer, random.Random(f"{self.seed} {epoch}")
            ):
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


def stage_groups(recipe: Recipe, paths: list[str]) -> Iterator[tuple[Stage, list[str]]]:
    """Stages, each with the converted FFNs that it trains, of all at ``paths``; a layer-wise one is cut into its groups of layers."""
    for stage in recipe.stages:
        size = (
            stage.layers_at_once
            if stage.name == "layer-wise" and stage.layers_at_once
            else len(paths)
        )
        for low in range(0, len(paths), size):
            yield stage, paths[low : low + size]


def steps_and_sequences(stage: Stage, data: Data, processes: int) -> tuple[int, int]:
    """How many steps a part of ``stage`` has, and how many sequences so many processes read in each."""
    per_step = stage.batch_size * processes
    return math.ceil(stage.tokens / (per_step * data.sequence_length)), per_step


def autocast(dtype: str, device: torch.device) -> Any:
    """The context in which models of a recipe's ``dtype`` run."""
    return (
        nullcontext() if dtype == "float32" else torch.autocast(device.type, get_torch_dtype(dtype))
    )


def train(recipe: Recipe, tokenizer, teacher, student, *, progress: bool = False) -> None:
    """Run the stages of ``recipe`` on the FFNs of ``student``, in place and in float32; nothing is saved, and the rest of both
    models is left frozen. What the recipe says of conversion, LoRA and output is not looked at.

    Raises:
        FloatingPointError: the loss became NaN or infinite; the stage and step are named.
    """
    torch.manual_seed(recipe.seed)
    for model in (teacher, student):
        model.requires_grad_(False)
    for ffn in student.kernel_ffns().values():
        ffn.float().requires_grad_(True)
    Run(recipe, make_accelerator(recipe), tokenizer, teacher, student, student, progress).stages(
        None
    )


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The accelerator that a recipe's stages run on.

    Raises:
        InputError: it was launched with DeepSpeed, Megatron or accelerate's own FSDP, under which gradients would go unshared.
    """
    accelerator = Accelerator(
        log_with=recipe.trackers or None,
        project_dir=recipe.output_dir,
        gradient_accumulation_steps=1,
        step_scheduler_with_optimizer=False,
        # A dispatching loader drops the generator it is given, and draws from the one that LoRA's dropout draws from.
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
    )
    if accelerator.distributed_type in (
        DistributedType.DEEPSPEED,
        DistributedType.FSDP,
        DistributedType.MEGATRON_LM,
    ):
        raise InputError(
            f"found a launch with {accelerator.distributed_type.value}, expected plain processes: "
            "leave it out and say shard: true in the recipe"
        )
    return accelerator


class Run:
    """One distillation on its way: what its stages share."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        tokenizer,
        teacher,
        student,
        trainee,
        progress: bool,
        stop: Stop | None = None,
        records: dict[str, Record] | None = None,
    ):
        self.stop = stop or Stop()
        self.skipped = 0
        """Steps left out because their numbers were not finite."""
        self.recipe, self.accelerator, self.tokenizer = recipe, accelerator, tokenizer
        self.teacher, self.student, self.trainee, self.progress = (
            teacher,
            student,
            trainee,
            progress,
        )
        self.records = load_records(recipe, teacher) if records is None else records
        self.sharded = recipe.shard and accelerator.num_processes > 1
        if self.sharded:
            reshard = not any(
                stage.write_mass for stage in recipe.stages
            )  # its price reads the weights after the forward pass
            shard(student.kernel_ffns().values(), accelerator.device, reshard)
        self.trained = {name: p for name, p in trainee.named_parameters() if p.requires_grad}
        self.kept: dict[str, Tensor] = dict(
            self.trained
        )  # with what else a converted FFN holds: its units
        for path, ffn in student.kernel_ffns().items():
            self.kept.update((f"{path}.{name}", buffer) for name, buffer in ffn.named_buffers())

    def stages(self, facts: dict | None, state: Path | None = None) -> None:
        """Run every part of every stage, from ``state`` on if there is one. States are kept, with ``facts`` in them, unless
        those are None."""
        done = (
            load_facts(state)["position"]
            if state is not None
            else {"part": 0, "step": 0, "sequences": 0}
        )
        sequences, self.skipped = done["sequences"], done.get("skipped", 0)
        ffns = self.student.kernel_ffns()
        todo = list(stage_groups(self.recipe, list(ffns)))
        for number in range(done["part"], len(todo)):
            stage, paths = todo[number]
            here = state if number == done["part"] and done["step"] else None
            step = done["step"] if here else 0

            def keep(step: int, sequences: int, optimizers=(), number: int = number) -> None:
                position = {
                    "part": number,
                    "step": step,
                    "sequences": sequences,
                    "skipped": self.skipped,
                }
                if facts is not None:
                    writes, now = self.accelerator.is_main_process, {**facts, "position": position}
                    save_state(Path(self.recipe.output_dir), self.kept, optimizers, now, writes)

            sequences = self._stage(
                stage, {path: ffns[path] for path in paths}, step, sequences, here, keep
            )
            keep(0, sequences, (), number + 1)

    def _stage(
        self, stage: Stage, ffns, first: int, sequences: int, state: Path | None, keep: Callable
    ) -> int:
        accelerator, data = self.accelerator, self.recipe.data
        layer_wise = stage.name == "layer-wise"
        parameters = (
            [p for ffn in ffns.values() for p in ffn.parameters()]
            if layer_wise
            else list(self.trained.values())
        )
        for parameter in self.trained.values():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        made = optimizers(self.trainee, parameters, stage)
        if state is not None:
            load_optimizers(state, made)
        steps, per_step = steps_and_sequences(stage, data, accelerator.num_processes)
        objective = OBJECTIVES[stage.name]
        if stage.stored_logits is not None:
            objective = partial(stored_logits, self.records[stage.stored_logits])
        loader = DataLoader(
            PackedText(self.tokenizer, data, self.recipe.seed, sequences),
            batch_size=stage.batch_size,
            generator=torch.Generator(),
        )
        loader = accelerator.prepare_data_loader(loader)
        student = (
            self.trainee if layer_wise or self.sharded else accelerator.prepare_model(self.trainee)
        )
        every = max(1, self.recipe.save_every_tokens // (per_step * data.sequence_length))
        batches = iter(loader)
        shown = self.progress and accelerator.is_main_process
        with (
            _Bar(stage, steps, first, per_step * data.sequence_length, shown) as bar,
            Watch(ffns, stage) as watch,
        ):
            for step in range(first, steps):
                for group in (group for optimizer in made for group in optimizer.param_groups):
                    group["lr"] = group["peak"] * schedule(step, steps, stage.warmup)
                number = f"{self.recipe.seed} {sequences} {accelerator.process_index}"
                ids = make_inputs_for_prediction(
                    self.teacher, self.tokenizer, next(batches), number
                )
                with autocast(self.recipe.dtype, accelerator.device):
                    loss = objective(
                        stage, self.teacher, student, ffns, ids, accelerator.backward, watch.price
                    )
                value, stopping = self._agreed(loss)
                if self._usable(value, parameters):
                    if layer_wise and accelerator.num_processes > 1 and not self.sharded:
                        for parameter in parameters:
                            parameter.grad = accelerator.reduce(parameter.grad, "mean")
                    if not layer_wise:
                        accelerator.clip_grad_norm_(parameters, stage.clip)
                    for optimizer in made:
                        optimizer.step()
                    watch.after(step, self._average)
                    if self.sharded:  # fitting a threshold has gathered the weights
                        for ffn in ffns.values():
                            ffn.reshard()
                    bar.advance(value)
                else:
                    self._skip_or_stop(f"loss {value}", stage, step, ffns, ids)
                for optimizer in made:
                    optimizer.zero_grad()
                sequences += per_step
                saves = stopping or (step + 1) % every == 0 or step + 1 == steps
                if saves and not self._finite(parameters):
                    raise self._diverged("weights that are not finite", stage, step, ffns, ids)
                if self.recipe.trackers:
                    accelerator.log({f"{stage.name}/loss": value, f"{stage.name}/step": step})
                if saves and step + 1 < steps:
                    keep(step + 1, sequences, made)
                    if stopping:
                        raise self._stopped(stage, step)
        return sequences

    def _agreed(self, loss: Tensor) -> tuple[float, bool]:
        """The mean loss of all processes, and whether one of them was asked to stop."""
        pair = torch.stack([loss.double(), loss.new_full((), self.stop.asked, dtype=torch.float64)])
        value, asked = (
            self.accelerator.reduce(pair, "mean") if self.accelerator.num_processes > 1 else pair
        ).tolist()
        return value, asked > 0

    def _usable(self, loss: float, parameters) -> bool:
        """Whether a step may be made. Gradients are looked at only where a bad one could be left out: otherwise the weights are,
        before they are saved."""
        if not math.isfinite(loss) or not self.recipe.skip_steps:
            return math.isfinite(loss)
        return self._finite(
            [parameter.grad for parameter in parameters if parameter.grad is not None]
        )

    def _finite(self, tensors: list) -> bool:
        """Whether all of ``tensors`` are, on every process."""
        finite = (
            torch.stack([torch.isfinite(local_part(tensor)).all() for tensor in tensors])
            .all()
            .float()
        )
        self._average(finite)
        return finite.item() == 1

    def _skip_or_stop(self, what: str, stage: Stage, step: int, ffns, ids) -> None:
        if self.skipped >= self.recipe.skip_steps:
            raise self._diverged(what, stage, step, ffns, ids)
        self.skipped += 1

    def _diverged(self, what: str, stage: Stage, step: int, ffns, ids) -> FloatingPointError:
        if self.sharded:
            where = "in a layer that is not looked for in a sharded run"
        else:
            layer = first_bad(ffns, self.student, self.teacher, ids, stage.name == "layer-wise")
            where = f"first in {layer}" if layer else "in no FFN's own numbers"
        skips = f" after {self.skipped} skipped steps" if self.skipped else ""
        state = find_state(Path(self.recipe.output_dir))
        left = (
            "no state was saved before"
            if state is None
            else f"the last good state is {state}, of {_where(state)}"
        )
        return FloatingPointError(
            f"found {what} at step {step} of stage {stage.name!r}{skips}, {where}, expected finite ones ({left}): "
            "lower its learning_rate and start again in another output_dir"
        )

    def _stopped(self, stage: Stage, step: int) -> Terminated:
        return Terminated(
            f"stopped by SIGTERM after step {step} of stage {stage.name!r}: the state is saved in {self.recipe.output_dir}; "
            "go on by --resume"
        )

    def _average(self, tensor: Tensor) -> None:
        if self.accelerator.num_processes > 1:
            tensor.copy_(self.accelerator.reduce(tensor, "mean"))


@torch.no_grad()
def first_bad(
    ffns: dict[str, nn.Module], student, teacher, ids: Inputs, layer_wise: bool
) -> str | None:
    """The first of ``ffns`` (by path) with a weight, input or output that is not finite when ``ids`` are read, or None; layer-wise
    its inputs are the teacher's."""
    for path, ffn in ffns.items():
        if not all(torch.isfinite(parameter).all() for parameter in ffn.parameters()):
            return path
    model = teacher if layer_wise else student
    with capture_inputs_and_outputs(
        {path: model.base_model.get_submodule(path) for path in ffns}
    ) as seen:
        model.base_model(**make_forward_arguments(model.base_model, ids))
    for path, (given, written) in seen.items():
        if (
            layer_wise
        ):  # what was recorded is the teacher's own; a squared error overflows before its parts do
            written = (ffns[path](given).float() - written.float()).square().mean()
        if not torch.isfinite(given).all() or not torch.isfinite(written).all():
            return path
    return None


def _where(state: Path) -> str:
    position = load_facts(state)["position"]
    return f"step {position['step']} of part {position['part']}"


class _Bar:
    """A progress bar with loss, tokens/s and time left; silent when not shown."""

    def __init__(self, stage: Stage, steps: int, first: int, tokens_per_step: int, shown: bool):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

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
        self.bar.update(
            self.task,
            advance=1,
            loss=f"{self.average:.5f}",
            speed=f"{speed * self.tokens:,.0f}" if speed else "–",
        )
