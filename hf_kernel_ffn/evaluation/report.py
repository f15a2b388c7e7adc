"""Fidelity and readability of a converted model, as `evaluate` metrics and as one report.

The definitions are built so that a reparametrisation which leaves the function alone cannot improve them: contributions
are taken after the layer's mean write has been removed from them in proportion to their share. Fidelity figures
are in nats or shares per predicted token, readability figures are means over tokens.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from ..families.hooks import (
    capture_ffn_inputs_and_outputs,
    capture_inputs_and_outputs,
    replace_ffn_outputs,
)
from ..families.lookup import find_stock_ffn
from ..families.student import check_pair
from ..families.weights import read_stock_weights
from ..text.inputs import make_forward_arguments, select_rows
from ..text.prediction import logits_with_answers, make_inputs_for_prediction, predicts_masked
from .fidelity import Fidelity, _logits, _mean, _nll, _pooled, _predictions
from .readability import _readable, _records, readability


@torch.no_grad()
def evaluate_student(
    student: Any,
    teacher: Any,
    ids: Tensor,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_tokens: int = 2048,
    progress: bool = False,
) -> dict:
    """The report on ``student`` against ``teacher`` over ``ids`` (rows, length), token ids of text trained on by neither.

    Masked language models, which need a ``tokenizer`` with a mask token, read the text with masks (of seed 0, the same for
    both), and are compared at the masked tokens.

    Keys: those of :class:`Fidelity`; of masked language models ``pooled_cosine``, the mean over rows, without masks, of the
    cosine between the teacher's and the student's mean over the row of the last hidden states, ``pooled_cosine_centred``, the same less
    the teacher's mean over all rows, and under ``teacher`` ``pooled_cosine_of_neighbours``, what it comes to between a row and the one
    before; and ``layers``, one entry per converted FFN: ``path``, ``fvu`` (on the teacher's inputs), ``fvu_student_inputs``, the means of
    :func:`readability` (on the teacher's inputs), ``write_mass_ratio``,
    ``active_prototypes_student_inputs`` (what a token reads when the student runs),
    ``dead_prototypes`` (how many fire on no token of ``ids``), and under ``teacher`` the same for the teacher's own FFN.

    Raises:
        InputError: ``student`` is not converted, the two have different vocabularies or layers, or a mask token is missing.
    """
    check_pair(student, teacher)
    student.eval(), teacher.eval()
    kernels = student.kernel_ffns()
    stock = {path: find_stock_ffn(teacher, path) for path in kernels}
    weights = {path: read_stock_weights(teacher, ffn) for path, ffn in stock.items()}
    asked, size = (
        make_inputs_for_prediction(teacher, tokenizer, ids),
        max(1, batch_tokens // ids.shape[1]),
    )
    batches = [select_rows(asked, slice(first, first + size)) for first in range(0, len(ids), size)]
    sums: dict[str, dict[str, Tensor]] = {
        path: defaultdict(lambda: torch.zeros((), dtype=torch.float64)) for path in kernels
    }

    fidelity: dict[str, list[Tensor]] = defaultdict(list)
    for batch in _progress(batches, "fidelity", progress):
        with capture_ffn_inputs_and_outputs(teacher.base_model, stock) as seen:
            teacher_logits, answers = logits_with_answers(_logits(teacher, batch), batch)
        with capture_inputs_and_outputs(kernels) as seen_by_student:
            student_logits, _ = logits_with_answers(_logits(student, batch), batch)
        for name, values in _predictions(teacher_logits, student_logits, answers).items():
            fidelity[name].append(values.cpu())
        for path, ffn in kernels.items():
            if path in seen:  # a mixture's expert may have been given nothing
                _add_errors(sums[path], "", ffn(seen[path][0]), seen[path][1])
            if path in seen_by_student:
                x, y = seen_by_student[path]
                _add_errors(sums[path], "student_inputs_", y, stock[path](x))
                sums[path]["active"] = (
                    sums[path]["active"] + (ffn.readout(x).coefficients != 0).sum()
                )
            for who, record in (
                _records(ffn, weights[path], seen[path][0]).items() if path in seen else ()
            ):
                sums[path][f"{who} c"] = sums[path][f"{who} c"] + record.coefficients.double().sum(
                    0
                )
                sums[path][f"{who} fires"] = sums[path][f"{who} fires"] + (
                    record.coefficients != 0
                ).sum(0)
    empty = [
        path
        for path in kernels
        if not sums[path]["count"] or not sums[path]["student_inputs_count"]
    ]
    if empty:
        raise InputError(
            f"found no token of the text that comes to {empty[0]}, expected some: give more text"
        )
    mean_output = {path: sums[path]["y"] / sums[path]["count"] for path in kernels}

    figures: dict[tuple[str, str], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for batch in _progress(batches, "readability", progress):
        with capture_ffn_inputs_and_outputs(teacher.base_model, stock) as seen:
            teacher.base_model(**make_forward_arguments(teacher.base_model, batch))
        with replace_ffn_outputs(teacher.base_model, stock, mean_output):
            fidelity["ablated_nll"].append(
                _nll(*logits_with_answers(_logits(teacher, batch), batch)).cpu()
            )
        for path, ffn in kernels.items():
            for who, record in (
                _records(ffn, weights[path], seen[path][0]).items() if path in seen else ()
            ):
                mean_write = (
                    sums[path][f"{who} c"] / sums[path]["count"] @ record.dictionary.double()
                )
                for name, values in readability(record, mean_write).items():
                    figures[path, who][name].append(values.cpu())

    metric = Fidelity(keep_in_memory=True)
    report = metric.compute(**{name: torch.cat(parts).tolist() for name, parts in fidelity.items()})
    if predicts_masked(teacher):
        means = [
            torch.cat([_pooled(model, rows) for rows in ids.split(size)])
            for model in (teacher, student)
        ]
        report["pooled_cosine"] = _mean(nn.functional.cosine_similarity(means[0], means[1]))
        centre = means[0].mean(0)
        report["pooled_cosine_centred"] = _mean(
            nn.functional.cosine_similarity(means[0] - centre, means[1] - centre)
        )
        report["teacher"]["pooled_cosine_of_neighbours"] = _mean(
            nn.functional.cosine_similarity(means[0], means[0].roll(1, 0))
        )
    report["layers"] = []
    for path in kernels:
        entry: dict = {
            "path": path,
            "fvu": _fvu(sums[path], ""),
            "fvu_student_inputs": _fvu(sums[path], "student_inputs_"),
        }
        entry.update(_readable(figures[path, "student"], figures[path, "teacher"]))
        entry["active_prototypes_student_inputs"] = (
            sums[path]["active"] / sums[path]["student_inputs_count"]
        ).item()
        entry["dead_prototypes"] = int((sums[path]["student fires"] == 0).sum())
        entry["teacher"] = {
            "fvu": 0.0,
            "fvu_student_inputs": 0.0,
            **_readable(figures[path, "teacher"], figures[path, "teacher"]),
            "dead_prototypes": int((sums[path]["teacher fires"] == 0).sum()),
        }
        report["layers"].append(entry)
    return report


def _add_errors(sums: dict[str, Tensor], prefix: str, estimate: Tensor, truth: Tensor) -> None:
    estimate, truth = estimate.double().flatten(0, -2), truth.double().flatten(0, -2)
    sums[f"{prefix}error"] = sums[f"{prefix}error"] + (estimate - truth).square().sum()
    sums[f"{prefix}square"] = sums[f"{prefix}square"] + truth.square().sum()
    sums[f"{prefix}y"] = sums[f"{prefix}y"] + truth.sum(0)
    sums[f"{prefix}count"] = sums[f"{prefix}count"] + len(truth)


def _fvu(sums: dict[str, Tensor], prefix: str) -> float:
    count = sums[f"{prefix}count"]
    variance = sums[f"{prefix}square"] - sums[f"{prefix}y"].square().sum() / count
    return (sums[f"{prefix}error"] / variance).item()


def _progress(items, label, show):
    if not show:
        return items
    from rich.progress import track

    return track(items, description=label)
