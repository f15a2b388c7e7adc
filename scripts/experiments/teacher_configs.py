"""The sizes of the small teachers that the project ships.

They are unlike each other: grouped and single key-value heads, a sliding window, tied or not.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

VOCAB_SIZE = 4096
SEQUENCE_LENGTH = 256
"""Tokens of a row in training."""

DECODER: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0}
"""What all that predict next tokens have in common; 0 begins and ends a document."""

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        **DECODER,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(
        **DECODER,
        n_embd=192,
        n_layer=4,
        n_head=6,
        n_positions=SEQUENCE_LENGTH,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
    "mistral": MistralConfig(
        **DECODER,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    ),
    "qwen3": Qwen3Config(
        **DECODER,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    "bert": BertConfig(
        vocab_size=VOCAB_SIZE + 1,  # a mask token more
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
"""By the family's name, of an untrained teacher."""
