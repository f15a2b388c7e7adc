"""The class by which a model is loaded, as its config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from ..checkpoint_code.errors import CheckpointError, InputError
from ..checkpoint_code.modeling import KernelModelMixin
from ..compat import get_tied_parameter_names, make_model_from_config
from ..families.registry import get_architecture
from ..families.task_classes import get_stock_heads, get_task_classes
from .gguf_header import is_gguf
from .model_files import get_auto_class, load_pretrained

if TYPE_CHECKING:
    from ..families.student import ConvertedModel


def get_student_class(
    entry: Mapping[str, Any], name: str
) -> tuple[type[ConvertedModel] | None, str]:
    """Return this package's own class for the converted model at ``name``.

    Args:
        entry: its config.json.

    Returns:
        the class, and an empty string; of a family whose stock classes bring code of their own
        None, and the file that has it.

    Raises:
        InputError: the family is unknown, or the class is none of this package's.
    """
    kernel_ffn = entry.get("kernel_ffn")
    family = kernel_ffn.get("family") if isinstance(kernel_ffn, dict) else None
    get_architecture(family)
    if not get_stock_heads(str(family)):
        return None, f"modeling_kernel_{family}.py"

    heads = entry.get("architectures")
    head = heads[0] if isinstance(heads, list) and heads else None
    head = head if isinstance(head, str) else ""
    student_class = getattr(get_task_classes(str(family)), head, None)
    if not _is_student_class(student_class):
        raise CheckpointError(
            f"found class {head!r} at {name}, expected one of this package's: "
            "the checkpoint is damaged"
        )
    return cast("type[ConvertedModel]", student_class), ""


def get_teacher_class(entry: Mapping[str, Any], name: str, trust_remote_code: bool) -> type[Any]:
    """Return the class, or Auto class, by which the stock model at ``name`` is loaded.

    Raises:
        InputError: it brings its own code, which is not trusted.
    """
    head = (entry.get("architectures") or [""])[0]
    heads = get_stock_heads(entry["model_type"])
    if heads:
        task_heads = {
            stock for auto, stock in heads.items() if auto not in ("AutoConfig", "AutoModel")
        }
        if head in task_heads or "AutoModelForCausalLM" not in heads:
            return getattr(transformers, head)
        is_bare = head == heads.get("AutoModel")
        if is_bare and not is_gguf(name) and not _has_head_in_embedding(name):
            return getattr(transformers, head)
        return AutoModelForCausalLM

    if not trust_remote_code:
        raise InputError(
            f"found a {entry['model_type']!r} at {name}, which brings its own code: "
            "read it, then allow it by --trust-remote-code (in a recipe: trust_remote_code)"
        )
    return get_auto_class(entry, head)


def _has_head_in_embedding(name: str) -> bool:
    """Return whether a causal language model of the bare one at ``name`` has no weight more."""
    config = load_pretrained(AutoConfig.from_pretrained, name)
    if config.is_encoder_decoder:
        return False  # the causal model is half of it
    with torch.device("meta"):
        model = make_model_from_config(AutoModelForCausalLM, config, torch.float32)
    body = f"{model.base_model_prefix}."
    head = {key for key, _ in model.named_parameters() if not key.startswith(body)}
    return head <= get_tied_parameter_names(model)


def _is_student_class(candidate: object) -> bool:
    """Return whether ``candidate`` is one of this package's model classes."""
    if not isinstance(candidate, type) or candidate is KernelModelMixin:
        return False
    return issubclass(candidate, KernelModelMixin)
