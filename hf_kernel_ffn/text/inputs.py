"""What a model reads, whatever that is: token ids, images, sounds, or several of them together."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor

Inputs = Tensor | Mapping[str, Tensor]
"""Of a model's main input, (rows, …), or of every argument by name; labels among them are for whoever compares with them."""
OTHER_TOKENS = 256
"""A row that is not token ids (an image, a sound) counts for so many tokens."""


def count_rows(inputs: Inputs) -> int:
    """How many rows there are."""
    return len(inputs) if isinstance(inputs, Tensor) else len(next(iter(inputs.values())))


def select_rows(inputs: Inputs, which: Any) -> Inputs:
    """The rows ``which``, a slice or an index."""
    return (
        inputs[which]
        if isinstance(inputs, Tensor)
        else {name: tensor[which] for name, tensor in inputs.items()}
    )


def tokens_per_row(inputs: Inputs) -> int:
    """How many tokens a row counts for."""
    if not isinstance(inputs, Tensor):
        return max(tokens_per_row(tensor) for tensor in inputs.values())
    return inputs.shape[1] if inputs.ndim == 2 else OTHER_TOKENS


def make_forward_arguments(model: Any, inputs: Inputs, device: Any = None) -> dict[str, Any]:
    """Arguments for a forward pass of ``model`` over ``inputs``, on ``device`` (None: the model's own; one that
    device_map has spread moves them by itself); a decoder without ids of its own reads those of the encoder, or its start token."""
    named = {model.main_input_name: inputs} if isinstance(inputs, Tensor) else dict(inputs)
    named.pop("labels", None)
    if (
        model.config.is_encoder_decoder
        and "decoder_input_ids" not in named
        and accepts_argument(model, "decoder_input_ids")
    ):
        ids = named.get("input_ids")
        start = getattr(model.config, "decoder_start_token_id", None) or 0
        named["decoder_input_ids"] = (
            torch.full((count_rows(inputs), 1), start) if ids is None else ids
        )
    device = device or next(model.parameters()).device
    if device.type != "meta" and not hasattr(model, "hf_device_map"):
        named = {name: tensor.to(device) for name, tensor in named.items()}
    return named | ({"use_cache": False} if accepts_argument(model, "use_cache") else {})


def accepts_argument(model: Any, argument: str) -> bool:
    """Whether the forward pass of ``model`` takes ``argument``."""
    return argument in signature(model.forward).parameters


def make_random_inputs(model: Any, tokens: int, seed: int) -> Inputs:
    """Random inputs for a model that cannot write any: uniform token ids, normally distributed images and sounds."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    made: dict[str, Tensor] = {}
    text = getattr(config, "text_config", config)
    limit = getattr(text, "max_position_embeddings", None) or 128
    length = min(128, limit)
    names = {"input_ids", "pixel_values", "input_features"} & {*signature(model.forward).parameters}
    if (
        names == {"input_ids", "pixel_values"}
        and model.main_input_name == "input_ids"
        and not hasattr(config, "projection_dim")
    ):
        names = {"input_ids"}  # a language model that may be shown an image
    count = max(4, tokens // (length if names == {"input_ids"} else OTHER_TOKENS))
    if "input_ids" in names:
        made["input_ids"] = torch.randint(text.vocab_size, (count, length), generator=generator)
    if "pixel_values" in names:
        vision = getattr(config, "vision_config", config)
        size = (
            vision.image_size
            if isinstance(vision.image_size, (tuple, list))
            else (vision.image_size,) * 2
        )
        made["pixel_values"] = torch.randn(count, vision.num_channels, *size, generator=generator)
    if "input_features" in names:
        made["input_features"] = torch.randn(
            count, config.num_mel_bins, 2 * config.max_source_positions, generator=generator
        )
    if config.is_encoder_decoder and accepts_argument(model, "decoder_input_ids"):
        made["decoder_input_ids"] = torch.randint(
            config.vocab_size, (count, min(length, 128)), generator=generator
        )
    return made
