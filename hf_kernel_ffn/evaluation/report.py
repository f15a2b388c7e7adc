"""Fidelity and readability of a converted model, as `evaluate` metrics and as one report.

The definitions are built so that a reparametrisation which leaves the function alone cannot improve
them: contributions are taken after the layer's mean write has been removed from them in proportion
to their share. Fidelity figures are in nats or shares per predicted token, readability figures are
means over tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.modeling import KernelModelMixin
from ..families.hooks import (
    capture_all_inputs_and_outputs,
    capture_ffn_inputs_and_outputs,
    replace_ffn_outputs,
)
from ..families.lookup import find_stock_ffn
from ..families.student import check_pair
from ..families.weights import read_stock_weights
from ..progress import track_progress
from ..text.inputs import Inputs, make_forward_arguments, select_rows
from ..text.prediction import make_inputs_for_prediction, predicts_masked
from .accumulators import FFNAccumulator
from .fidelity import Fidelity, compare_predictions, compute_in_memory, mean, negative_at
from .generation import NEW_TOKENS, compare_continuations, select_prompts
from .token_logits import TokenLogits

BATCH_TOKENS = 2048
"""Tokens that the models read at once unless told otherwise."""

Columns = dict[str, list[Tensor]]
"""By name, the figures of every batch, one entry per predicted token."""


@torch.no_grad()
def evaluate_student(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Tensor,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_tokens: int = BATCH_TOKENS,
    prompts: int | Sequence[Tensor] = 0,
    progress: bool = False,
) -> dict:
    """Compare ``student`` with ``teacher`` over a text, and measure how readable its FFNs are.

    Masked language models, which need a ``tokenizer`` with a mask token, read the text with masks
    (of seed 0, the same for both), and are compared at the masked tokens.

    Args:
        ids: (rows, length) token ids of text that neither model was trained on.
        batch_tokens: how many tokens are read at once.
        prompts: how many rows' beginnings both continue; or the prompts, (length,) token ids each.
        progress: whether to show a progress bar.

    Returns:
        The figures of :class:`Fidelity`; of masked language models also those of
        :func:`compare_pooled_states`; with ``prompts`` under ``generation`` those of
        :func:`~hf_kernel_ffn.evaluation.generation.compare_continuations`; and ``layers``, one
        entry per converted FFN:

        * ``path``;
        * ``fvu``: the fraction of variance unexplained on the teacher's inputs, over ordinary
          tokens. Up to version 0.1 it was over all tokens, and where an FFN has spikes said
          nothing of any other token;
        * ``fvu_spikes``: the same over spikes alone, tokens whose output is more than
          :data:`~hf_kernel_ffn.conversion.figures.SPIKE` times as long as the median;
          None if there is none;
        * ``spike_tokens``: how many there are, and ``spike_positions``: at which positions of their
          rows, as pairs of a position and a count, the most first, at most eight; None for a
          mixture's expert, to which rows do not come whole;
        * the same four with ``_student_inputs``: on what the FFN reads when the student runs;
        * the means of :func:`~hf_kernel_ffn.evaluation.readability.readability` and
          ``write_mass_ratio``, on the teacher's inputs;
        * ``active_prototypes_student_inputs``: how many a token reads when the student runs;
        * ``dead_prototypes``: how many fire on no token of ``ids``;
        * ``spike_units``: the units that write most of the FFN's own output at spikes, as pairs of
          a unit and its share, at most
          :data:`~hf_kernel_ffn.evaluation.spike_units.SPIKE_UNITS`; empty without spikes;
        * ``teacher``: the same of the teacher's own FFN, but for the errors at spikes.

        An FFN that several layers share is measured at the tokens of all of them. Every figure of a
        mixture's expert is None if no token of the text comes to it in one of the models.

    Raises:
        InputError: ``student`` is not converted, the two have different vocabularies or layers, a
            mask token is missing, the teacher predicts no tokens, or cannot continue ``prompts``.
    """
    check_pair(student, teacher)
    student.eval()
    teacher.eval()
    texts = _choose_prompts(teacher, ids, prompts)
    rows = max(1, batch_tokens // ids.shape[1])
    inputs = make_inputs_for_prediction(teacher, tokenizer, ids)
    batches = [select_rows(inputs, slice(i, i + rows)) for i in range(0, len(ids), rows)]
    accumulators = _make_accumulators(student, teacher)
    of_teacher = TokenLogits(teacher, batches[0])
    of_student = TokenLogits(student, batches[0])

    columns = _read_both_models(
        of_student, of_teacher, track_progress(batches, "fidelity", progress), accumulators
    )
    used = _leave_out_idle_experts(accumulators)
    columns["ablated_nll"] = _read_readability(
        of_teacher, track_progress(batches, "readability", progress), used
    )
    if any(one.errors_at_student_inputs.spike_tokens() for one in used.values()):
        _read_student_spikes(student, track_progress(batches, "spikes", progress), used)

    figures = {name: torch.cat(parts).tolist() for name, parts in columns.items()}
    report = compute_in_memory(Fidelity, **figures)
    if predicts_masked(teacher):
        cosines = compare_pooled_states(student, teacher, ids.split(rows))
        report["teacher"]["pooled_cosine_of_neighbours"] = cosines.pop("of_neighbours")
        report.update(cosines)
    if texts:
        size = max(1, batch_tokens // (max(map(len, texts)) + NEW_TOKENS))
        report["generation"] = compare_continuations(student, teacher, texts, size)
    length = ids.shape[1]
    layers = {path: accumulator.summarise(length) for path, accumulator in used.items()}
    blank = _make_blank(next(iter(layers.values())))
    report["layers"] = [layers.get(path, {**blank, "path": path}) for path in accumulators]
    return report


def compare_pooled_states(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]
) -> dict[str, float]:
    """Compare the mean over each row of the last hidden states, without masks, by cosines.

    Args:
        batches: (rows, length) token ids each.

    Returns:
        Means over rows: ``pooled_cosine`` of student and teacher; ``pooled_cosine_centred``, the
        same less the teacher's mean over all rows; and ``of_neighbours``, what it comes to between
        a row of the teacher and the one before.
    """
    of_teacher = torch.cat([_pool(teacher, rows) for rows in batches])
    of_student = torch.cat([_pool(student, rows) for rows in batches])
    centre = of_teacher.mean(0)

    cosine = nn.functional.cosine_similarity
    return {
        "pooled_cosine": mean(cosine(of_teacher, of_student)),
        "pooled_cosine_centred": mean(cosine(of_teacher - centre, of_student - centre)),
        "of_neighbours": mean(cosine(of_teacher, of_teacher.roll(1, 0))),
    }


def _choose_prompts(
    teacher: PreTrainedModel, ids: Tensor, prompts: int | Sequence[Tensor]
) -> list[Tensor]:
    """The prompts that are to be continued: those given, or the beginnings of so many rows."""
    if not isinstance(prompts, int):
        return list(prompts)
    return list(select_prompts(teacher, ids, prompts)) if prompts else []


def _make_accumulators(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> dict[str, FFNAccumulator]:
    """One per converted FFN, by its path."""
    accumulators = {}
    for path, ffn in cast(KernelModelMixin, student).kernel_ffns().items():
        stock = find_stock_ffn(teacher, path)
        weights = read_stock_weights(teacher, stock)
        accumulators[path] = FFNAccumulator(path, ffn, stock, weights)
    return accumulators


def _read_both_models(
    student: TokenLogits,
    teacher: TokenLogits,
    batches: Iterable[Inputs],
    accumulators: Mapping[str, FFNAccumulator],
) -> Columns:
    """Run both models: the figures of :func:`compare_predictions`, and errors and coefficients
    into the ``accumulators``. A mixture's expert may be given nothing, and then has no entry."""
    columns: Columns = defaultdict(list)
    stock = {path: accumulator.teacher for path, accumulator in accumulators.items()}
    kernels = {path: accumulator.student for path, accumulator in accumulators.items()}

    for batch in batches:
        with capture_ffn_inputs_and_outputs(teacher.model.base_model, stock) as of_teacher:
            right = teacher.predict(batch)
        with capture_all_inputs_and_outputs(kernels) as of_student:
            guess = student.predict(batch)

        for tokens in teacher.split(right):
            figures = compare_predictions(
                right.log_probabilities(tokens),
                guess.log_probabilities(tokens),
                right.answers[tokens],
            )
            for name, values in figures.items():
                columns[name].append(values.cpu())
        for path, (inputs, outputs) in of_teacher.items():
            accumulators[path].add_teacher_inputs(inputs, outputs)
        for path, (inputs, outputs) in of_student.items():
            accumulators[path].add_student_inputs(inputs, outputs)
    return columns


def _read_readability(
    teacher: TokenLogits,
    batches: Iterable[Inputs],
    accumulators: Mapping[str, FFNAccumulator],
) -> list[Tensor]:
    """Run the teacher as it is, readability into the ``accumulators``, and with every converted FFN
    replaced by its mean output: the negative log-likelihoods of that."""
    ablated_nll = []
    base = teacher.model.base_model
    stock = {path: accumulator.teacher for path, accumulator in accumulators.items()}
    means = {path: accumulator.errors.mean_output() for path, accumulator in accumulators.items()}

    for batch in batches:
        with capture_ffn_inputs_and_outputs(base, stock) as seen:
            base(**make_forward_arguments(base, batch))
        with replace_ffn_outputs(base, stock, means):
            ablated = teacher.predict(batch)

        for tokens in teacher.split(ablated):
            nll = negative_at(ablated.answers[tokens], ablated.log_probabilities(tokens))
            ablated_nll.append(nll.cpu())
        for path, (inputs, outputs) in seen.items():
            accumulators[path].add_readability(inputs, outputs)
    return ablated_nll


def _read_student_spikes(
    student: PreTrainedModel,
    batches: Iterable[Inputs],
    accumulators: Mapping[str, FFNAccumulator],
) -> None:
    """Run the student again for the spikes among its own inputs, into the ``accumulators``."""
    base = student.base_model
    kernels = {path: accumulator.student for path, accumulator in accumulators.items()}

    for batch in batches:
        with capture_all_inputs_and_outputs(kernels) as seen:
            base(**make_forward_arguments(base, batch))
        for path, (inputs, _) in seen.items():
            accumulators[path].add_student_spikes(inputs)


def _leave_out_idle_experts(
    accumulators: Mapping[str, FFNAccumulator],
) -> dict[str, FFNAccumulator]:
    """Those to which tokens have come; InputError if one is left out that is no expert, or if none
    is left."""
    used = {path: one for path, one in accumulators.items() if not one.is_empty()}
    for path, accumulator in accumulators.items():
        if path not in used and (accumulator.teacher.expert is None or not used):
            raise InputError(
                f"found no token of the text that comes to {path}, expected some: give more text"
            )
    return used


def _make_blank(entry: Mapping[str, object]) -> dict[str, object]:
    """An entry of the report with None for every figure."""
    return {
        name: _make_blank(value) if isinstance(value, Mapping) else None
        for name, value in entry.items()
    }


def _pool(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(rows, hidden_size) float64: the mean over each row of the last hidden states."""
    base = model.base_model
    states = base(**make_forward_arguments(base, ids)).last_hidden_state
    return states.double().mean(1).cpu()
