"""Mistral with kernel-readout FFNs. Travels inside converted checkpoints."""

from transformers import (
    AutoModel,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)

from .configuration import KernelConfigMixin
from .modeling import KernelModelMixin


class KernelMistralConfig(KernelConfigMixin, MistralConfig):
    model_type = "kernel_mistral"
    auto_classes = {
        "AutoConfig": "KernelMistralConfig",
        "AutoModel": "KernelMistralModel",
        "AutoModelForCausalLM": "KernelMistralForCausalLM",
        "AutoModelForSequenceClassification": "KernelMistralForSequenceClassification",
        "AutoModelForTokenClassification": "KernelMistralForTokenClassification",
    }
    kernel_ffn: dict | None = None


class KernelMistralModel(KernelModelMixin, MistralModel):
    config_class = KernelMistralConfig


class KernelMistralForCausalLM(KernelModelMixin, MistralForCausalLM):
    config_class = KernelMistralConfig


class KernelMistralForSequenceClassification(KernelModelMixin, MistralForSequenceClassification):
    config_class = KernelMistralConfig


class KernelMistralForTokenClassification(KernelModelMixin, MistralForTokenClassification):
    config_class = KernelMistralConfig


# The stock classification heads build their base model through AutoModel; the key is this very class.
AutoModel.register(KernelMistralConfig, KernelMistralModel)
