"""Config of a small language model of one's own."""

from transformers import PreTrainedConfig


class CausalMeanConfig(PreTrainedConfig):
    model_type = "causal_mean"

    def __init__(self, vocab_size=300, width=32, inner=48, blocks=2, act="gelu", **kwargs):
        self.vocab_size, self.width, self.inner, self.blocks, self.act = (
            vocab_size,
            width,
            inner,
            blocks,
            act,
        )
        self.hidden_size, self.num_hidden_layers = width, blocks
        super().__init__(**kwargs)
