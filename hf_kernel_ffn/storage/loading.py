"""Teachers, students and tokenizers from a local folder or a hub id; whatever is wrong becomes one InputError."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from ..checkpoint_code import custom_kernel
from ..checkpoint_code.errors import InputError
from ..checkpoint_code.integrity import read_json
from ..checkpoint_code.modeling import KernelModelMixin
from ..families.registry import get_architecture
from ..families.task_classes import get_stock_heads, get_task_classes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def get_torch_dtype(name: str) -> torch.dtype:
    """The dtype called ``name``; InputError if it is none of float32, bfloat16, float16."""
    if name not in DTYPES:
        raise InputError(f"found dtype {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_teacher(
    name: str,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """The stock model at ``name``, with the head it is stored with, or as a causal language model if it has none; in eval mode. Its
    config remembers the dtype it is stored in. A family that transformers does not have needs ``trust_remote_code``."""
    entry = _stock_config(name)
    model, info = load_pretrained(
        _teacher_class(entry, name, trust_remote_code),
        name,
        trust_remote_code=trust_remote_code,
        dtype=get_torch_dtype(dtype),
        output_loading_info=True,
        use_safetensors=True,
    )
    lost = sorted(info["missing_keys"])
    if lost:
        raise InputError(
            f"found {len(lost)} tensors missing at {name}, the first {lost[0]!r}, expected a whole model: "
            "they would be random; copy it again"
        )
    return _move_to_device(model, device)


def load_stock_on_meta(name: str, dtype: str = "float32") -> Any:
    """The same model without its weights, on the meta device; of a family that transformers has."""
    kind, config = (
        _teacher_class(_stock_config(name), name, False),
        load_pretrained(AutoConfig, name),
    )
    with torch.device("meta"):
        make = kind.from_config if kind is AutoModelForCausalLM else kind._from_config
        model = make(config, dtype=get_torch_dtype(dtype))
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval()


def _stock_config(name: str) -> dict:
    """config.json of a stock model of a known family, in floating point; InputError if it is none."""
    entry = read_config(name)
    if entry.get("kernel_ffn") is not None:
        raise InputError(
            f"found {name} converted already, expected a stock model: give its teacher"
        )
    get_architecture(entry.get("model_type"))
    if entry.get("quantization_config") is not None:
        raise InputError(
            f"found quantised weights at {name}, expected floating-point ones: load the unquantised model"
        )
    return entry


def load_student(
    name: str,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """The converted model at ``name``, by this package's own classes: no code of the checkpoint runs unless its kernel is a
    user's own, which needs ``trust_remote_code``."""
    entry = read_config(name)
    if entry.get("kernel_ffn") is None:
        raise InputError(
            f"found {name} not converted, expected a kernel_ffn entry in its config: run hf-kernel-ffn convert"
        )
    kind, own = get_student_class(entry, name)
    if has_custom_kernel(name):
        own = "custom_kernel.py"
    if own:
        if not trust_remote_code:
            raise InputError(
                f"found code of its author's own at {name}: read {name}/{own}, then allow it by --trust-remote-code (in a recipe: trust_remote_code)"
            )
        auto = get_auto_class(entry, entry["architectures"][0])
        found = load_pretrained(
            auto,
            name,
            dtype=get_torch_dtype(dtype),
            trust_remote_code=True,
            output_loading_info=True,
        )
    else:
        found = load_pretrained(kind, name, dtype=get_torch_dtype(dtype), output_loading_info=True)
    model, info = found
    odd = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if odd and entry.get("quantization_config") is None:
        raise InputError(
            f"found {len(odd)} tensors missing or too many at {name}, the first {odd[0]!r}: the weights are not those of its "
            "config.json; copy or convert it again"
        )
    return _move_to_device(model, device)


def get_student_class(entry: dict, name: str) -> tuple[Any, str]:
    """This package's own class for the converted model at ``name`` with config.json ``entry``, and an empty string; of a family whose
    stock classes bring code of their own None, and the file that has it."""
    kernel_ffn = entry.get("kernel_ffn")
    family = kernel_ffn.get("family") if isinstance(kernel_ffn, dict) else None
    get_architecture(family)
    heads = entry.get("architectures")
    head = heads[0] if isinstance(heads, list) and heads and isinstance(heads[0], str) else ""
    if not get_stock_heads(str(family)):
        return None, f"modeling_kernel_{family}.py"
    kind = getattr(get_task_classes(str(family)), head, None)
    if not (
        isinstance(kind, type)
        and issubclass(kind, KernelModelMixin)
        and kind is not KernelModelMixin
    ):
        raise InputError(
            f"found class {head!r} at {name}, expected one of this package's: the checkpoint is damaged"
        )
    return kind, ""


def load_empty_teacher(name: str, trust_remote_code: bool = False) -> Any:
    """The stock model at ``name`` without its weights, on the meta device; it need not be of a known family."""
    entry = read_config(name)
    if entry.get("kernel_ffn") is not None:
        raise InputError(
            f"found {name} converted already, expected a stock model: give its teacher"
        )
    config = load_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)
    head = (entry.get("architectures") or [""])[0]
    with torch.device("meta"):
        if hasattr(transformers, head):
            return getattr(transformers, head)(config)
        auto = get_auto_class(entry, head) if entry.get("auto_map") else AutoModel
        return auto.from_config(config, trust_remote_code=trust_remote_code)


def get_auto_class(entry: dict, head: str) -> Any:
    """The Auto class that ``entry`` (of config.json) maps to the class ``head``; that for causal language models if none is."""
    autos = [
        auto
        for auto, ref in (entry.get("auto_map") or {}).items()
        if str(ref).rpartition(".")[2] == head
    ]
    return getattr(transformers, autos[0]) if autos else AutoModelForCausalLM


def _teacher_class(entry: dict, name: str, trust_remote_code: bool) -> Any:
    head = (entry.get("architectures") or [""])[0]
    heads = get_stock_heads(entry["model_type"])
    if heads:
        known = {stock for auto, stock in heads.items() if auto not in ("AutoConfig", "AutoModel")}
        return (
            getattr(transformers, head)
            if head in known or "AutoModelForCausalLM" not in heads
            else AutoModelForCausalLM
        )
    if not trust_remote_code:
        raise InputError(
            f"found a {entry['model_type']!r} at {name}, which brings its own code: read it, then allow it by --trust-remote-code"
        )
    return get_auto_class(entry, head)


def load_model(
    name: str,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """The model at ``name``, converted or stock."""
    if read_config(name).get("kernel_ffn") is None:
        return load_teacher(name, dtype, device, trust_remote_code)
    return load_student(name, dtype, device, trust_remote_code)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer at ``name``; no code of its author's runs."""
    return load_pretrained(
        AutoTokenizer, name, trust_remote_code=False
    )  # None would ask at the terminal about the model's code


def check_vocabularies(student: str, teacher: str) -> None:
    """InputError if the tokenizers at ``student`` and ``teacher`` have different tokens; a student may have none of its own."""
    try:
        file = cached_file(
            student, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False
        )
    except OSError:
        file = None
    if (
        file is not None
        and load_tokenizer(student).get_vocab() != load_tokenizer(teacher).get_vocab()
    ):
        raise InputError(
            f"found other tokens at {student} than at {teacher}, expected equal: give the student's own teacher"
        )


def read_stored_dtype(name: str) -> torch.dtype:
    """The dtype in which the model at ``name`` is stored; float32 if its config does not say."""
    dtype = (
        load_pretrained(AutoConfig, name).dtype
        if read_config(name).get("kernel_ffn") is None
        else None
    )
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def read_config(name: str) -> dict:
    """config.json at ``name`` as a mapping."""
    if Path(name).exists() and not Path(name, "config.json").is_file():
        raise InputError(
            f"found no config.json in {name}, expected the folder of a saved model: check the path"
        )
    try:
        file = cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        raise InputError(
            f"found no readable model at {name!r} ({_first_line(error)}): give a local folder or a hub id"
        ) from error
    return read_json(str(file))


def has_custom_kernel(name: str) -> bool:
    """Whether the checkpoint at ``name`` brings a kernel file of its author's own."""
    own = Path(custom_kernel.__file__).read_bytes()
    try:
        file = cached_file(name, "custom_kernel.py", _raise_exceptions_for_missing_entries=False)
    except OSError:
        file = None
    return file is not None and Path(file).read_bytes() != own


def import_kernel(kernel: str) -> str:
    """``FILE.py:NAME`` as the name of a kernel that the file has registered; a plain name as it is.

    Raises:
        InputError: the file does not exist, cannot be run, or registers no such kernel.
    """
    file, colon, name = kernel.rpartition(":")
    if not colon:
        return kernel
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise InputError(f"found no Python file {file!r}, expected FILE.py:NAME: check the path")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may fail in any way
        raise InputError(
            f"found {file} failing when run ({_first_line(error)}): repair it"
        ) from error
    return name


def load_pretrained(auto_class, name: str, **kwargs) -> Any:
    """``auto_class.from_pretrained(name, **kwargs)``; whatever goes wrong is an InputError."""
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except InputError:
        raise
    except Exception as error:  # the libraries raise many kinds for a damaged or absent checkpoint
        raise InputError(
            f"could not load {name} ({_first_line(error)}): check that it is complete"
        ) from error


def _move_to_device(model: Any, device: str | torch.device) -> Any:
    try:
        return model.to(device).eval()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # torch built without that device raises an AssertionError
        raise InputError(
            f"found device {str(device)!r} unusable ({_first_line(error)}): choose another"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
