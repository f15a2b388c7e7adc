"""Running the stages of a recipe on a student in memory: batches, steps, states to resume from."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.tied import AnyKernelFFN
from .accelerator import allow_idle_experts, make_accelerator
from .batches import BatchReader
from .failures import are_finite, describe_divergence
from .gradient_step import GradientStep, reshard
from .metrics import Listener, StepReport
from .models import Models, freeze_all_but_ffns, has_experts
from .optimizers import make_optimizers
from .part import Part
from .progress import ProgressBar
from .recipe import Recipe, Stage
from .sharding import shard, unsharded
from .stages import stage_parts, steps_and_sequences
from .state import (
    Position,
    load_optimizers,
    load_position,
    load_rng,
    load_text,
    load_trained,
    save_state,
)
from .stopping import Stop
from .teacher_signal import make_signals
from .thresholds import Watch
from .validation import HeldOutText

if TYPE_CHECKING:
    from ..families.student import ConvertedModel


def train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    student: ConvertedModel,
    *,
    progress: bool = False,
    listeners: Sequence[Listener] = (),
) -> None:
    """Run the stages of ``recipe`` on the FFNs of ``student``, in place and in float32.

    Nothing is saved, and the rest of both models is left frozen. What the recipe says of
    conversion, LoRA and output is not looked at. ``listeners`` are told of every step.

    Raises:
        FloatingPointError: the loss became NaN or infinite; the stage and step are named.
    """
    torch.manual_seed(recipe.seed)
    freeze_all_but_ffns(student, teacher)
    models = Models(tokenizer, make_signals(recipe, teacher), student, student)
    accelerator = make_accelerator(recipe)
    Trainer(recipe, accelerator, models, listeners=listeners, progress=progress).run()


class Trainer:
    """Trains a student by the stages of a recipe; holds what they share."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        models: Models,
        *,
        stop: Stop | None = None,
        listeners: Sequence[Listener] = (),
        progress: bool = False,
    ):
        """Shards the FFNs of the student if the recipe says so, and reads the held-out text.

        Raises:
            InputError: that text cannot be read; or a mixture of experts is to be sharded.
        """
        self.recipe = recipe
        self.accelerator = accelerator
        self.models = models
        self.stop = stop or Stop()
        self.listeners = list(listeners)
        self.progress = progress
        self.position = Position()
        self.reader = BatchReader(recipe, models, accelerator)
        self.held_out: HeldOutText | None = None
        if recipe.data.validation is not None:
            self.held_out = HeldOutText(recipe, models)

        self.sharded = recipe.shard and accelerator.num_processes > 1
        if self.sharded:
            self._shard_ffns()
        elif has_experts(models.student):
            allow_idle_experts(accelerator)
        self.gradient_step = GradientStep(recipe, accelerator, self.stop, sharded=self.sharded)
        self.trained = {
            name: parameter
            for name, parameter in models.trainee.named_parameters()
            if parameter.requires_grad
        }
        """Every parameter that any stage may train, by name."""
        self.kept = self._tensors_to_keep()
        """What a state has to hold, by name."""

    def run(self, facts: Mapping[str, object] | None = None, state: Path | None = None) -> None:
        """Run every part of every stage, from ``state`` on if there is one.

        States with ``facts`` in them are kept in output_dir, unless ``facts`` is None.

        Raises:
            FloatingPointError: the loss became NaN or infinite.
            Terminated: this process or another one was asked to stop, and the state is saved.
        """
        if state is not None:
            self._load(state)
        ffns = self.models.student.kernel_ffns()
        parts = list(stage_parts(self.recipe, list(ffns)))
        while self.position.part < len(parts):
            stage, paths = parts[self.position.part]
            part = self._make_part(stage, {path: ffns[path] for path in paths})
            if state is not None and self.position.step:
                load_optimizers(state, part.optimizers)
            state = None

            self._run_part(part, facts)

            self.position.part += 1
            self.position.step = 0
            self._save((), facts)

    def gather_models(self) -> Models:
        """The models with the student in one piece; every process has to ask for it."""
        if not self.sharded:
            return self.models
        student = unsharded(self.models.student, self.models.teacher)
        return replace(self.models, student=student, trainee=student)

    def _shard_ffns(self) -> None:
        if has_experts(self.models.student):
            raise InputError(
                "found shard: true for a mixture of experts, expected false: an expert without "
                "tokens in one process would keep the others waiting for its share; leave it out"
            )
        # The price of write mass reads the weights after the forward pass.
        gives_up = not any(stage.write_mass for stage in self.recipe.stages)
        ffns = self.models.student.kernel_ffns().values()
        shard(ffns, self.accelerator.device, gives_up)

    def _tensors_to_keep(self) -> dict[str, Tensor]:
        """All that is trained, and what else a converted FFN holds: its units."""
        kept: dict[str, Tensor] = dict(self.trained)
        for path, ffn in self.models.student.kernel_ffns().items():
            kept.update((f"{path}.{name}", buffer) for name, buffer in ffn.named_buffers())
        return kept

    def _make_part(self, stage: Stage, ffns: dict[str, AnyKernelFFN]) -> Part:
        for parameter in self.trained.values():
            parameter.requires_grad_(False)
        layer_wise = stage.name == "layer-wise"
        parameters = list(self.trained.values())
        if layer_wise:
            parameters = [parameter for ffn in ffns.values() for parameter in ffn.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)

        model = self.models.trainee
        if not layer_wise and not self.sharded:
            model = self.accelerator.prepare_model(model)
        processes = self.accelerator.num_processes
        steps, sequences_per_step = steps_and_sequences(stage, self.recipe.data, processes)
        return Part(
            stage=stage,
            data=self.recipe.data,
            ffns=ffns,
            parameters=parameters,
            optimizers=make_optimizers(self.models.trainee, parameters, stage),
            signal=self.models.signals[stage.stored_logits],
            model=model,
            steps=steps,
            sequences_per_step=sequences_per_step,
        )

    def _run_part(self, part: Part, facts: Mapping[str, object] | None) -> None:
        """Make the steps of ``part`` from the position on."""
        bar = ProgressBar(
            part.stage.name,
            part.steps,
            first=self.position.step,
            tokens_per_step=part.tokens_per_step,
            shown=self.progress and self.accelerator.is_main_process,
        )
        with bar, Watch(part.ffns, part.stage) as watch:
            for step in range(self.position.step, part.steps):
                report, stopping = self._make_step(part, watch, step)
                self.position.step = step + 1

                saves = stopping or part.saves_after(step, self.recipe.save_every_tokens)
                if saves and not are_finite(part.parameters):
                    self._diverge("weights that are not finite", part, step)
                if self.held_out is not None and part.validates_after(step):
                    loss = self._validate(part, watch, self.held_out)
                    report = replace(report, validation_loss=loss)
                bar(report)
                for listener in self.listeners:
                    listener(report)

                if saves and not part.is_last(step):
                    self._save(part.optimizers, facts)
                    if stopping:
                        raise self.stop.terminated(
                            f"after step {step} of stage {part.stage.name!r}: the state is saved "
                            f"in {self.recipe.output_dir}; go on by --resume"
                        )

    def _make_step(self, part: Part, watch: Watch, step: int) -> tuple[StepReport, bool]:
        """Read batches and update the weights, or leave the step out.

        Returns:
            what there is to say of it, and whether some process was asked to stop.
        """
        started = time.perf_counter()
        learning_rate = part.set_learning_rates(step)
        part.batches = self.reader.read(part.stage, self.position.sequences)
        self.position.sequences += part.sequences_per_step
        loss, stopping = self.gradient_step.agree(self.gradient_step.accumulate(part, watch))

        usable = self.gradient_step.is_usable(loss, part)
        if usable:
            self.gradient_step.update(part, watch, step)
        elif self.position.skipped >= self.recipe.skip_steps:
            self._diverge(f"loss {loss}", part, step)
        else:
            self.position.skipped += 1
        part.zero_gradients()

        report = StepReport(
            stage=part.stage.name,
            part=self.position.part,
            step=step,
            tokens=self.position.sequences * self.recipe.data.sequence_length,
            loss=loss,
            learning_rate=learning_rate,
            tokens_per_second=part.tokens_per_step / (time.perf_counter() - started),
            skipped=not usable,
        )
        return report, stopping

    def _validate(self, part: Part, watch: Watch, held_out: HeldOutText) -> float:
        """The stage's loss on the held-out text."""
        with watch.look_away(), self.gradient_step.autocast():
            loss = held_out.loss(part.stage, part.ffns, self.models, self.accelerator.device)
        reshard(part)
        return loss

    def _save(
        self, optimizers: Sequence[torch.optim.Optimizer], facts: Mapping[str, object] | None
    ) -> None:
        """Keep a state to resume from, unless ``facts`` is None."""
        if facts is None:
            return
        save_state(
            Path(self.recipe.output_dir),
            trained=self.kept,
            optimizers=optimizers,
            text=self.reader.text.state_dict(),
            facts={**facts, "position": asdict(self.position)},
            writes=self.accelerator.is_main_process,
        )

    def _load(self, state: Path) -> None:
        """Go on where ``state`` was saved; the optimisers are the part's."""
        load_trained(state, self.kept)
        load_rng(state)
        self.reader.text.load_state_dict(load_text(state))
        self.position = load_position(state)

    def _diverge(self, what: str, part: Part, step: int) -> NoReturn:
        raise FloatingPointError(
            describe_divergence(
                what,
                part=part,
                step=step,
                models=self.models,
                sharded=self.sharded,
                skipped=self.position.skipped,
                output_dir=Path(self.recipe.output_dir),
            )
        )
