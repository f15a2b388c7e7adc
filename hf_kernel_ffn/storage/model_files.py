"""What the files of a model say, in a local folder or on a hub, before anything is loaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.hub import cached_file

from ..checkpoint_code.errors import CheckpointError, InputError
from ..checkpoint_code.untrusted_files import read_json
from ..compat import find_cached_file, hide_gguf_bar
from ..families.registry import get_architecture
from ..families.task_classes import get_stock_heads
from .gguf_header import is_gguf, read_gguf_header

ADAPTER = "adapter_config.json"
"""The file by which an adapter of peft is known."""
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Ends of the names of files that nobody here reads."""
LANGUAGE_HEADS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
"""Which heads a model has whose file does not say: the first that its family has."""

Loaded = TypeVar("Loaded")


def read_config(name: str) -> dict[str, Any]:
    """Return config.json at ``name`` as a mapping; InputError if it cannot be read.

    Of a GGUF file it is what config.json would say.
    """
    if is_gguf(name):
        return _read_gguf_config(name)
    require_readable_files(Path(name))
    _refuse_adapters(name)
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


def require_readable_files(folder: Path) -> None:
    """InputError if ``folder``, where it is one, or a file of the model in it may not be read.

    Some of them are read, or copied beside a student, when all the work is done; and transformers
    goes on without others.
    """
    try:
        if not folder.is_dir():
            return
        paths = sorted(folder.iterdir())
        files = [path for path in paths if path.suffix not in PICKLES and path.is_file()]
    except OSError as error:
        raise InputError(
            f"found {folder} not readable ({error.strerror}), expected the folder of a saved "
            "model: give yourself the right to read it"
        ) from error
    for file in files:
        if not file.name.startswith(".") and not os.access(file, os.R_OK):
            raise InputError(
                f"found {file} not readable, expected every file of the model to be: give yourself "
                "the right to read it, or take it out of the folder"
            )


def _refuse_adapters(name: str) -> None:
    """InputError if there is an adapter at ``name``, which transformers would add to the model."""
    if find_file(name, ADAPTER) is not None:
        raise InputError(
            f"found an adapter at {name} ({ADAPTER}), expected a model without: merge it into its "
            "model by peft's merge_and_unload() and save that"
        )


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


def load_pretrained(from_pretrained: Callable[..., Loaded], name: str, **options: object) -> Loaded:
    """Return ``from_pretrained(name, **options)``; a GGUF file is read by transformers' reader.

    Raises:
        InputError: whatever goes wrong.
    """
    try:
        if not is_gguf(name):
            return from_pretrained(name, **options)
        read_gguf_header(name)  # says what is wrong with it
        return _load_gguf(from_pretrained, Path(name), options)
    except InputError:
        raise
    except Exception as error:  # the libraries raise many kinds for a damaged or absent checkpoint
        raise CheckpointError(
            f"could not load {name} ({first_line(error)}): check that it is complete"
        ) from error


def _load_gguf(
    from_pretrained: Callable[..., Loaded], file: Path, options: Mapping[str, object]
) -> Loaded:
    """Load from a GGUF ``file`` alone.

    It is read in a folder of its own: transformers would take a tokenizer's class from a
    tokenizer_config.json beside it, which may be another model's.
    """
    hide_gguf_bar()
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, file.name)
        link.symlink_to(file.absolute())
        return from_pretrained(folder, gguf_file=file.name, **options)


def _read_gguf_config(name: str) -> dict[str, Any]:
    """Return what a config.json of the model in the GGUF file ``name`` would say.

    Raises:
        InputError: it is no whole GGUF file, or of an architecture that transformers' reader does
            not know.
    """
    header = read_gguf_header(name)
    try:
        config = _load_gguf(AutoConfig.from_pretrained, Path(name), {})
    except Exception as error:  # ValueError, KeyError, …: whatever the reader stumbles over
        raise InputError(
            f"found a GGUF file of architecture {header.architecture!r} at {name} "
            f"({first_line(error)}), expected one that transformers reads, such as 'llama', "
            "'qwen3' or 'gemma3': convert the model from its safetensors"
        ) from error
    entry = config.to_dict()
    heads = get_stock_heads(str(entry.get("model_type")))
    if not entry.get("architectures"):
        entry["architectures"] = [heads[auto] for auto in LANGUAGE_HEADS if auto in heads][:1]
    entry.pop("quantization_config", None)  # of the file, not of the model that is read
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
    except (OSError, ValueError):  # the latter: what is no name of a model
        return None


def first_line(error: BaseException) -> str:
    """Return the first line of the message of ``error``, or its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
