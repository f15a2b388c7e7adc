"""What is summed up about one converted FFN while a text is read batch by batch."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..checkpoint_code.record import Readout
from ..checkpoint_code.tied import AnyKernelFFN
from ..conversion.figures import SPIKE
from ..families.lookup import StockFFN
from ..families.weights import FFNWeights, read_teacher_readout
from .fidelity import compute_in_memory
from .readability import Readability, readability
from .spike_units import SpikeUnits

COEFFICIENT_BYTES = 2**28
"""Bytes that all float64 matrices of (tokens, prototypes) may take together."""
MATRICES = 12
"""How many of them there are at once while readability is computed."""
SPIKE_POSITIONS = 8
"""How many positions of spikes are reported, those with the most spikes first."""


class OutputErrors:
    """Squared errors of estimated FFN outputs, and the variance of the true ones.

    Spikes are kept apart, since one of them has more variance than all other tokens. Which tokens
    are spikes is known when all of them have been read; the outputs there are then needed again:
    first :meth:`add` for every batch, then :meth:`add_spikes` for every batch in the same order.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._squared_errors: list[Tensor] = []
        self._squared_norms: list[Tensor] = []
        self._total: Tensor | None = None
        self._spike_mask: Tensor | None = None
        self._spike_total: Tensor | None = None
        self._tokens_read_again = 0

    def add(self, estimate: Tensor, truth: Tensor) -> None:
        """Count in the tokens of one batch, (tokens, hidden_size) each."""
        estimate = estimate.double()
        truth = truth.double()
        self.tokens += len(truth)
        self._squared_errors.append((estimate - truth).square().sum(-1).cpu())
        self._squared_norms.append(truth.square().sum(-1).cpu())
        self._total = truth.sum(0) if self._total is None else self._total + truth.sum(0)

    def select_spikes(self, tokens: int) -> Tensor:
        """(spikes,) int64: which of the next ``tokens`` are spikes, when all are read again."""
        first = self._tokens_read_again
        self._tokens_read_again += tokens
        return self._find_spikes()[first : first + tokens].nonzero()[:, 0]

    def add_spikes(self, truth: Tensor) -> None:
        """Count in the true outputs (spikes, hidden_size) at tokens that are spikes."""
        total = truth.double().sum(0)
        self._spike_total = total if self._spike_total is None else self._spike_total + total

    def mean_output(self) -> Tensor:
        """(hidden_size,) float64: the mean of the true outputs over all tokens."""
        assert self._total is not None
        return self._total / self.tokens

    def fvu(self) -> float | None:
        """Return the fraction of the true outputs' variance over ordinary tokens, all but spikes,
        that the estimates leave unexplained; None if they have none, as a single token."""
        ordinary = ~self._find_spikes()
        error = torch.cat(self._squared_errors)[ordinary].sum()
        square = torch.cat(self._squared_norms)[ordinary].sum()
        variance = square - self._mean_ordinary().square().sum().cpu() * ordinary.sum()
        return (error / variance).item() if ordinary.sum() > 1 and variance > 0 else None

    def fvu_spikes(self) -> float | None:
        """Return the same over spikes alone, None if there is none.

        Their squared distance to the mean ordinary output is what has to be explained: they may
        all be alike, and then have no variance about a mean of their own.
        """
        spikes = self._find_spikes()
        if self._spike_total is None or not spikes.any():
            return None
        mean = self._mean_ordinary()
        error = torch.cat(self._squared_errors)[spikes].sum()
        square = torch.cat(self._squared_norms)[spikes].sum()
        shift = 2 * mean @ self._spike_total - spikes.sum() * mean.square().sum()
        return (error / (square - shift.cpu())).item()

    def spike_tokens(self) -> int:
        """Return how many tokens are spikes."""
        return int(self._find_spikes().sum())

    def spike_positions(self, length: int) -> list[list[int]]:
        """Return pairs of a position and how many spikes are there, the most first, of tokens that
        were read in whole rows of ``length``."""
        positions = self._find_spikes().nonzero()[:, 0] % length
        counts = positions.bincount().tolist()
        pairs = [[position, count] for position, count in enumerate(counts) if count]
        return sorted(pairs, key=lambda pair: -pair[1])[:SPIKE_POSITIONS]

    def _find_spikes(self) -> Tensor:
        """(tokens,) bool, once all tokens have been read."""
        if self._spike_mask is None or len(self._spike_mask) != self.tokens:
            squared_norms = torch.cat(self._squared_norms)
            self._spike_mask = squared_norms > SPIKE**2 * squared_norms.median()
        return self._spike_mask

    def _mean_ordinary(self) -> Tensor:
        """(hidden_size,) float64: the mean of the true outputs over ordinary tokens."""
        assert self._total is not None
        spikes = 0.0 if self._spike_total is None else self._spike_total
        return (self._total - spikes) / (self.tokens - self.spike_tokens())


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
    every batch, then :meth:`add_readability` and :meth:`add_student_spikes`, which need what the
    first reading has found, for the same batches.
    """

    def __init__(self, path: str, student: AnyKernelFFN, teacher: StockFFN, weights: FFNWeights):
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
        self._spike_units = {"student": SpikeUnits(), "teacher": SpikeUnits()}
        self._figures: dict[str, dict[str, list[Tensor]]] = {
            "student": defaultdict(list),
            "teacher": defaultdict(list),
        }

    def add_teacher_inputs(self, inputs: Tensor, outputs: Tensor) -> None:
        """Count in what the teacher's FFN read and wrote, (tokens, hidden_size) each."""
        self.errors.add(self.student(inputs), outputs)
        for tokens in self._split(inputs):
            for name, record in self._records(tokens).items():
                self._coefficients[name].add(record)

    def add_student_inputs(self, inputs: Tensor, outputs: Tensor) -> None:
        """Count in what the student's FFN read and wrote, (tokens, hidden_size) each."""
        self.errors_at_student_inputs.add(outputs, self.teacher(inputs))
        for tokens in self._split(inputs):
            coefficients = self.student.readout(tokens).coefficients
            self._active_at_student_inputs += int((coefficients != 0).sum())

    def add_readability(self, inputs: Tensor, outputs: Tensor) -> None:
        """Count in spikes, and the figures of both records, at what the teacher's FFN read and
        wrote, again."""
        spikes = self.errors.select_spikes(len(inputs))
        self.errors.add_spikes(outputs[spikes])
        if len(spikes):
            for name, record in self._records(inputs[spikes]).items():
                self._spike_units[name].add(record)
        for tokens in self._split(inputs):
            for name, record in self._records(tokens).items():
                mean_write = self._coefficients[name].mean_write(record.dictionary)
                for figure, values in readability(record, mean_write).items():
                    self._figures[name][figure].append(values.cpu())

    def add_student_spikes(self, inputs: Tensor) -> None:
        """Count in spikes at what the student's FFN read, again."""
        spikes = self.errors_at_student_inputs.select_spikes(len(inputs))
        self.errors_at_student_inputs.add_spikes(self.teacher(inputs[spikes]))

    def is_empty(self) -> bool:
        """Whether no token of the text has come to the FFN of the teacher, or of the student."""
        return not (self.errors.tokens and self.errors_at_student_inputs.tokens)

    def summarise(self, length: int) -> dict:
        """Return the FFN's entry in the report on rows of ``length`` tokens."""
        own_tokens = self.errors_at_student_inputs.tokens
        return {
            "path": self.path,
            **self._summarise_errors(self.errors, length, ""),
            **self._summarise_errors(self.errors_at_student_inputs, length, "_student_inputs"),
            **self._mean_readability("student"),
            "active_prototypes_student_inputs": self._active_at_student_inputs / own_tokens,
            "dead_prototypes": self._coefficients["student"].dead_prototypes(),
            "spike_units": self._list_spike_units("student"),
            "teacher": {
                "fvu": 0.0,
                "fvu_student_inputs": 0.0,
                **self._mean_readability("teacher"),
                "dead_prototypes": self._coefficients["teacher"].dead_prototypes(),
                "spike_units": self._list_spike_units("teacher"),
            },
        }

    def _summarise_errors(self, errors: OutputErrors, length: int, suffix: str) -> dict:
        whole_rows = self.teacher.expert is None
        return {
            f"fvu{suffix}": errors.fvu(),
            f"fvu_spikes{suffix}": errors.fvu_spikes(),
            f"spike_tokens{suffix}": errors.spike_tokens(),
            f"spike_positions{suffix}": errors.spike_positions(length) if whole_rows else None,
        }

    def _list_spike_units(self, name: str) -> list[list[str | float]]:
        """Pairs of a unit and its share, as JSON has them."""
        return [[unit, round(share, 4)] for unit, share in self._spike_units[name].list_largest()]

    def _split(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The ``inputs`` in parts whose coefficients take no more than COEFFICIENT_BYTES."""
        width = max(self.student.config.prototypes, len(self.weights.up))
        return inputs.split(max(1, COEFFICIENT_BYTES // (8 * MATRICES * width)))

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
        return compute_in_memory(Readability, **columns, teacher_write_mass=teacher_mass)
