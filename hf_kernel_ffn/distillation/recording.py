"""Recording a teacher for the logits stages of a recipe: its likeliest tokens at every position of
what they will read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.parameters import to_at_least_float32
from ..conversion.convert import choose_ffns
from ..storage.files import new_folder, require_empty, save_tensors
from ..storage.loading import load_student
from ..storage.weight_files import fingerprint_files
from ..text.documents import require_readable
from ..text.inputs import make_forward_arguments
from ..text.packing import PackedText
from .accelerator import autocast, make_accelerator
from .batches import open_text
from .divergence import top_and_rest_log_probs
from .recipe import Recipe
from .record_forms import ExactForm, PackedForm, RecordForm
from .records import (
    EXACT,
    FACTS,
    PACKED,
    Facts,
    digest,
    refuse_masked,
    shard_file,
    teacher_fingerprint,
)
from .run import teacher_of
from .stages import stage_parts, steps_and_sequences

SHARD_BYTES = 2**28
"""About how large a file of a record becomes; that much is held in memory."""
MEBIBYTE = 2**20


def record(
    recipe: Recipe,
    out_dir: str | Path,
    top_k: int = 64,
    processes: int = 1,
    *,
    exact: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write to ``out_dir`` what the teacher of ``recipe`` predicts in what its logits stages read.

    Args:
        top_k: tokens to record at every position; the others count as one.
        processes: that the distillation will run on. Each sequence is recorded once.
        exact: probabilities in float32, and not packed in a third of the bytes.
        say: is told the size before and after.

    Raises:
        InputError: there is no logits stage, or several temperatures; the teacher is masked, or has
            no ``top_k`` tokens to choose from at every position; paths, text or models are not what
            the recipe says; or there is no room.
    """
    require_empty(out_dir)
    temperature = _require_one_temperature(recipe)
    require_readable(recipe.data.sources)
    tokenizer, teacher = teacher_of(recipe, make_accelerator(recipe).device)
    refuse_masked(teacher)

    length = recipe.data.sequence_length
    spans = spans_of_logits_stages(recipe, teacher, processes)
    count = sum(map(len, spans))
    vocabulary = teacher.config.get_text_config().vocab_size
    if top_k > vocabulary:
        raise InputError(
            f"found a teacher of {vocabulary} tokens, expected {top_k} tokens to choose from at "
            "each position: give a smaller --top-k"
        )
    form = (ExactForm if exact else PackedForm)(top_k, vocabulary)
    sequence_bytes = form.token_bytes * length
    say(
        f"at most {count:,} sequences of {length:,} tokens, {form.token_bytes:,} bytes per "
        f"token: {_format_size(count * sequence_bytes)} in all"
    )

    text = open_text(tokenizer, recipe.data, recipe.seed)
    shown = track(_select_spans(text, spans), description="recording", total=count)
    rows = next(stage.batch_size for stage in recipe.stages if stage.name == "logits")
    answers = _record_batches(
        recipe,
        teacher,
        _without_repeats(shown),
        rows=rows,
        form=form,
        temperature=temperature,
    )
    batches_per_shard = max(1, SHARD_BYTES // (sequence_bytes * rows))
    with new_folder(out_dir, last=FACTS) as folder:
        written = _write_shards(answers, folder, batches_per_shard)
        facts = Facts(
            format=EXACT if exact else PACKED,
            teacher=recipe.teacher,
            fingerprint=teacher_fingerprint(teacher),
            temperature=temperature,
            sequence_length=length,
            top_k=top_k,
            shards=written.shards,
            vocabulary=None if exact else vocabulary,
            dtype=recipe.dtype,
            files=fingerprint_files(recipe.teacher),
        )
        content = facts.model_dump_json(indent=1) + "\n"
        (folder / FACTS).write_text(content, encoding="utf-8")

    size = sum(file.stat().st_size for file in Path(out_dir).iterdir())
    say(f"{written.sequences:,} sequences, none twice: {_format_size(size)}")
    share = 1 - written.unrecorded / (written.sequences * length)
    say(f"the recorded tokens hold {share:.0%} of the probability")


def spans_of_logits_stages(recipe: Recipe, teacher: PreTrainedModel, processes: int) -> list[range]:
    """Which of the packed sequences each logits stage of ``recipe`` reads, in ascending order, by
    their place in the text read without end."""
    if recipe.student is None:
        layers = recipe.kernel_ffn.get("layers")
        chosen, *_ = choose_ffns(teacher, recipe.kernel_settings(), layers)
        paths = list(chosen)
    else:
        student = load_student(recipe.student, trust_remote_code=recipe.trust_remote_code)
        paths = list(student.kernel_ffns())

    spans = []
    start = 0
    for stage, _ in stage_parts(recipe, paths):
        steps, per_step = steps_and_sequences(stage, recipe.data, processes)
        if stage.name == "logits":
            spans.append(range(start, start + steps * per_step))
        start += steps * per_step
    return spans


@dataclass(frozen=True)
class _Answer:
    """What a record has of some sequences."""

    tensors: dict[str, Tensor]
    unrecorded: float
    """Probability of the other tokens, over all positions."""


@dataclass
class _Written:
    """What has been written of a record."""

    shards: int = 0
    sequences: int = 0
    unrecorded: float = 0.0
    """Probability of the other tokens, over all positions."""


def _write_shards(answers: Iterator[_Answer], folder: Path, batches_per_shard: int) -> _Written:
    """Write the tensors of ``answers``, so many batches to a file."""
    written = _Written()
    while batches := list(islice(answers, batches_per_shard)):
        tensors = {
            name: torch.cat([batch.tensors[name] for batch in batches])
            for name in batches[0].tensors
        }
        save_tensors(tensors, shard_file(folder, written.shards))
        written.shards += 1
        for batch in batches:
            written.sequences += len(batch.tensors["input_ids"])
            written.unrecorded += batch.unrecorded
    return written


def _require_one_temperature(recipe: Recipe) -> float:
    temperatures = sorted({stage.temperature for stage in recipe.stages if stage.name == "logits"})
    if len(temperatures) != 1:
        raise InputError(
            f"found logits stages at {len(temperatures)} temperatures {temperatures}, expected "
            "one: override stages.N.temperature, and record once for each"
        )
    return temperatures[0]


def _select_spans(text: PackedText, spans: list[range]) -> Iterator[Tensor]:
    """The sequences of ``text``, from its beginning, whose places are in ``spans``."""
    place = 0
    for span in spans:
        for _ in range(place, span.start):
            next(text)
        for _ in span:
            yield next(text)
        place = span.stop


def _without_repeats(sequences: Iterable[Tensor]) -> Iterator[Tensor]:
    seen = set()
    for ids in sequences:
        key = digest(ids)
        if key not in seen:
            seen.add(key)
            yield ids


def _record_batches(
    recipe: Recipe,
    teacher: PreTrainedModel,
    sequences: Iterator[Tensor],
    *,
    rows: int,
    form: RecordForm,
    temperature: float,
) -> Iterator[_Answer]:
    """The tensors of a record, so many ``rows`` at a time."""
    top_k = form.top_k
    while batch := list(islice(sequences, rows)):
        ids = torch.stack(batch)
        with torch.no_grad(), autocast(recipe.dtype, teacher.device):
            output = teacher(**make_forward_arguments(teacher, ids)).logits
            logits = to_at_least_float32(output) / temperature
        if logits.shape[:-1] != ids.shape or logits.shape[-1] < top_k:
            raise InputError(
                f"found predictions of shape {tuple(logits.shape)} for sequences "
                f"{tuple(ids.shape)}, expected {top_k} tokens to choose from at each position: "
                "give a language model, or a smaller --top-k"
            )
        top = logits.topk(top_k).indices.sort().values
        log_probabilities = top_and_rest_log_probs(logits, top).float()
        tensors = {"input_ids": ids.int(), **form.encode(top, log_probabilities)}
        yield _Answer(
            tensors={name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            unrecorded=log_probabilities[..., -1].exp().sum().item(),
        )


def _format_size(size: int) -> str:
    return f"{size / MEBIBYTE:,.1f} MiB"
