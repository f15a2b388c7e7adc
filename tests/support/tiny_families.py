"""A tiny random model of every family."""

import inspect
from pathlib import Path

import torch
import transformers
import yaml

from hf_kernel_ffn.families.task_classes import get_stock_heads

FAMILIES = yaml.safe_load(Path(__file__).with_name("families.yaml").read_text())
COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModel",
)
"""The head that is converted, trained and saved: the first of these that a family has."""


def tiny(family, auto, **changes):
    """A random model of ``family`` with the head ``auto``, whose biases are not zero."""
    heads = get_stock_heads(family)
    config_class = getattr(transformers, heads["AutoConfig"])
    known = {*inspect.signature(config_class).parameters, *config_class.attribute_map}
    common = {name: value for name, value in COMMON.items() if name in known}
    torch.manual_seed(0)
    config = config_class(**{**common, **FAMILIES[family], **changes})
    model = getattr(transformers, heads[auto])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.square().mean() < 0.01:
                parameter.normal_(std=0.2)
    return model
