"""Fidelity and readability of a converted model, as `evaluate` metrics and as one report.

The definitions are built so that a reparametrisation which leaves the function alone cannot improve them: contributions
are taken after the layer's mean write has been removed from them in proportion to their share. Fidelity figures
are in nats or shares per predicted token, readability figures are means over tokens.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .checkpoint_code.errors import InputError
from .checkpoint_code.ffn import KernelFFN
from .checkpoint_code.record import Readout
from .families.hooks import collected, recorded, replaced
from .families.lookup import stock_ffn
from .families.student import check_pair
from .families.weights import FFNWeights, stock_weights, teacher_readout
from .text.inputs import Inputs, arguments, take
from .text.prediction import answered, predicts_masked, question


class Fidelity(evaluate.Metric):
    """How close a student's predictions are to its teacher's. One entry per predicted token."""

    def _info(self):
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="Negative log-likelihoods (nats), KL(teacher ‖ student) (nats), and whether the most likely tokens agree.",
            features=datasets.Features(
                teacher_nll=number, student_nll=number, ablated_nll=number, kl=number, agrees=datasets.Value("bool")
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


class Readability(evaluate.Metric):
    """How readable one FFN's write is. One entry per token, from :func:`readability`."""

    FIGURES = ("active_prototypes", "effective_prototypes", "coherence", "orthogonal_coherence", "opposed_share", "write_mass")

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="The figures that readability() returns, and the teacher's own write mass at the same input.",
            features=datasets.Features({name: datasets.Value("float64") for name in (*self.FIGURES, "teacher_write_mass")}),
        )

    def _compute(self, teacher_write_mass, write_mass, **figures):
        means = {name: _mean(values) for name, values in figures.items()}
        return {**means, "write_mass_ratio": _mean(write_mass) / _mean(teacher_write_mass)}


def readability(readout: Readout, mean_write: Tensor) -> dict[str, Tensor]:
    """Per token, (tokens,) float64 each, from a record with coefficients (tokens, prototypes):

    * ``active_prototypes``: coefficients that are not exactly zero;
    * ``effective_prototypes``: 1/Σp², p the normalised |c_i|‖v_i‖;
    * ``coherence``: ‖Σ t‖ / Σ‖t‖ of the contributions t_i = c_i v_i − s_i μ, where μ is ``mean_write`` (hidden_size,), the
      mean of Σ c_i v_i over the text, and s the normalised |c|; ``orthogonal_coherence``: 1/√effective, what
      mutually orthogonal contributions would give;
    * ``opposed_share``: share of Σ|t_i·ŷ| that points against ŷ, the direction of Σ t;
    * ``write_mass``: Σ|c_i|‖v_i‖.
    """
    # In float64: for rows that have much in common, what is left after the mean write is a small difference.
    c, v, mean_write = readout.coefficients.double(), readout.dictionary.double(), mean_write.double()
    tiny = torch.finfo(torch.float64).tiny
    size, total = c.abs(), c.abs().sum(-1, keepdim=True)
    share = size / total.clamp_min(tiny)
    mass = size * v.norm(dim=-1)
    p = mass / mass.sum(-1, keepdim=True).clamp_min(tiny)
    effective = 1 / p.square().sum(-1).clamp_min(tiny)
    length2 = c.square() * v.square().sum(-1) - 2 * c * share * (v @ mean_write) + share.square() * mean_write.square().sum()
    written = c @ v - mean_write * (total > 0)
    direction = nn.functional.normalize(written, dim=-1)
    along = c * (direction @ v.T) - share * (direction @ mean_write)[:, None]
    fires = (total[:, 0] > 0).float()
    return {
        "active_prototypes": (c != 0).sum(-1).float(),
        "effective_prototypes": effective * fires,
        "coherence": written.norm(dim=-1) / length2.clamp_min(0).sqrt().sum(-1).clamp_min(tiny),
        "orthogonal_coherence": effective.rsqrt() * fires,
        "opposed_share": (-along).relu().sum(-1) / along.abs().sum(-1).clamp_min(tiny),
        "write_mass": mass.sum(-1),
    }


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
    stock = {path: stock_ffn(teacher, path) for path in kernels}
    weights = {path: stock_weights(teacher, ffn) for path, ffn in stock.items()}
    asked, size = question(teacher, tokenizer, ids), max(1, batch_tokens // ids.shape[1])
    batches = [take(asked, slice(first, first + size)) for first in range(0, len(ids), size)]
    sums: dict[str, dict[str, Tensor]] = {path: defaultdict(lambda: torch.zeros((), dtype=torch.float64)) for path in kernels}

    fidelity: dict[str, list[Tensor]] = defaultdict(list)
    for batch in _progress(batches, "fidelity", progress):
        with collected(teacher.base_model, stock) as seen:
            teacher_logits, answers = answered(_logits(teacher, batch), batch)
        with recorded(kernels) as seen_by_student:
            student_logits, _ = answered(_logits(student, batch), batch)
        for name, values in _predictions(teacher_logits, student_logits, answers).items():
            fidelity[name].append(values.cpu())
        for path, ffn in kernels.items():
            if path in seen:  # a mixture's expert may have been given nothing
                _add_errors(sums[path], "", ffn(seen[path][0]), seen[path][1])
            if path in seen_by_student:
                x, y = seen_by_student[path]
                _add_errors(sums[path], "student_inputs_", y, stock[path](x))
                sums[path]["active"] = sums[path]["active"] + (ffn.readout(x).coefficients != 0).sum()
            for who, record in _records(ffn, weights[path], seen[path][0]).items() if path in seen else ():
                sums[path][f"{who} c"] = sums[path][f"{who} c"] + record.coefficients.double().sum(0)
                sums[path][f"{who} fires"] = sums[path][f"{who} fires"] + (record.coefficients != 0).sum(0)
    empty = [path for path in kernels if not sums[path]["count"] or not sums[path]["student_inputs_count"]]
    if empty:
        raise InputError(f"found no token of the text that comes to {empty[0]}, expected some: give more text")
    mean_output = {path: sums[path]["y"] / sums[path]["count"] for path in kernels}

    figures: dict[tuple[str, str], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for batch in _progress(batches, "readability", progress):
        with collected(teacher.base_model, stock) as seen:
            teacher.base_model(**arguments(teacher.base_model, batch))
        with replaced(teacher.base_model, stock, mean_output):
            fidelity["ablated_nll"].append(_nll(*answered(_logits(teacher, batch), batch)).cpu())
        for path, ffn in kernels.items():
            for who, record in _records(ffn, weights[path], seen[path][0]).items() if path in seen else ():
                mean_write = sums[path][f"{who} c"] / sums[path]["count"] @ record.dictionary.double()
                for name, values in readability(record, mean_write).items():
                    figures[path, who][name].append(values.cpu())

    metric = Fidelity(keep_in_memory=True)
    report = metric.compute(**{name: torch.cat(parts).tolist() for name, parts in fidelity.items()})
    if predicts_masked(teacher):
        means = [torch.cat([_pooled(model, rows) for rows in ids.split(size)]) for model in (teacher, student)]
        report["pooled_cosine"] = _mean(nn.functional.cosine_similarity(means[0], means[1]))
        centre = means[0].mean(0)
        report["pooled_cosine_centred"] = _mean(nn.functional.cosine_similarity(means[0] - centre, means[1] - centre))
        report["teacher"]["pooled_cosine_of_neighbours"] = _mean(nn.functional.cosine_similarity(means[0], means[0].roll(1, 0)))
    report["layers"] = []
    for path in kernels:
        entry: dict = {
            "path": path,
            "fvu": _fvu(sums[path], ""),
            "fvu_student_inputs": _fvu(sums[path], "student_inputs_"),
        }
        entry.update(_readable(figures[path, "student"], figures[path, "teacher"]))
        entry["active_prototypes_student_inputs"] = (sums[path]["active"] / sums[path]["student_inputs_count"]).item()
        entry["dead_prototypes"] = int((sums[path]["student fires"] == 0).sum())
        entry["teacher"] = {
            "fvu": 0.0,
            "fvu_student_inputs": 0.0,
            **_readable(figures[path, "teacher"], figures[path, "teacher"]),
            "dead_prototypes": int((sums[path]["teacher fires"] == 0).sum()),
        }
        report["layers"].append(entry)
    return report


def _logits(model: Any, ids: Inputs) -> Tensor:
    return model(**arguments(model, ids)).logits.float()


def _pooled(model: Any, ids: Tensor) -> Tensor:
    base = model.base_model
    return base(**arguments(base, ids)).last_hidden_state.double().mean(1).cpu()


def _predictions(teacher_logits: Tensor, student_logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
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


def _records(ffn: KernelFFN, weights: FFNWeights, x: Tensor) -> dict[str, Readout]:
    """Student's and teacher's records at the teacher's inputs."""
    x = x.flatten(0, -2)
    return {"student": ffn.readout(x), "teacher": teacher_readout(weights, x)}


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


def _readable(own: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]]) -> dict[str, float]:
    columns = {name: torch.cat(parts).tolist() for name, parts in own.items()}
    return Readability(keep_in_memory=True).compute(**columns, teacher_write_mass=torch.cat(teacher["write_mass"]).tolist())


def _mean(values) -> float:
    return float(torch.as_tensor(values, dtype=torch.float64).mean())


def _progress(items, label, show):
    if not show:
        return items
    from rich.progress import track

    return track(items, description=label)
