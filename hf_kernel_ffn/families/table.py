"""Where the FFNs of each HuggingFace architecture are: one entry a family, nothing but data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One family.

    Paths are attribute names. Weights may stand in ``nn.Linear`` or in ``Conv1D`` orientation.
    """

    model_type: str
    """``config.model_type`` of the stock model."""
    layers: str | tuple[str, ...]
    """Under the base model, the list of blocks, or several where there are several stacks.

    Those that a head lacks are left out.
    """
    ffn: str
    """In a block, the module that holds the FFN's parts; empty if the block itself does."""
    up: str
    """In the FFN, the projection whose rows are W_in (the linear half, in a gated FFN)."""
    down: str
    """In the FFN, the projection whose columns are W_out."""
    activation: str | None = None
    """Config attribute that names the activation; ``text_config.…`` if the config has parts."""
    gate: str | None = None
    """In a gated FFN, the projection inside the activation."""
    dropout: str | None = None
    """Config attribute with the dropout on the FFN's output, if the FFN module applies one."""
    act: str | None = None
    """In the FFN, the activation module.

    Needed if the FFN is split, or the config does not name the activation.
    """
    gate_half: int | None = None
    """If ``up`` stacks the rows of gate and up, which half is the gate: 0 or 1."""
    hidden_dropout: str | None = None
    """Config attribute with the dropout on the hidden units.

    A split FFN's block has the same attribute.
    """
    split: bool = False
    """The FFN is no module of its own, from x to y.

    The readout takes the place of ``up``, and ``act`` and ``down`` pass it on.
    """
    experts: bool = False
    """``ffn`` holds the FFNs of all experts, stacked in 3-D tensors.

    It is called with tokens, the experts chosen for them and the weights of those.
    """
    shared: bool = False
    """One FFN serves several layers."""
    guard: tuple[str, ...] = ()
    """Config attributes that a checkpoint spoils for stock classes; empty: ``activation``.

    A number serves as well as a name.
    """
    refuse: tuple[tuple[str, object], ...] = ()
    """Config attributes, each with a value that it must not have: the FFN would be another."""
    variants: tuple[dict[str, Any], ...] = ()
    """Fields that differ in blocks where the FFN is not found, tried in order."""
    ffn_norm: str | None = None
    """In a block, the norm whose output is the FFN's input.

    This and what follows is for reading; None: not described.
    """
    attention: str | None = None
    """In a block, the attention module: it returns its output and the weights."""
    qkv: tuple[str, ...] | None = None
    """In the attention module, the projections to queries, keys and values.

    One name if they are stacked in one, in this order.
    """
    attention_out: str | None = None
    """In the attention module, the projection that mixes the heads."""
    final_norm: str | None = None
    """Under the base model, the norm before the unembedding."""

    @property
    def stacks(self) -> tuple[str, ...]:
        """``layers`` as a tuple."""
        return (self.layers,) if isinstance(self.layers, str) else self.layers

    @property
    def guards(self) -> tuple[str, ...]:
        """Config attributes in which the guard against stock classes stands."""
        return self.guard or ((self.activation,) if self.activation else ())

    @property
    def gated(self) -> bool:
        """Whether a hidden unit has two rows, one of them inside the activation."""
        return self.gate is not None or self.gate_half is not None

    def shapes(self) -> Iterator[Architecture]:
        """The entry itself, then its variants."""
        yield self
        for fields in self.variants:
            yield replace(self, variants=(), **fields)


# What families have in common. Fields are written out below where a family differs.

# Named as in Llama, so that readings know the parts around the FFN.
_READ: dict[str, Any] = {
    "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "attention_out": "o_proj",
    "final_norm": "norm",
}
# The same with norms on what is written, so that the parts do not add up to the residual stream.
_POST_NORM: dict[str, Any] = {**_READ, "ffn_norm": None}
# A gated FFN in three projections.
_GATED: dict[str, Any] = {
    "layers": "layers",
    "ffn": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "activation": "hidden_act",
}
# A gated FFN whose gate and linear half are stacked in one projection.
_FUSED: dict[str, Any] = {
    "layers": "layers",
    "ffn": "mlp",
    "up": "gate_up_proj",
    "gate_half": 0,
    "down": "down_proj",
    "activation": "hidden_act",
}
_GPT: dict[str, Any] = {"layers": "h", "ffn": "mlp", "final_norm": "ln_f"}
_BERT: dict[str, Any] = {
    "ffn": "",
    "up": "intermediate.dense",
    "act": "intermediate.intermediate_act_fn",
    "down": "output.dense",
    "activation": "hidden_act",
    "split": True,
}
_FAIRSEQ: dict[str, Any] = {
    "ffn": "",
    "up": "fc1",
    "act": "activation_fn",
    "down": "fc2",
    "activation": "activation_function",
    "split": True,
}
_BART: dict[str, Any] = {
    **_FAIRSEQ,
    "layers": ("encoder.layers", "decoder.layers", "layers"),
    "hidden_dropout": "activation_dropout",
}
_T5: dict[str, Any] = {
    "layers": ("encoder.block", "decoder.block"),
    "act": "act",
    "down": "wo",
    "hidden_dropout": "dropout_rate",
    "guard": ("num_heads",),
}
_CLIP: dict[str, Any] = {"ffn": "mlp", "up": "fc1", "down": "fc2", "act": "activation_fn"}
# A mixture, and what differs in those of its blocks that have one gated FFN instead.
_EXPERTS: dict[str, Any] = {
    "layers": "layers",
    "ffn": "mlp.experts",
    "up": "gate_up_proj",
    "gate_half": 0,
    "down": "down_proj",
    "activation": "hidden_act",
    "experts": True,
}
_DENSE_BLOCK: dict[str, Any] = {
    "ffn": "mlp",
    "experts": False,
    "gate_half": None,
    "gate": "gate_proj",
    "up": "up_proj",
}

FAMILIES: tuple[Architecture, ...] = (
    # Decoders.
    Architecture("llama", **_GATED, **_READ),
    Architecture("mistral", **_GATED, **_READ),
    Architecture(
        "gpt2",
        **_GPT,
        up="c_fc",
        down="c_proj",
        activation="activation_function",
        dropout="resid_pdrop",
        ffn_norm="ln_2",
        attention="attn",
        qkv=("c_attn",),
        attention_out="c_proj",
    ),
    Architecture(
        "gpt_neo",
        **_GPT,
        up="c_fc",
        down="c_proj",
        activation="activation_function",
        dropout="resid_dropout",
    ),
    Architecture(
        "gpt_neox",
        layers="layers",
        ffn="mlp",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="hidden_act",
        final_norm="final_layer_norm",
    ),
    Architecture(
        "gptj",
        **_GPT,
        up="fc_in",
        down="fc_out",
        activation="activation_function",
        dropout="resid_pdrop",
    ),
    Architecture("opt", **_FAIRSEQ, layers="decoder.layers", final_norm="decoder.final_layer_norm"),
    Architecture(
        "bloom",
        **_GPT,
        up="dense_h_to_4h",
        act="gelu_impl",
        down="dense_4h_to_h",
        split=True,
        guard=("n_head",),
        refuse=(("slow_but_exact", True),),
    ),
    Architecture(
        "falcon", **_GPT, up="dense_h_to_4h", down="dense_4h_to_h", activation="activation"
    ),
    Architecture(
        "phi",
        layers="layers",
        ffn="mlp",
        up="fc1",
        down="fc2",
        activation="hidden_act",
        final_norm="final_layernorm",
    ),
    Architecture("phi3", **_FUSED, ffn_norm="post_attention_layernorm", final_norm="norm"),
    Architecture("qwen2", **_GATED, **_READ),
    Architecture("qwen3", **_GATED, **_READ),
    Architecture("gemma", **_GATED, **_READ),
    Architecture("gemma2", **{**_GATED, "activation": "hidden_activation"}, **_POST_NORM),
    Architecture("gemma3_text", **{**_GATED, "activation": "hidden_activation"}, **_POST_NORM),
    Architecture(
        "gemma3",
        **{**_GATED, "layers": ("language_model.layers", "vision_tower.encoder.layers")},
        act="act_fn",
        guard=("text_config.hidden_activation",),
        variants=({"gate": None, "up": "fc1", "down": "fc2", "act": "activation_fn"},),
    ),
    Architecture(
        "starcoder2",
        layers="layers",
        ffn="mlp",
        up="c_fc",
        down="c_proj",
        activation="hidden_act",
        dropout="residual_dropout",
        **_READ,
    ),
    Architecture("stablelm", **_GATED, final_norm="norm"),
    Architecture("olmo", **_GATED, **_READ),
    Architecture("olmo2", **_GATED, **_POST_NORM),
    Architecture("olmo3", **_GATED, **_POST_NORM),
    Architecture("granite", **_GATED, **_POST_NORM),
    Architecture("cohere", **_GATED, **_POST_NORM),
    Architecture("cohere2", **_GATED, **_POST_NORM),
    Architecture("glm4", **_FUSED, final_norm="norm"),
    Architecture("smollm3", **_GATED, **_READ),
    Architecture("exaone4", **_GATED, **_POST_NORM),
    Architecture(
        "mpt",
        layers="blocks",
        ffn="ffn",
        up="up_proj",
        act="act",
        down="down_proj",
        split=True,
        guard=("n_heads",),
        final_norm="norm_f",
    ),
    Architecture("ministral", **_GATED, **_READ),
    Architecture(
        "nemotron",
        layers="layers",
        ffn="mlp",
        up="up_proj",
        down="down_proj",
        activation="hidden_act",
        **_READ,
    ),
    # Encoders.
    Architecture("bert", **_BERT, layers="encoder.layer"),
    Architecture("roberta", **_BERT, layers="encoder.layer"),
    Architecture("electra", **_BERT, layers="encoder.layer"),
    Architecture(
        "distilbert",
        layers="transformer.layer",
        ffn="ffn",
        up="lin1",
        down="lin2",
        activation="activation",
        dropout="dropout",
    ),
    Architecture(
        "albert",
        layers="encoder.albert_layer_groups.*.albert_layers",
        ffn="",
        up="ffn",
        act="activation",
        down="ffn_output",
        activation="hidden_act",
        split=True,
        shared=True,
    ),
    Architecture(
        "modernbert",
        layers="layers",
        ffn="mlp",
        up="Wi",
        gate_half=0,
        down="Wo",
        activation="hidden_activation",
        hidden_dropout="mlp_dropout",
    ),
    Architecture("vit", layers="layers", ffn="mlp", up="fc1", down="fc2", activation="hidden_act"),
    Architecture("clip_text_model", **_CLIP, layers="encoder.layers", guard=("hidden_act",)),
    Architecture("clip_vision_model", **_CLIP, layers="encoder.layers", guard=("hidden_act",)),
    Architecture(
        "clip",
        **_CLIP,
        layers=("text_model.encoder.layers", "vision_model.encoder.layers"),
        guard=("text_config.hidden_act", "vision_config.hidden_act"),
    ),
    # Encoders with decoders.
    Architecture(
        "t5",
        **_T5,
        ffn="layer.2.DenseReluDense",
        up="wi",
        variants=(
            {"ffn": "layer.1.DenseReluDense"},
            {"up": "wi_1", "gate": "wi_0"},
            {"up": "wi_1", "gate": "wi_0", "ffn": "layer.1.DenseReluDense"},
        ),
    ),
    Architecture("bart", **_BART),
    Architecture("whisper", **_BART),
    # Mixtures of experts.
    Architecture("mixtral", **_EXPERTS),
    Architecture("qwen3_moe", **_EXPERTS, variants=(_DENSE_BLOCK,)),
    Architecture("olmoe", **_EXPERTS),
)
