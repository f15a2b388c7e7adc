"""A small language model of one's own, with code of its own: every token sees the mean of those
before it."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .configuration_causal_mean import CausalMeanConfig


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.mix = nn.Linear(config.width, config.width)
        self.expand = nn.Linear(config.width, config.inner)
        self.act = ACT2FN[config.act]
        self.contract = nn.Linear(config.inner, config.width)

    def forward(self, x):
        seen = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = x + self.mix(x.cumsum(1) / seen)
        return x + self.contract(self.act(self.expand(self.norm(x))))


class CausalMeanPreTrainedModel(PreTrainedModel):
    config_class = CausalMeanConfig
    base_model_prefix = "model"


class CausalMeanModel(CausalMeanPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutput(last_hidden_state=x)


class CausalMeanForCausalLM(CausalMeanPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = CausalMeanModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return CausalLMOutput(logits=logits)
