"""Recording a teacher for the logits stages of a recipe: its likeliest tokens at every position of what they will read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint_code.errors import InputError
from ..conversion.convert import choose_ffns
from ..storage.files import new_folder, require_empty
from ..storage.loading import load_student
from ..text.inputs import make_forward_arguments
from .objectives import to_at_least_float32, top_and_rest_log_probs
from .recipe import Recipe
from .run import teacher_of
from .teacher_signal import (
    FACTS,
    Facts,
    digest,
    refuse_masked,
    shard_file,
    teacher_fingerprint,
    token_bytes,
)
from .trainer import PackedText, autocast, make_accelerator, stage_groups, steps_and_sequences

SHARD_BYTES = 2**28


def record(
    recipe: Recipe,
    out_dir: str | Path,
    top_k: int = 64,
    processes: int = 1,
    say: Callable[[str], None] = print,
) -> None:
    """Write to ``out_dir`` what the teacher of ``recipe`` predicts in every sequence that its logits stages read on so many
    processes, each sequence once; ``say`` is told the size before and after.

    Raises:
        InputError: there is no logits stage, or several temperatures; the teacher is masked, or has no ``top_k`` tokens to choose
            from at every position; paths, text or models are not what the recipe says; or there is no room.
    """
    require_empty(out_dir)
    stages = [stage for stage in recipe.stages if stage.name == "logits"]
    temperatures = sorted({stage.temperature for stage in stages})
    if len(temperatures) != 1:
        raise InputError(
            f"found logits stages at {len(temperatures)} temperatures {temperatures}, expected one: override stages.N.temperature, and "
            "record once for each"
        )
    tokenizer, teacher = teacher_of(recipe, make_accelerator(recipe).device)
    refuse_masked(teacher)
    read, length = spans(recipe, teacher, processes), recipe.data.sequence_length
    most = sum(map(len, read))
    size = token_bytes(top_k) * length
    say(
        f"at most {most:,} sequences of {length:,} tokens, {token_bytes(top_k):,} bytes per token: {_mib(most * size)} in all"
    )
    distinct = _distinct(
        _shown((ids for span in read for ids in _read(recipe, tokenizer, span)), most)
    )
    rows = stages[0].batch_size
    answers = _answers(recipe, teacher, distinct, rows, top_k, temperatures[0])
    sequences = shard = 0
    others = 0.0  # probability of what is not recorded, over all sequences
    with new_folder(out_dir) as made:
        while held := list(islice(answers, max(1, SHARD_BYTES // (size * rows)))):
            save_file(
                {name: torch.cat([answer[name] for answer in held]) for name in held[0]},
                shard_file(made, shard),
            )
            sequences, shard = (
                sequences + sum(len(answer["input_ids"]) for answer in held),
                shard + 1,
            )
            others += sum(
                answer["log_probabilities"][..., -1].exp().sum().item() for answer in held
            )
        facts = Facts(
            teacher=recipe.teacher,
            fingerprint=teacher_fingerprint(teacher),
            temperature=temperatures[0],
            sequence_length=length,
            top_k=top_k,
            shards=shard,
        )
        (made / FACTS).write_text(facts.model_dump_json(indent=1) + "\n", encoding="utf-8")
    say(
        f"{sequences:,} sequences, none twice: {_mib(sum(file.stat().st_size for file in Path(out_dir).iterdir()))}"
    )
    say(f"the recorded tokens hold {1 - others / (sequences * length):.0%} of the probability")


def spans(recipe: Recipe, teacher: Any, processes: int) -> list[range]:
    """Which of the packed sequences each logits stage of ``recipe`` reads, by their place in the text read without end."""
    if recipe.student is None:
        paths = list(
            choose_ffns(teacher, recipe.kernel_settings(), recipe.kernel_ffn.get("layers"))[0]
        )
    else:
        paths = list(
            load_student(recipe.student, trust_remote_code=recipe.trust_remote_code).kernel_ffns()
        )
    found, start = [], 0
    for stage, _ in stage_groups(recipe, paths):
        steps, per_step = steps_and_sequences(stage, recipe.data, processes)
        if stage.name == "logits":
            found.append(range(start, start + steps * per_step))
        start += steps * per_step
    return found


def _read(recipe: Recipe, tokenizer, span: range) -> Iterator[Tensor]:
    return islice(iter(PackedText(tokenizer, recipe.data, recipe.seed, span.start)), len(span))


def _distinct(sequences: Iterable[Tensor]) -> Iterator[Tensor]:
    seen = set()
    for ids in sequences:
        if (key := digest(ids)) not in seen:
            seen.add(key)
            yield ids


def _answers(
    recipe: Recipe, teacher, sequences: Iterator[Tensor], rows: int, top_k: int, temperature: float
) -> Iterator[dict[str, Tensor]]:
    """The tensors of a record, so many rows at a time."""
    while batch := list(islice(sequences, rows)):
        ids = torch.stack(batch)
        with torch.no_grad(), autocast(recipe.dtype, teacher.device):
            logits = (
                to_at_least_float32(teacher(**make_forward_arguments(teacher, ids)).logits)
                / temperature
            )
        if logits.shape[:-1] != ids.shape or logits.shape[-1] < top_k:
            raise InputError(
                f"found predictions of shape {tuple(logits.shape)} for sequences {tuple(ids.shape)}, expected {top_k} tokens to choose "
                "from at each position: give a language model, or a smaller --top-k"
            )
        top = logits.topk(top_k).indices.sort().values
        found = {
            "input_ids": ids.int(),
            "top": top.int(),
            "log_probabilities": top_and_rest_log_probs(logits, top).float(),
        }
        yield {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def _shown(sequences: Iterable[Tensor], count: int) -> Iterable[Tensor]:
    from rich.progress import track

    return track(sequences, description="recording", total=count)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
