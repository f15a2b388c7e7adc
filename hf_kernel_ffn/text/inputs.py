"""What a model reads: token ids, images, sounds, or several of them together."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

Inputs = Tensor | Mapping[str, Tensor]
"""A model's main input, (rows, …), or every argument by name.

Labels among the arguments are no input: whoever compares the outputs with them takes them out.
"""
OTHER_TOKENS = 256
"""How many tokens a row counts for that is not token ids: an image, a sound."""
RANDOM_LENGTH = 128
"""Token ids in a row of random inputs, at most, as in text that a model writes itself."""
LONGEST_ROW_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""What configs call the tokens that a row may have: most of them, MPT's and Whisper's."""
FEWEST_RANDOM_ROWS = 4
"""Rows of random inputs at least: three are fitted on, and one is held out."""


def count_rows(inputs: Inputs) -> int:
    """Return how many rows there are."""
    if isinstance(inputs, Tensor):
        return len(inputs)
    return len(next(iter(inputs.values())))


def select_rows(inputs: Inputs, which: slice | Tensor) -> Inputs:
    """Return the rows ``which``, a slice or an index."""
    if isinstance(inputs, Tensor):
        return inputs[which]
    return {name: tensor[which] for name, tensor in inputs.items()}


def tokens_per_row(inputs: Inputs) -> int:
    """Return how many tokens a row counts for."""
    if not isinstance(inputs, Tensor):
        return max(tokens_per_row(tensor) for tensor in inputs.values())
    return inputs.shape[1] if inputs.ndim == 2 else OTHER_TOKENS


def find_longest_row(model: PreTrainedModel) -> int | None:
    """Return how many tokens a row may have for ``model``; None: any number."""
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in LONGEST_ROW_NAMES)
    limit = next((limit for limit in limits if limit), None)
    if limit is None:
        return None
    # RoBERTa counts positions from behind the padding token's number.
    for name, module in model.named_modules():
        is_table = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if is_table and module.padding_idx is not None:
            return cast(int, min(limit, module.num_embeddings - module.padding_idx - 1))
    return cast(int, limit)


def make_forward_arguments(
    model: nn.Module, inputs: Inputs, device: torch.device | None = None
) -> dict[str, Any]:
    """Return the arguments for a forward pass of ``model`` over ``inputs``.

    A decoder that is given no ids of its own reads those of the encoder, or its start token.

    Args:
        model: with or without a head.
        device: where to put them; None: where the model is. A model that device_map has spread
            moves them by itself.
    """
    pretrained = cast(PreTrainedModel, model)
    named: dict[str, Any]
    if isinstance(inputs, Tensor):
        named = {_name_main_input(pretrained): inputs}
    else:
        named = dict(inputs)
    named.pop("labels", None)

    config = pretrained.config
    needs_decoder_ids = config.is_encoder_decoder and "decoder_input_ids" not in named
    if needs_decoder_ids and accepts_argument(model, "decoder_input_ids"):
        named["decoder_input_ids"] = _make_decoder_ids(config, named, count_rows(inputs))

    device = device or next(model.parameters()).device
    if device.type != "meta" and not hasattr(model, "hf_device_map"):
        named = {name: tensor.to(device) for name, tensor in named.items()}
    if accepts_argument(model, "use_cache"):
        named["use_cache"] = False
    return named


def accepts_argument(model: nn.Module, argument: str) -> bool:
    """Return whether the forward pass of ``model`` takes ``argument``."""
    return argument in signature(model.forward).parameters


def make_random_inputs(model: PreTrainedModel, tokens: int, seed: int) -> Inputs:
    """Return random inputs for a model that cannot write any.

    Token ids are uniform, images and sounds normally distributed.

    Args:
        tokens: how many, at least, they count for.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    text_config = getattr(config, "text_config", config)
    length = min(RANDOM_LENGTH, find_longest_row(model) or RANDOM_LENGTH)

    names = choose_input_names(model)
    count = max(FEWEST_RANDOM_ROWS, tokens // (length if names == {"input_ids"} else OTHER_TOKENS))

    inputs: dict[str, Tensor] = {}
    if "input_ids" in names:
        inputs["input_ids"] = torch.randint(
            text_config.vocab_size, (count, length), generator=generator
        )
    if "pixel_values" in names:
        shape = _get_image_shape(getattr(config, "vision_config", config))
        inputs["pixel_values"] = torch.randn(count, *shape, generator=generator)
    if "input_features" in names:
        frames = 2 * config.max_source_positions  # the first convolutions halve them
        inputs["input_features"] = torch.randn(
            count, config.num_mel_bins, frames, generator=generator
        )
    if config.is_encoder_decoder and accepts_argument(model, "decoder_input_ids"):
        inputs["decoder_input_ids"] = torch.randint(
            config.vocab_size, (count, length), generator=generator
        )
    return inputs


def _name_main_input(model: PreTrainedModel) -> str:
    """Return the argument that takes the main input of ``model``.

    A wrapper of a decoder alone, such as the base model of a WhisperForCausalLM, inherits the name
    of the encoder's, and takes token ids.
    """
    name = model.main_input_name
    takes_anything = any(
        parameter.kind is Parameter.VAR_KEYWORD
        for parameter in signature(model.forward).parameters.values()
    )
    is_inherited = takes_anything and not accepts_argument(model, name)
    return "input_ids" if is_inherited else name


def _make_decoder_ids(config: PreTrainedConfig, named: Mapping[str, Tensor], rows: int) -> Tensor:
    """Return the encoder's ids, or (rows, 1) start tokens where that reads something else."""
    if "input_ids" in named:
        return named["input_ids"]
    start = getattr(config, "decoder_start_token_id", None) or 0
    return torch.full((rows, 1), start)


def choose_input_names(model: PreTrainedModel) -> set[str]:
    """Return which of token ids, images and sounds ``model`` needs."""
    accepted = signature(model.forward).parameters
    names = {"input_ids", "pixel_values", "input_features"} & {*accepted}
    # A language model that may be shown an image is given text alone; one with a projection of
    # both to one width, such as CLIP, compares the two.
    is_language_model = model.main_input_name == "input_ids"
    compares_both = hasattr(model.config, "projection_dim")
    if names == {"input_ids", "pixel_values"} and is_language_model and not compares_both:
        return {"input_ids"}
    return names


def _get_image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model with ``config`` reads."""
    vision: Any = config
    size = vision.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return vision.num_channels, height, width
