#!/usr/bin/env python3
"""Train one of the small teachers that the project ships, from plain text, on a CPU.

    python scripts/experiments/train_teacher.py llama books.txt teachers/llama --tokens 12000000

The first run makes a byte-level BPE tokenizer; give the folder of a finished teacher as
``--tokenizer`` to share it (an encoder adds a mask token). The weights are trained in float32
and saved in bfloat16.
"""

from __future__ import annotations

import lzma
import math
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from hf_kernel_ffn.text.inputs import make_forward_arguments
from hf_kernel_ffn.text.prediction import logits_with_answers, mask_tokens

VOCAB_SIZE = 4096
SEQUENCE_LENGTH = 256
END = "<|endoftext|>"
MASK = "<|mask|>"
MASKED_SHARE = 0.4
"""Of an encoder's tokens in training; more than the usual 15% gives it more to learn from (Wettig
et al. 2023, arXiv:2202.08005)."""

# Small, and unlike each other: grouped and single key-value heads, a sliding window, tied or not.
SHAPES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=192,
        n_layer=4,
        n_head=6,
        n_positions=SEQUENCE_LENGTH,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "mistral": lambda: MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "qwen3": lambda: Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "bert": lambda: BertConfig(
        vocab_size=VOCAB_SIZE + 1,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
        pad_token_id=0,
    ),
}


def read_text(path: Path) -> str:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return file.read()


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text[:12_000_000].splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on embeddings, head and vectors."""
    embeddings = {
        id(p)
        for m in (model.get_input_embeddings(), model.get_output_embeddings())
        for p in m.parameters()
    }
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    rest = [p for p in model.parameters() if p.ndim != 2 or id(p) in embeddings]
    return [
        torch.optim.Muon(matrices, lr=6e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    if not model.can_generate():
        prompt = tokenizer(
            f"The old man looked at {MASK} sea, and said {MASK} word.", return_tensors="pt"
        )
        return tokenizer.decode(model(input_ids=prompt.input_ids).logits[0].argmax(-1))
    prompt = tokenizer("The old man looked at", return_tensors="pt")
    output = model.generate(
        **prompt,
        max_new_tokens=60,
        do_sample=True,
        top_p=0.9,
        temperature=0.8,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(output[0])


CAUSAL_SHARE = 0.4
"""Share of the steps in which an encoder first predicts next tokens, under a causal mask: a masked
token says nothing by itself, and attention that has to be found from masks alone took more than a
million tokens to begin."""


def look_back_only(model: PreTrainedModel, on: bool) -> None:
    """Put the causal mask on an encoder, or take it off."""
    model.config.is_decoder = on
    for layer in model.base_model.encoder.layer:
        layer.attention.self.is_causal = on


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
    if family not in SHAPES:
        raise typer.BadParameter(f"found {family!r}, expected one of {', '.join(SHAPES)}")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    document = read_text(text)
    tok = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else train_tokenizer(document)
    auto: Any = AutoModelForCausalLM
    if family == "bert":
        auto = AutoModelForMaskedLM
        tok.add_special_tokens({"mask_token": AddedToken(MASK, lstrip=True, special=True)})
    lines = document.splitlines(keepends=True)
    ids = torch.tensor([i for ids in tok(lines).input_ids for i in ids], dtype=torch.long)
    typer.echo(f"{len(ids):,} tokens of text")

    model = auto.from_config(SHAPES[family](), dtype=torch.float32)
    typer.echo(f"{model.num_parameters():,} parameters")
    body, head = torch.compile(model.base_model), model.cls if family == "bert" else model.lm_head
    opts = optimizers(model)
    peaks = [[group["lr"] for group in opt.param_groups] for opt in opts]
    steps = max(1, tokens // (batch_size * sequence_length))
    blocks = len(ids) // sequence_length - 1
    order = torch.cat([torch.randperm(blocks) for _ in range(steps * batch_size // blocks + 1)])
    start, average = time.time(), None
    for step in range(steps):
        rows = order[step * batch_size : (step + 1) * batch_size]
        offset = int(torch.randint(sequence_length, ()))
        batch = torch.stack(
            [ids[i : i + sequence_length] for i in (rows * sequence_length + offset)]
        )
        batch[: batch_size // 4, 0] = tok.bos_token_id  # so that it can start from nothing
        progress = step / steps
        scale = min(1.0, (step + 1) / 50) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))
        for opt, lrs in zip(opts, peaks):
            for group, lr in zip(opt.param_groups, lrs):
                group["lr"] = lr * scale
        if family == "bert" and step in (0, round(CAUSAL_SHARE * steps)):
            look_back_only(model, step == 0)
        looks_both_ways = family == "bert" and not model.config.is_decoder
        asked: Any = (
            mask_tokens(batch, tok.mask_token_id, seed + step, MASKED_SHARE)
            if looks_both_ways
            else batch
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden, answers = logits_with_answers(
                body(**make_forward_arguments(model.base_model, asked)).last_hidden_state, asked
            )
            logits = head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), answers.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 25 == 0 or step == steps - 1:
            speed = (step + 1) * batch_size * sequence_length / (time.time() - start)
            typer.echo(f"step {step}/{steps} loss {average:.3f} {speed:,.0f} tokens/s")
    model.to(torch.bfloat16).save_pretrained(out)
    tok.save_pretrained(out)
    typer.echo(sample(model.float(), tok))


if __name__ == "__main__":
    typer.run(main)
