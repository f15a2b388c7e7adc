"""What a teacher says of a batch: a running one, or one whose predictions were recorded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint_code.parameters import to_at_least_float32
from ..families.hooks import watch_ffns
from ..families.lookup import find_stock_ffn
from ..text.inputs import Inputs, make_forward_arguments
from ..text.prediction import select_predicting_logits
from .divergence import kl, kl_of_logits, soften, top_and_rest_log_probs
from .recipe import Recipe
from .records import Record, load_records

See = Callable[[str, Tensor, Tensor], None]
"""Is given an FFN's path, its inputs and its outputs (tokens, hidden_size)."""


class TeacherSignal(ABC):
    """What objectives ask of a teacher."""

    teacher: PreTrainedModel
    """The stock model. Its class and config tell what it and the student read and predict."""

    @abstractmethod
    def divergence(self, batch: Inputs, logits: Tensor, temperature: float) -> Tensor:
        """KL(teacher ‖ student) (predicted tokens…) in nats at ``temperature``.

        Args:
            batch: what both read.
            logits: the student's (rows, length, vocabulary), already over the temperature.
        """

    @abstractmethod
    def watch_ffns(self, batch: Inputs, paths: Sequence[str], see: See) -> None:
        """Call ``see`` for every FFN of ``paths`` in the order in which the teacher runs them.

        An expert of a mixture that no token of the ``batch`` goes to is seen too, with no tokens:
        the calls are the same ones in every process.
        """


class RunningTeacher(TeacherSignal):
    """A teacher in memory, which reads each batch."""

    def __init__(self, teacher: PreTrainedModel):
        self.teacher = teacher

    def divergence(self, batch: Inputs, logits: Tensor, temperature: float) -> Tensor:
        """As the interface says; of the whole vocabulary."""
        with torch.no_grad():
            output = self.teacher(**make_forward_arguments(self.teacher, batch)).logits
            scaled = soften(output, temperature).to(logits.device)
            target = select_predicting_logits(scaled, batch)
        return kl_of_logits(select_predicting_logits(logits, batch), target)

    def watch_ffns(self, batch: Inputs, paths: Sequence[str], see: See) -> None:
        """As the interface says."""
        base = self.teacher.base_model
        ffns = {path: find_stock_ffn(self.teacher, path) for path in paths}
        with watch_ffns(base, ffns, see, idle_experts=True):
            base(**make_forward_arguments(base, batch))


class RecordedTeacher(TeacherSignal):
    """A teacher that does not run: what it predicts is looked up in a record.

    Tokens that were not recorded count as one: the divergence is at most the running teacher's.
    """

    def __init__(self, teacher: PreTrainedModel, record: Record):
        self.teacher = teacher
        self.record = record

    def divergence(self, batch: Inputs, logits: Tensor, temperature: float) -> Tensor:
        """As the interface says; the temperature is the record's.

        Raises:
            InputError: the record is damaged, or lacks a sequence of the ``batch``.
        """
        if not isinstance(batch, Tensor):
            raise TypeError("a record is of next tokens: it is looked up by token ids alone")
        top, target = self.record.look_up(batch, logits.shape[-1])
        predicted = top_and_rest_log_probs(to_at_least_float32(logits), top.to(logits.device))
        return kl(predicted, target.to(logits.device))

    def watch_ffns(self, batch: Inputs, paths: Sequence[str], see: See) -> None:
        """A record does not hold what FFNs read and write; recipes refuse to ask for it."""
        raise NotImplementedError("a record holds predictions, not what FFNs read and write")


def make_signals(recipe: Recipe, teacher: PreTrainedModel) -> Mapping[str | None, TeacherSignal]:
    """A signal for every ``stored_logits`` of the stages of ``recipe``, and the running one (None).

    Raises:
        InputError: a record is none, is damaged or is not of what the recipe says.
    """
    signals: dict[str | None, TeacherSignal] = {None: RunningTeacher(teacher)}
    for folder, record in load_records(recipe, teacher).items():
        signals[folder] = RecordedTeacher(teacher, record)
    return signals
