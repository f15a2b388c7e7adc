"""What is summed up about one converted FFN while a text is read batch by batch."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.record import Readout
from ..families.lookup import StockFFN
from ..families.weights import FFNWeights, read_teacher_readout
from .readability import Readability, readability


class OutputErrors:
    """Squared errors of estimated FFN outputs, and the variance of the true ones."""

    def __init__(self) -> None:
        self.tokens = 0
        self.squared_error = torch.zeros((), dtype=torch.float64)
        self.squared_norm = torch.zeros((), dtype=torch.float64)
        self.total: Tensor | None = None

    def add(self, estimate: Tensor, truth: Tensor) -> None:
        """Count in the tokens of one batch, (tokens, hidden_size) each."""
        estimate = estimate.double()
        truth = truth.double()
        self.tokens += len(truth)
        self.squared_error = self.squared_error + (estimate - truth).square().sum()
        self.squared_norm = self.squared_norm + truth.square().sum()
        self.total = truth.sum(0) if self.total is None else self.total + truth.sum(0)

    def mean_output(self) -> Tensor:
        """(hidden_size,) float64: the mean of the true outputs."""
        assert self.total is not None
        return self.total / self.tokens

    def fvu(self) -> float:
        """Return the fraction of the true outputs' variance that is left unexplained."""
        assert self.total is not None
        variance = self.squared_norm - self.total.square().sum() / self.tokens
        return (self.squared_error / variance).item()


class CoefficientSums:
    """Sums of a record's coefficients over the tokens of a text."""

    def __init__(self) -> None:
        self.tokens = 0
        self.total: Tensor | None = None
        self.firing: Tensor | None = None

    def add(self, record: Readout) -> None:
        """Count in a ``record`` with coefficients (tokens, prototypes)."""
        total = record.coefficients.double().sum(0)
        firing = (record.coefficients != 0).sum(0)
        self.tokens += len(record.coefficients)
        self.total = total if self.total is None else self.total + total
        self.firing = firing if self.firing is None else self.firing + firing

    def mean_write(self, dictionary: Tensor) -> Tensor:
        """(hidden_size,) float64: the mean over tokens of what the dictionary's rows write."""
        assert self.total is not None
        return self.total / self.tokens @ dictionary.double()

    def dead_prototypes(self) -> int:
        """Return how many prototypes have fired on no token."""
        assert self.firing is not None
        return int((self.firing == 0).sum())


class FFNAccumulator:
    """One converted FFN beside the stock FFN that it replaces, and what is summed up about them.

    The text is read twice: first :meth:`add_teacher_inputs` and :meth:`add_student_inputs` for
    every batch, then :meth:`add_readability`, which needs the mean write of the first reading.
    """

    def __init__(self, path: str, student: KernelFFN, teacher: StockFFN, weights: FFNWeights):
        self.path = path
        self.student = student
        self.teacher = teacher
        self.weights = weights
        self.errors = OutputErrors()
        """Of the student's FFN on what the teacher's FFN reads."""
        self.errors_at_student_inputs = OutputErrors()
        """The same on what the student's FFN reads when the whole student runs."""
        self._active_at_student_inputs = 0
        self._coefficients = {"student": CoefficientSums(), "teacher": CoefficientSums()}
        self._figures: dict[str, dict[str, list[Tensor]]] = {
            "student": defaultdict(list),
            "teacher": defaultdict(list),
        }

    def add_teacher_inputs(self, inputs: Tensor, outputs: Tensor) -> None:
        """Count in what the teacher's FFN read and wrote, (tokens, hidden_size) each."""
        self.errors.add(self.student(inputs), outputs)
        for name, record in self._records(inputs).items():
            self._coefficients[name].add(record)

    def add_student_inputs(self, inputs: Tensor, outputs: Tensor) -> None:
        """Count in what the student's FFN read and wrote, (tokens, hidden_size) each."""
        self.errors_at_student_inputs.add(outputs, self.teacher(inputs))
        coefficients = self.student.readout(inputs).coefficients
        self._active_at_student_inputs += int((coefficients != 0).sum())

    def add_readability(self, inputs: Tensor) -> None:
        """Count in the figures of both records at what the teacher's FFN read, again."""
        for name, record in self._records(inputs).items():
            mean_write = self._coefficients[name].mean_write(record.dictionary)
            for figure, values in readability(record, mean_write).items():
                self._figures[name][figure].append(values.cpu())

    def is_empty(self) -> bool:
        """Whether no token of the text has come to the FFN of the teacher, or of the student."""
        return not (self.errors.tokens and self.errors_at_student_inputs.tokens)

    def summarise(self) -> dict:
        """Return the FFN's entry in the report."""
        own_tokens = self.errors_at_student_inputs.tokens
        return {
            "path": self.path,
            "fvu": self.errors.fvu(),
            "fvu_student_inputs": self.errors_at_student_inputs.fvu(),
            **self._mean_readability("student"),
            "active_prototypes_student_inputs": self._active_at_student_inputs / own_tokens,
            "dead_prototypes": self._coefficients["student"].dead_prototypes(),
            "teacher": {
                "fvu": 0.0,
                "fvu_student_inputs": 0.0,
                **self._mean_readability("teacher"),
                "dead_prototypes": self._coefficients["teacher"].dead_prototypes(),
            },
        }

    def _records(self, inputs: Tensor) -> dict[str, Readout]:
        return {
            "student": self.student.readout(inputs),
            "teacher": read_teacher_readout(self.weights, inputs),
        }

    def _mean_readability(self, name: str) -> dict[str, float]:
        columns = {
            figure: torch.cat(values).tolist() for figure, values in self._figures[name].items()
        }
        teacher_mass = torch.cat(self._figures["teacher"]["write_mass"]).tolist()
        metric = Readability(keep_in_memory=True)
        return metric.compute(**columns, teacher_write_mass=teacher_mass)
