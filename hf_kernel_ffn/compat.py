"""Every private or changing fact of transformers that the package relies on, a function each.

When a new transformers moves one of them, this is the file to mend. The code that travels inside
checkpoints does not use it: that must load where this package is not installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import modeling_auto
from transformers.utils import logging
from transformers.utils.hub import cached_file

__all__ = [
    "WeightConverter",
    "WeightRenaming",
    "dot_natural_key",
    "find_cached_file",
    "find_class_names",
    "find_relative_imports",
    "find_unread_gguf_tensors",
    "forget_quantizer",
    "get_attention_implementation",
    "get_model_conversion_mapping",
    "get_tied_parameter_names",
    "hide_gguf_bar",
    "initialize_module",
    "list_hub_files",
    "make_gguf_options",
    "make_model_from_config",
    "rename_source_key",
    "run_with_cache",
    "set_activation_checkpointing",
    "set_attention_implementation",
]
# Passed on as they are, for want of a public counterpart: get_model_conversion_mapping,
# WeightConverter, WeightRenaming, dot_natural_key and rename_source_key say how from_pretrained
# renames and merges the tensors of a checkpoint, which a streamed conversion has to do too.

OLD_CACHE_NAME = "past_key_values"
"""The cache's argument and output field up to transformers 5.23; from 5.40 on it is gone."""
CACHE_NAME = (
    "cache"
    if any(field.name == "cache" for field in fields(CausalLMOutputWithPast))
    else OLD_CACHE_NAME
)
"""The cache's argument and output field in the installed transformers."""


def find_class_names(model_type: str) -> dict[str, str]:
    """Return the name of the stock class that every ``AutoModel…`` class has for ``model_type``.

    Reads ``_model_mapping``, of each Auto class and within it: the public ``MODEL_…_MAPPING``
    objects import every class that they are asked for.

    Returns:
        class names by names of Auto classes, in alphabetical order; empty if there are none.
    """
    names: dict[str, str] = {}
    for auto in sorted(name for name in vars(modeling_auto) if name.startswith("AutoModel")):
        mapping: Any = getattr(getattr(modeling_auto, auto), "_model_mapping", None)
        name = None if mapping is None else mapping._model_mapping.get(model_type)
        if isinstance(name, tuple):
            name = name[0]
        if name is not None:
            names[auto] = name
    return names


def find_cached_file(name: str, file: str) -> Path | None:
    """Return the path of one file of a model; None if the model has no such file.

    Uses ``_raise_exceptions_for_missing_entries``: without it a missing file and a missing model
    are one error.

    Args:
        name: of the model: a local folder or a hub id.
        file: its name in the model's folder.

    Raises:
        OSError: the hub knows no such model, or refuses it; offline that is None too.
    """
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def list_hub_files(name: str) -> list[str]:
    """Return the names of all files of the model ``name`` on its hub, folders with ``/``.

    Where the hub cannot be asked, those of the copy that was downloaded.
    """
    from huggingface_hub import HfApi

    try:
        return list(HfApi().list_repo_files(name))
    except Exception:  # offline, refused, no such repository: the cache may hold a copy
        config = find_cached_file(name, "config.json")
        if config is None:
            return []
        files = [path for path in config.parent.rglob("*") if path.is_file()]
        return [path.relative_to(config.parent).as_posix() for path in files]


def find_relative_imports(file: str | Path) -> list[Path]:
    """Return the files that the module in ``file`` imports relatively, directly or by others."""
    return [Path(path) for path in get_relative_import_files(str(file))]


def get_attention_implementation(config: PreTrainedConfig) -> str | None:
    """Return the name of the attention that a model with ``config`` uses: ``sdpa``, ``eager``…"""
    return config._attn_implementation


def set_attention_implementation(config: PreTrainedConfig, name: str | None) -> None:
    """Make models with ``config`` compute their attention by the implementation ``name``.

    Unlike ``PreTrainedModel.set_attn_implementation`` this takes back whatever was there before,
    None included.
    """
    config._attn_implementation = name


def find_unread_gguf_tensors(
    model: PreTrainedModel, architecture: str, names: Iterable[str]
) -> list[str]:
    """Return which tensors of a GGUF file transformers leaves out when it reads ``model`` from it.

    Its reader says nothing of them. Architectures with a reader of their own name what they miss.

    Args:
        architecture: of the file, as llama.cpp names it.
        names: of the tensors in it.
    """
    from transformers import modeling_gguf_pytorch_utils as reader

    if architecture in _find_own_gguf_readers():
        return []
    processor = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)()
    known = reader.get_gguf_hf_weights_map(model, processor)
    # Experts are known without the ending.
    return [name for name in names if not {name, name.removesuffix(".weight")} & known.keys()]


def _find_own_gguf_readers() -> set[str]:
    """Architectures of GGUF files that a newer reader of transformers serves, if there is one."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:
        return set()
    return set(GGUF_ARCHS)


def make_gguf_options() -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that make it unpack the weights of a GGUF file.

    Transformers 5.24 can keep some packed; older ones have no such setting, and unpack all.
    """
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def hide_gguf_bar() -> None:
    """Let ``transformers.logging.disable_progress_bar`` hide the bar of the reader of GGUF files.

    The reader takes its bar from tqdm itself, which does not know that setting.
    """
    from transformers import modeling_gguf_pytorch_utils as reader

    vars(reader)["tqdm"] = logging.tqdm


def forget_quantizer(model: PreTrainedModel) -> None:
    """Make a model that was dequantised while it was loaded one like any other.

    It may then be moved to other dtypes and saved.
    """
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for name in ("quantization_config", "_is_quantized"):
                vars(module.config).pop(name, None)


def make_model_from_config(
    model_class: type,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Make a model from ``config`` alone, in ``dtype``.

    Args:
        model_class: an Auto class, or a stock class, which has this under a private name only.
        trust_remote_code: whether code that the model brings may run.
    """
    stock_class: Any = model_class
    if hasattr(stock_class, "from_config"):
        return stock_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return stock_class._from_config(config, dtype=dtype)


def initialize_module(model: PreTrainedModel, module: nn.Module) -> None:
    """Fill the parameters and buffers of ``module`` in ``model`` as a new model has them."""
    model._init_weights(module)


def set_activation_checkpointing(model: PreTrainedModel, enable: bool) -> None:
    """Choose whether ``model`` computes its activations again in the backward pass.

    Otherwise it keeps them. ``gradient_checkpointing_*``, as they were called, are deprecated
    and go in transformers 6; 5.17 knows no other names.
    """
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enable:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()


def get_tied_parameter_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters that share another's memory: no checkpoint holds them."""
    return set(cast(Iterable[str], model.all_tied_weights_keys))


def run_with_cache(
    model: PreTrainedModel, input_ids: Tensor, cache: Cache | None
) -> tuple[Tensor, Cache | None]:
    """Run a language model over the tokens that follow those in ``cache``.

    The cache goes in and comes out under the name that the model has for it: one that brings its
    own code may still call it ``past_key_values``.

    Args:
        input_ids: (rows, length) int64.
        cache: what the call before returned; None at the start of a text.

    Returns:
        the logits (rows, length, vocabulary), and the cache for the next call; None if the model
        keeps none.
    """
    arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": True}
    if cache is not None:
        accepted = inspect.signature(model.forward).parameters
        is_old = OLD_CACHE_NAME in accepted and CACHE_NAME not in accepted
        arguments[OLD_CACHE_NAME if is_old else CACHE_NAME] = cache
    output = model(**arguments)
    return output.logits, getattr(output, CACHE_NAME, None)
