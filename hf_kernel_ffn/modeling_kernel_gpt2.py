"""GPT-2 with kernel-readout FFNs. Travels inside converted checkpoints."""

from transformers import (
    AutoModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from .configuration import KernelConfigMixin
from .modeling import KernelModelMixin


class KernelGPT2Config(KernelConfigMixin, GPT2Config):
    model_type = "kernel_gpt2"
    auto_classes = {
        "AutoConfig": "KernelGPT2Config",
        "AutoModel": "KernelGPT2Model",
        "AutoModelForCausalLM": "KernelGPT2LMHeadModel",
        "AutoModelForSequenceClassification": "KernelGPT2ForSequenceClassification",
        "AutoModelForTokenClassification": "KernelGPT2ForTokenClassification",
    }
    kernel_ffn: dict | None = None


class KernelGPT2Model(KernelModelMixin, GPT2Model):
    config_class = KernelGPT2Config


class KernelGPT2LMHeadModel(KernelModelMixin, GPT2LMHeadModel):
    config_class = KernelGPT2Config


class KernelGPT2ForSequenceClassification(KernelModelMixin, GPT2ForSequenceClassification):
    config_class = KernelGPT2Config


class KernelGPT2ForTokenClassification(KernelModelMixin, GPT2ForTokenClassification):
    config_class = KernelGPT2Config


# The stock classification heads build their base model through AutoModel; the key is this very class.
AutoModel.register(KernelGPT2Config, KernelGPT2Model)
