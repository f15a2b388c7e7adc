"""Tiny random teachers, and where things lie."""

from pathlib import Path

import torch
import transformers

SUPPORT = Path(__file__).parent
RECIPES = Path(__file__).parents[2] / "recipes"
FAMILIES = ("llama", "gpt2", "mistral")
_CLASSES = {
    "llama": (
        "LlamaConfig",
        {
            "base": "LlamaModel",
            "causal": "LlamaForCausalLM",
            "classify": "LlamaForSequenceClassification",
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "base": "GPT2Model",
            "causal": "GPT2LMHeadModel",
            "classify": "GPT2ForSequenceClassification",
        },
    ),
    "mistral": (
        "MistralConfig",
        {
            "base": "MistralModel",
            "causal": "MistralForCausalLM",
            "classify": "MistralForSequenceClassification",
        },
    ),
}
_GATED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_SETTINGS = {
    "llama": dict(_GATED, tie_word_embeddings=True),
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "mistral": dict(_GATED, tie_word_embeddings=False, sliding_window=8),
}


def tiny_teacher(family, head="causal", seed=0, **changes):
    """A random teacher whose FFNs matter to its logits: weights wider than the stock
    initialisation, biases not zero."""
    config_name, heads = _CLASSES[family]
    common = {
        "vocab_size": 300,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = getattr(transformers, config_name)(**{**common, **_SETTINGS[family], **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, heads[head])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
