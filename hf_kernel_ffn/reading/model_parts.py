"""The parts of a model that a reading needs, by the names that the table of families has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeGuard, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.record import ReadableFFN, Readout
from ..checkpoint_code.tied import TiedKernelFFN
from ..families.hooks import capture_inputs_and_outputs
from ..families.lookup import find_ffn_paths, find_stock_ffn, get_family_name
from ..families.registry import get_architecture
from ..families.table import Architecture
from ..families.weights import read_stock_weights, read_teacher_readout
from ..text.inputs import make_forward_arguments
from ..text.prediction import require_text_input

READING_PARTS = ("attention", "qkv", "attention_out", "final_norm")
"""What an entry of the table has to name for a pass to be read, and graphs to be made."""


@runtime_checkable
class _HasKernel(ReadableFFN, Protocol):
    """What a kernel readout has beside a record; a checkpoint's own code has its own class."""

    def scores(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]: ...

    def kernel_parameters(self) -> dict[str, Tensor]: ...


def is_kernel_ffn(ffn: object) -> TypeGuard[KernelFFN]:
    """Whether ``ffn`` is a kernel readout, of this package's class or of one a checkpoint
    brought."""
    return isinstance(ffn, _HasKernel)


def has_tied_rows(ffn: object) -> TypeGuard[TiedKernelFFN]:
    """Whether ``ffn`` is a readout whose rows are tied to the teacher's units."""
    settings = getattr(getattr(ffn, "config", None), "settings", None)
    return isinstance(ffn, ReadableFFN) and getattr(settings, "rows", "free") == "tied"


def get_family(model: PreTrainedModel) -> Architecture:
    """The table's entry for a stock or converted ``model``; InputError if there is none."""
    return get_architecture(get_family_name(model))


def get_described(model: PreTrainedModel, part: str) -> str:
    """The name that the table's entry for ``model`` has for ``part`` (attention, final_norm, …).

    Raises:
        InputError: the entry says nothing of it.
    """
    family = get_family(model)
    _require_described(family, part)
    return cast(str, getattr(family, part))


def require_readable_family(entry: Mapping[str, object]) -> None:
    """InputError if the table does not name what a reading needs of the model that ``entry``, of
    config.json, describes: before any weight is loaded."""
    converted = entry.get("kernel_ffn")
    name = converted.get("family") if isinstance(converted, Mapping) else entry.get("model_type")
    family = get_architecture(str(name))
    for part in READING_PARTS:
        _require_described(family, part)


def _require_described(family: Architecture, part: str) -> None:
    """InputError if the entry ``family`` says nothing of ``part``."""
    if getattr(family, part) is None:
        raise InputError(
            f"found nothing on {part} in the entry for {family.model_type!r}, expected it for this "
            "reading: give it in the Architecture, if the family has such a part; evaluate, and "
            "output_readouts in Python, read the FFNs without it"
        )


def get_qkv_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The projections to queries, keys and values, or the one that stacks them.

    InputError as :func:`get_described`.
    """
    return cast(tuple[str, ...], get_described(model, "qkv"))


def get_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of a ``model`` with one stack of them, in order."""
    layers = cast(str, get_family(model).layers)
    return list(model.base_model.get_submodule(layers).children())


def get_attention(model: PreTrainedModel, layer: int) -> nn.Module:
    """The attention module of block ``layer``."""
    return get_blocks(model)[layer].get_submodule(get_described(model, "attention"))


def get_qkv_weights(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value projection of block ``layer``, (heads · head_dim, hidden_size) each."""
    attention = get_attention(model, layer)
    weights = [
        get_projection_weight(attention.get_submodule(name)) for name in get_qkv_names(model)
    ]
    query, key, value = weights[0].chunk(3) if len(weights) == 1 else weights
    return query, key, value


def get_output_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """The projection that mixes the heads of block ``layer``."""
    return get_attention(model, layer).get_submodule(get_described(model, "attention_out"))


def get_projection_weight(linear: nn.Module) -> Tensor:
    """(out, in) of a ``Linear`` or ``Conv1D``."""
    weight = cast(Tensor, linear.weight).detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def count_key_value_heads(model: PreTrainedModel) -> int:
    """How many heads have keys and values of their own."""
    config = model.config
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def get_final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm before the unembedding."""
    return model.base_model.get_submodule(get_described(model, "final_norm"))


def get_embedding_weight(model: PreTrainedModel) -> Tensor:
    """(vocabulary, hidden_size): the token embeddings, as the model's table has them."""
    return cast(Tensor, model.get_input_embeddings().weight).detach()


def get_unembedding(model: PreTrainedModel) -> Tensor:
    """(vocabulary, hidden_size): rows are what the logits read off the normalised final state."""
    head = cast(nn.Module, model.get_output_embeddings())
    return cast(Tensor, head.weight).detach()


def get_unembedding_bias(model: PreTrainedModel) -> Tensor | None:
    """(vocabulary,) what the unembedding adds to the logits; None if nothing."""
    return getattr(model.get_output_embeddings(), "bias", None)


def list_ffn_paths(model: PreTrainedModel) -> list[str]:
    """Path of every FFN under the base model, in layer order."""
    return find_ffn_paths(model, get_family(model))


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ``ids``."""
    return cast(str, tokenizer.decode(ids))


def get_layer_number(path: str) -> int:
    """The number in an FFN's path."""
    return next(int(part) for part in path.split(".") if part.isdigit())


def ffn_readout(model: PreTrainedModel, path: str, inputs: Tensor) -> Readout:
    """Read the FFN at ``path`` (under the base model) at its ``inputs`` (..., hidden_size),
    whatever stands there.

    That is a kernel readout, the teacher's own FFN, or another :class:`ReadableFFN`.
    """
    ffn = find_ffn_module(model, path)
    if isinstance(ffn, ReadableFFN):
        return ffn.readout(inputs)
    return read_teacher_readout(read_stock_weights(model, find_stock_ffn(model, path)), inputs)


def read_dictionary(model: PreTrainedModel, path: str) -> Readout:
    """The record of the FFN at ``path`` at a zero input: for its dictionary and names."""
    size = getattr(getattr(find_ffn_module(model, path), "config", None), "hidden_size", None)
    if size is None:
        size = read_stock_weights(model, find_stock_ffn(model, path)).up.shape[1]
    return ffn_readout(model, path, get_embedding_weight(model).new_zeros(1, size))


def find_ffn_module(model: PreTrainedModel, path: str) -> nn.Module | None:
    """The module at ``path`` under the base model.

    None for an expert of a stock mixture, which is a part of the mixture's tensors; InputError if
    there is nothing.
    """
    try:
        return model.base_model.get_submodule(path)
    except AttributeError:
        find_stock_ffn(model, path)
        return None


@torch.no_grad()
def read_row_inputs(model: PreTrainedModel, paths: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """(rows, length, hidden_size) what each of the FFNs at ``paths`` reads when ``model`` reads
    ``ids`` (rows, length).

    Raises:
        InputError: an FFN is a mixture's expert, to which rows do not come whole, or several layers
            share it; or the model reads no text.
    """
    require_text_input(model)
    shapes = list(get_family(model).shapes())
    for path in paths:
        is_expert = path.rpartition(".")[2].isdigit() and any(shape.experts for shape in shapes)
        if is_expert or any(shape.shared for shape in shapes):
            kind = "a mixture's expert" if is_expert else "an FFN that several layers share"
            raise InputError(
                f"found {kind} at {path}, expected FFNs that read every token once: read it by "
                "output_readouts"
            )
    base = model.base_model
    modules = {path: base.get_submodule(path) for path in paths}
    with capture_inputs_and_outputs(modules) as captured:
        base(**make_forward_arguments(base, ids))
    return {path: captured[path][0] for path in paths}
