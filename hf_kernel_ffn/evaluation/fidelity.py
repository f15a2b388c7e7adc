"""How near a student's predictions are to its teacher's."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor

from ..text.inputs import Inputs, make_forward_arguments


class Fidelity(evaluate.Metric):
    """How close a student's predictions are to its teacher's. One entry per predicted token."""

    def _info(self):
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="Negative log-likelihoods (nats), KL(teacher ‖ student) (nats), and whether the most likely tokens agree.",
            features=datasets.Features(
                teacher_nll=number,
                student_nll=number,
                ablated_nll=number,
                kl=number,
                agrees=datasets.Value("bool"),
            ),
        )

    def _compute(self, teacher_nll, student_nll, ablated_nll, kl, agrees):
        teacher, student, ablated = (_mean(x) for x in (teacher_nll, student_nll, ablated_nll))
        return {
            "tokens": len(kl),
            "teacher": {"cross_entropy": teacher},
            "student": {"cross_entropy": student},
            "ablated": {"cross_entropy": ablated},
            "delta_cross_entropy": student - teacher,
            "kl": _mean(kl),
            "top1_agreement": _mean(agrees),
            "loss_recovered": 1 - (student - teacher) / (ablated - teacher),
        }


def _logits(model: Any, ids: Inputs) -> Tensor:
    return model(**make_forward_arguments(model, ids)).logits.float()


def _pooled(model: Any, ids: Tensor) -> Tensor:
    base = model.base_model
    return base(**make_forward_arguments(base, ids)).last_hidden_state.double().mean(1).cpu()


def _predictions(
    teacher_logits: Tensor, student_logits: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    teacher, student = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return {
        "teacher_nll": _pick(teacher, targets),
        "student_nll": _pick(student, targets),
        "kl": (teacher.exp() * (teacher - student)).sum(-1).flatten(),
        "agrees": (teacher.argmax(-1) == student.argmax(-1)).flatten(),
    }


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return _pick(logits.log_softmax(-1), targets)


def _pick(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, targets[..., None]).flatten()


def _mean(values) -> float:
    return float(torch.as_tensor(values, dtype=torch.float64).mean())
