"""The models of a distillation, and which of their parameters train."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from ..checkpoint_code.errors import InputError, MissingPackage
from ..compat import set_activation_checkpointing
from .recipe import Lora
from .teacher_signal import TeacherSignal

if TYPE_CHECKING:
    from ..families.student import ConvertedModel


@dataclass(frozen=True)
class Models:
    """What a distillation runs on."""

    tokenizer: PreTrainedTokenizerBase
    signals: Mapping[str | None, TeacherSignal]
    """What the teacher says, by a stage's ``stored_logits``; None: by running."""
    student: ConvertedModel
    trainee: nn.Module
    """The student, or peft's model around it."""

    @property
    def teacher(self) -> PreTrainedModel:
        """The stock model."""
        return self.signals[None].teacher


def has_experts(student: ConvertedModel) -> bool:
    """Whether a converted FFN of ``student`` is an expert of a mixture, which may get no tokens."""
    return any(ffn.config.experts for ffn in student.kernel_ffns().values())


def freeze_all_but_ffns(student: ConvertedModel, teacher: PreTrainedModel) -> None:
    """Let the converted FFNs of ``student`` train, in float32, and nothing else of both models."""
    teacher.requires_grad_(False)
    student.requires_grad_(False)
    for ffn in student.kernel_ffns().values():
        ffn.float().requires_grad_(True)


def add_adapters(student: ConvertedModel, lora: Lora) -> nn.Module:
    """The student inside peft, with adapters on every projection outside the converted FFNs and the
    head.

    Raises:
        MissingPackage: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPackage(
            "lora needs the peft package: pip install 'hf-kernel-ffn[lora]'"
        ) from error

    targets = _projections_outside_ffns(student)
    for name in targets:  # merging writes into these weights, which the teacher has a share in
        module = student.get_submodule(name)
        weight = cast(nn.Parameter, module.weight)
        module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    ffns = list(student.kernel_ffns().values())
    with warnings.catch_warnings():
        # peft asks transformers for an alias that goes in version 6.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(student, config)
    for ffn in ffns:
        ffn.requires_grad_(True)
    return wrapped


def require_gradient_checkpointing(teacher: PreTrainedModel) -> None:
    """InputError if the blocks of ``teacher``'s class cannot recompute their activations."""
    if not teacher.supports_gradient_checkpointing:
        raise InputError(
            f"found gradient_checkpointing with a {type(teacher).__name__}, expected a model whose "
            "class in transformers supports it: leave it out, and take a smaller batch_size"
        )


def enable_gradient_checkpointing(student: ConvertedModel) -> None:
    """Let the blocks of ``student`` recompute their activations in the backward pass."""
    set_activation_checkpointing(student, True)
    for module in student.modules():
        # They recompute only in training mode; what is inside of them stays in evaluation mode, so
        # that their dropout stays off.
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _projections_outside_ffns(student: ConvertedModel) -> list[str]:
    """Names of the linear layers outside the converted FFNs and the head."""
    from transformers.pytorch_utils import Conv1D

    skipped = {id(student.get_output_embeddings())}
    for ffn in student.kernel_ffns().values():
        skipped.update(id(module) for module in ffn.modules())
    return [
        name
        for name, module in student.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in skipped
    ]
