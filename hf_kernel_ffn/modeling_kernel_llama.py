"""Llama with kernel-readout FFNs. Travels inside converted checkpoints."""

from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from .configuration import KernelConfigMixin
from .modeling import KernelModelMixin


class KernelLlamaConfig(KernelConfigMixin, LlamaConfig):
    model_type = "kernel_llama"
    auto_classes = {
        "AutoConfig": "KernelLlamaConfig",
        "AutoModel": "KernelLlamaModel",
        "AutoModelForCausalLM": "KernelLlamaForCausalLM",
        "AutoModelForSequenceClassification": "KernelLlamaForSequenceClassification",
        "AutoModelForTokenClassification": "KernelLlamaForTokenClassification",
    }
    kernel_ffn: dict | None = None


class KernelLlamaModel(KernelModelMixin, LlamaModel):
    config_class = KernelLlamaConfig


class KernelLlamaForCausalLM(KernelModelMixin, LlamaForCausalLM):
    config_class = KernelLlamaConfig


class KernelLlamaForSequenceClassification(KernelModelMixin, LlamaForSequenceClassification):
    config_class = KernelLlamaConfig


class KernelLlamaForTokenClassification(KernelModelMixin, LlamaForTokenClassification):
    config_class = KernelLlamaConfig


# The stock classification heads build their base model through AutoModel; the key is this very class.
AutoModel.register(KernelLlamaConfig, KernelLlamaModel)
