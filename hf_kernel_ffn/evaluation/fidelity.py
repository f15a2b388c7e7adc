"""How near a student's predictions are to its teacher's."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import cast

import datasets
import evaluate
import torch
from torch import Tensor


class Fidelity(evaluate.Metric):
    """How close a student's predictions are to its teacher's. One entry per predicted token."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description=(
                "Negative log-likelihoods (nats), KL(teacher ‖ student) (nats), and whether the "
                "most likely tokens agree."
            ),
            features=datasets.Features(
                teacher_nll=number,
                student_nll=number,
                ablated_nll=number,
                kl=number,
                agrees=datasets.Value("bool"),
            ),
        )

    def _compute(
        self,
        *,
        teacher_nll: Sequence[float],
        student_nll: Sequence[float],
        ablated_nll: Sequence[float],
        kl: Sequence[float],
        agrees: Sequence[bool],
    ) -> dict:
        """Return the means, and ``loss_recovered``: how much of what the teacher loses when every
        converted FFN writes its mean output the student has back."""
        teacher = mean(teacher_nll)
        student = mean(student_nll)
        ablated = mean(ablated_nll)
        return {
            "tokens": len(kl),
            "teacher": {"cross_entropy": teacher},
            "student": {"cross_entropy": student},
            "ablated": {"cross_entropy": ablated},
            "delta_cross_entropy": student - teacher,
            "kl": mean(kl),
            "top1_agreement": mean(agrees),
            "loss_recovered": 1 - (student - teacher) / (ablated - teacher),
        }


def compute_in_memory(metric_class: type[evaluate.Metric], **columns: Sequence[object]) -> dict:
    """Return what a metric computes of ``columns``, one entry each per example.

    The library makes a folder for every metric, by itself in a cache that one may not be allowed
    to write; here it is a temporary one.
    """
    with tempfile.TemporaryDirectory() as folder:
        metric = metric_class(keep_in_memory=True, cache_dir=folder)
        return cast(dict, metric.compute(**columns))


def compare_predictions(teacher: Tensor, student: Tensor, answers: Tensor) -> dict[str, Tensor]:
    """Compare two models' log-probabilities (tokens, vocabulary) of the same tokens.

    Args:
        answers: (tokens,) the ids of the tokens that are there.

    Returns:
        (tokens,) each: ``teacher_nll`` and ``student_nll`` of the answers, ``kl`` of the student
        from the teacher, all in nats, and whether the likeliest token ``agrees``.
    """
    return {
        "teacher_nll": negative_at(answers, teacher),
        "student_nll": negative_at(answers, student),
        "kl": teacher.exp().mul_(teacher - student).sum(-1),
        "agrees": teacher.argmax(-1) == student.argmax(-1),
    }


def negative_at(answers: Tensor, log_probabilities: Tensor) -> Tensor:
    """(tokens,) nats: minus the ``log_probabilities`` (tokens, vocabulary) of the ``answers``."""
    return -log_probabilities.gather(-1, answers[:, None])[:, 0]


def mean(values: Tensor | Sequence[float]) -> float:
    """The mean in float64."""
    return float(torch.as_tensor(values, dtype=torch.float64).mean())
