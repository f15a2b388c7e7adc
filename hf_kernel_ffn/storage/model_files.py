"""What the files of a model say, in a local folder or on a hub, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM
from transformers.utils.hub import cached_file

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.untrusted_files import read_json
from ..compat import find_cached_file
from ..families.registry import get_architecture


def read_config(name: str) -> dict[str, Any]:
    """Return config.json at ``name`` as a mapping; InputError if it cannot be read."""
    if Path(name).exists() and not Path(name, "config.json").is_file():
        raise InputError(
            f"found no config.json in {name}, expected the folder of a saved model: check the path"
        )
    try:
        file = cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        raise InputError(
            f"found no readable model at {name!r} ({first_line(error)}): "
            "give a local folder or a hub id"
        ) from error
    return read_json(str(file))


def read_unconverted_config(name: str) -> dict[str, Any]:
    """Return config.json of a model that is not converted; InputError if it is."""
    entry = read_config(name)
    if entry.get("kernel_ffn") is not None:
        raise InputError(
            f"found {name} converted already, expected a stock model: give its teacher"
        )
    return entry


def read_stock_config(name: str) -> dict[str, Any]:
    """Return config.json of a stock model of a known family, in floating point.

    Raises:
        InputError: it is none.
    """
    entry = read_unconverted_config(name)
    get_architecture(entry.get("model_type"))
    if entry.get("quantization_config") is not None:
        raise InputError(
            f"found quantised weights at {name}, expected floating-point ones: "
            "load the unquantised model"
        )
    return entry


def get_auto_class(entry: Mapping[str, Any], head: str) -> type[Any]:
    """Return the Auto class that ``entry`` (of config.json) maps to the class ``head``.

    That of causal language models if it maps none to it.
    """
    auto_map: Mapping[str, object] = entry.get("auto_map") or {}
    for auto, reference in auto_map.items():
        if str(reference).rpartition(".")[2] == head:
            return getattr(transformers, auto)
    return AutoModelForCausalLM


def find_file(name: str, file: str) -> Path | None:
    """Return the path of one ``file`` of the model ``name``, or None."""
    try:
        return find_cached_file(name, file)
    except OSError:
        return None


def first_line(error: BaseException) -> str:
    """Return the first line of the message of ``error``, or its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
