#!/usr/bin/env python3
"""Train one of the small teachers that the project ships, from plain text, on a CPU.

    python scripts/experiments/train_teacher.py llama books.txt teachers/llama --tokens 12000000

The first run makes a byte-level BPE tokenizer; give the folder of a finished teacher as
``--tokenizer`` to share it (an encoder adds a mask token). The weights are trained in float32 and
saved in bfloat16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from plain_text import read_text
from teacher_configs import CONFIGS, SEQUENCE_LENGTH, VOCAB_SIZE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hf_kernel_ffn.text.inputs import Inputs, make_forward_arguments
from hf_kernel_ffn.text.prediction import logits_with_answers, mask_tokens

END = "<|endoftext|>"
MASK = "<|mask|>"
TOKENIZER_LETTERS = 12_000_000
"""Of the text from which the tokenizer is made."""
MASKED_SHARE = 0.4
"""Of an encoder's tokens in training; more than the usual 15% gives it more to learn from (Wettig
et al. 2023, arXiv:2202.08005)."""
CAUSAL_SHARE = 0.4
"""Share of the steps in which an encoder first predicts next tokens, under a causal mask: a masked
token says nothing by itself, and attention that has to be found from masks alone took more than a
million tokens to begin."""
MATRIX_RATE = 6e-3
"""Highest learning rate of the blocks' matrices, by Muon."""
OTHER_RATE = 3e-3
"""That of all other parameters, by AdamW."""
WARMUP_STEPS = 50
LEAST_RATE = 0.03
"""Share of the highest rate that the last step has."""
LARGEST_GRADIENT = 1.0
STARTS = 4
"""Every so manieth row of a batch begins as a text does, so that the model can start from
nothing."""
REPORTED = 25
"""Steps between two lines of output."""


@dataclass
class Plan:
    """How long and on what a teacher is trained."""

    ids: Tensor
    """All tokens of the text."""
    steps: int
    batch_size: int
    length: int
    """Tokens of a row."""
    seed: int


def main(
    family: Annotated[str, typer.Argument(help="llama, gpt2, mistral, qwen3 or bert")],
    text: Annotated[Path, typer.Argument(help="training text, .txt or .txt.xz")],
    out: Path,
    tokens: int = 12_000_000,
    batch_size: Annotated[int, typer.Option(help="rows a step")] = 32,
    sequence_length: Annotated[int, typer.Option(help="tokens a row")] = SEQUENCE_LENGTH,
    tokenizer: Annotated[Optional[Path], typer.Option(help="folder to take it from")] = None,
    seed: int = 0,
    threads: Annotated[Optional[int], typer.Option(help="CPU threads")] = None,
) -> None:
    """Train FAMILY on TEXT and save it in OUT."""
    if family not in CONFIGS:
        raise typer.BadParameter(f"found {family!r}, expected one of {', '.join(CONFIGS)}")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    document = read_text(text)
    tok = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else train_tokenizer(document)
    if family == "bert":
        tok.add_special_tokens({"mask_token": AddedToken(MASK, lstrip=True, special=True)})
    lines = tok(document.splitlines(keepends=True)).input_ids
    ids = torch.tensor([token for line in lines for token in line], dtype=torch.long)
    typer.echo(f"{len(ids):,} tokens of text")

    model = make_model(family)
    typer.echo(f"{model.num_parameters():,} parameters")
    steps = max(1, tokens // (batch_size * sequence_length))
    train(model, tok, Plan(ids, steps, batch_size, sequence_length, seed))
    model.to(torch.bfloat16).save_pretrained(out)
    tok.save_pretrained(out)
    typer.echo(write_sample(model.float(), tok))


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer of VOCAB_SIZE tokens; 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = text[:TOKENIZER_LETTERS].splitlines(keepends=True)
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


def make_model(family: str) -> PreTrainedModel:
    """Make the untrained teacher."""
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    return auto.from_config(CONFIGS[family], dtype=torch.float32)


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether it learns from masks in the end."""
    return model.config.model_type == "bert"


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> None:
    """Train in place, and print the loss now and then."""
    body = torch.compile(model.base_model)
    head = model.cls if is_encoder(model) else model.lm_head
    optimizers = make_optimizers(model)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    start = time.time()
    average = None
    for step, batch in enumerate(draw_batches(plan, tokenizer.bos_token_id)):
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step, plan.steps)
        inputs = choose_task(model, tokenizer, batch, step, plan)
        loss = compute_loss(model, body, head, inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % REPORTED == 0 or step == plan.steps - 1:
            speed = (step + 1) * plan.batch_size * plan.length / (time.time() - start)
            typer.echo(f"step {step}/{plan.steps} loss {average:.3f} {speed:,.0f} tokens/s")


def make_optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on embeddings, head and vectors."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(parameter) for module in ends for parameter in module.parameters()}
    matrices = []
    others = []
    for parameter in model.parameters():
        is_matrix = parameter.ndim == 2 and id(parameter) not in embeddings
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=MATRIX_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=OTHER_RATE, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def schedule(step: int, steps: int) -> float:
    """Share of the highest learning rate: a short rise, and half a cosine down."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = 0.5 * (1 + math.cos(math.pi * step / steps))
    return rise * (LEAST_RATE + (1 - LEAST_RATE) * fall)


def draw_batches(plan: Plan, bos_token_id: int) -> Iterator[Tensor]:
    """Draw (batch_size, length) token ids for every step, each pass over the text in new order
    and from new offsets."""
    length = plan.length
    blocks = len(plan.ids) // length - 1
    passes = plan.steps * plan.batch_size // blocks + 1
    order = torch.cat([torch.randperm(blocks) for _ in range(passes)])
    for step in range(plan.steps):
        rows = order[step * plan.batch_size : (step + 1) * plan.batch_size]
        starts = rows * length + int(torch.randint(length, ()))
        batch = torch.stack([plan.ids[start : start + length] for start in starts])
        batch[: plan.batch_size // STARTS, 0] = bos_token_id
        yield batch


def choose_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Tensor,
    step: int,
    plan: Plan,
) -> Inputs:
    """What the model is to predict of a batch: next tokens, or an encoder's masks once it is past
    its causal steps."""
    if not is_encoder(model):
        return batch
    causal_steps = round(CAUSAL_SHARE * plan.steps)
    if step == 0:
        look_back_only(model, True)
    elif step == causal_steps:
        look_back_only(model, False)
    if model.config.is_decoder:
        return batch
    return mask_tokens(batch, tokenizer.mask_token_id, plan.seed + step, MASKED_SHARE)


def look_back_only(model: PreTrainedModel, on: bool) -> None:
    """Put the causal mask on an encoder, or take it off."""
    model.config.is_decoder = on
    for layer in model.base_model.encoder.layer:
        layer.attention.self.is_causal = on


def compute_loss(
    model: PreTrainedModel, body: nn.Module, head: nn.Module, inputs: Inputs
) -> Tensor:
    """Cross-entropy of what is to be predicted, the model run in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = body(**make_forward_arguments(model.base_model, inputs)).last_hidden_state
        hidden, answers = logits_with_answers(states, inputs)
        logits = head(hidden)
    return nn.functional.cross_entropy(logits.float().flatten(0, -2), answers.flatten())


def write_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Let the model write, or fill in masks."""
    if not model.can_generate():
        text = f"The old man looked at {MASK} sea, and said {MASK} word."
        prompt = tokenizer(text, return_tensors="pt")
        return tokenizer.decode(model(input_ids=prompt.input_ids).logits[0].argmax(-1))
    output = model.generate(
        **tokenizer("The old man looked at", return_tensors="pt"),
        max_new_tokens=60,
        do_sample=True,
        top_p=0.9,
        temperature=0.8,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(output[0])


if __name__ == "__main__":
    typer.run(main)
