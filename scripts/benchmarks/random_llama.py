"""Random Llamas of named shapes, for benchmarks in which no weight's value matters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

TOKENIZER = "recipes/teachers/llama"
VOCAB_SIZE = 4096
"""Of that tokenizer."""
NOISE = 2**20
"""Random numbers that are repeated: filling gigabytes with new ones takes longer than the rest."""


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama's blocks."""

    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    layers: int
    """Of the model that it is named after."""

    @property
    def bytes_per_block(self) -> int:
        """In bfloat16: attention's four matrices and the FFN's three."""
        key_value_size = self.hidden_size * self.key_value_heads // self.heads
        attention = 2 * self.hidden_size * (self.hidden_size + key_value_size)
        return 2 * (attention + 3 * self.hidden_size * self.intermediate_size)


SHAPES = {
    "smollm2-135m": LlamaShape(576, 1536, 9, 3, 30),
    "llama-3.2-1b": LlamaShape(2048, 8192, 32, 8, 16),
    "llama-3-8b": LlamaShape(4096, 14336, 32, 8, 32),
    "llama-3-70b": LlamaShape(8192, 28672, 64, 8, 80),
}


def make_random_llama(shape: LlamaShape, layers: int) -> LlamaForCausalLM:
    """A bfloat16 Llama of so many blocks, in evaluation mode, with a small vocabulary."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    # What is computed and not stored is made again: the frequencies of the positions.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.ones(NOISE)
        if parameter.ndim > 1:
            noise = torch.randn(NOISE, generator=generator) / parameter.shape[-1] ** 0.5
        fill(parameter.data.view(-1), noise)
    return model.eval()


def save_random_llama(folder: Path, shape: LlamaShape, layers: int) -> int:
    """Save one with a tokenizer; returns the bytes of its weights."""
    make_random_llama(shape, layers).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def fill(numbers: Tensor, noise: Tensor) -> None:
    """Repeat ``noise`` over ``numbers``."""
    for low in range(0, len(numbers), len(noise)):
        numbers[low : low + len(noise)] = noise[: len(numbers) - low]
