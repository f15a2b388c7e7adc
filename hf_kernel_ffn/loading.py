"""Teachers, students and tokenizers from a local folder or a hub id; whatever is wrong becomes one InputError."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from .architectures import ARCHITECTURES
from .errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called ``name``; InputError if it is none of float32, bfloat16, float16."""
    if name not in DTYPES:
        raise InputError(f"found dtype {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_teacher(name: str, dtype: str = "float32", device: str | torch.device = "cpu") -> Any:
    """The stock causal language model at ``name``, in eval mode. Its config remembers the dtype it is stored in."""
    require_stock(name)
    model, info = _loaded(AutoModelForCausalLM, name, dtype=torch_dtype(dtype), output_loading_info=True)
    lost = sorted(info["missing_keys"])
    if lost:
        raise InputError(
            f"found {len(lost)} tensors missing at {name}, the first {lost[0]!r}, expected a whole causal language model: "
            "they would be random; copy it again"
        )
    return _placed(model, device)


def load_stock_on_meta(name: str) -> Any:
    """The same model without weights, on the meta device."""
    require_stock(name)
    config = _loaded(AutoConfig, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval()


def require_stock(name: str) -> None:
    """InputError unless the model at ``name`` is a stock one of a known family, in floating point."""
    entry = read_config(name)
    if entry.get("kernel_ffn") is not None:
        raise InputError(f"found {name} converted already, expected a stock model: give its teacher")
    if entry.get("model_type") not in ARCHITECTURES:
        raise InputError(
            f"found model type {entry.get('model_type')!r} at {name}, expected one of {', '.join(ARCHITECTURES)}: "
            "describe yours by hf_kernel_ffn.register_architecture(Architecture(...))"
        )
    if entry.get("quantization_config") is not None:
        raise InputError(f"found quantised weights at {name}, expected floating-point ones: load the unquantised model")


def load_student(name: str, dtype: str = "float32", device: str | torch.device = "cpu", trust_remote_code: bool = False) -> Any:
    """The converted model at ``name``, by this package's own classes: no code of the checkpoint runs unless its kernel is a
    user's own, which needs ``trust_remote_code``."""
    entry = read_config(name)
    if entry.get("kernel_ffn") is None:
        raise InputError(f"found {name} not converted, expected a kernel_ffn entry in its config: run hf-kernel-ffn convert")
    family = entry["kernel_ffn"].get("family") if isinstance(entry["kernel_ffn"], dict) else None
    if family not in ARCHITECTURES:
        raise InputError(f"found family {family!r} at {name}, expected one of {', '.join(ARCHITECTURES)}")
    if has_custom_kernel(name):
        if not trust_remote_code:
            raise InputError(
                f"found a kernel of its author's own at {name}: read {name}/custom_kernel.py, then allow it by --trust-remote-code (in a recipe: trust_remote_code)"
            )
        return _placed(_loaded(AutoModelForCausalLM, name, dtype=torch_dtype(dtype), trust_remote_code=True), device)
    module = importlib.import_module(ARCHITECTURES[family].modeling)
    head = (entry.get("architectures") or [""])[0]
    if not hasattr(module, head):
        raise InputError(f"found class {head!r} at {name}, expected one of this package's: the checkpoint is damaged")
    return _placed(_loaded(getattr(module, head), name, dtype=torch_dtype(dtype)), device)


def load_model(name: str, dtype: str = "float32", device: str | torch.device = "cpu", trust_remote_code: bool = False) -> Any:
    """The model at ``name``, converted or stock."""
    if read_config(name).get("kernel_ffn") is None:
        return load_teacher(name, dtype, device)
    return load_student(name, dtype, device, trust_remote_code)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer at ``name``; no code of its author's runs."""
    return _loaded(AutoTokenizer, name, trust_remote_code=False)  # None would ask at the terminal about the model's code


def check_vocabularies(student: str, teacher: str) -> None:
    """InputError if the tokenizers at ``student`` and ``teacher`` have different tokens; a student may have none of its own."""
    try:
        file = cached_file(student, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        file = None
    if file is not None and load_tokenizer(student).get_vocab() != load_tokenizer(teacher).get_vocab():
        raise InputError(f"found other tokens at {student} than at {teacher}, expected equal: give the student's own teacher")


def stored_dtype(name: str) -> torch.dtype:
    """The dtype in which the model at ``name`` is stored; float32 if its config does not say."""
    dtype = _loaded(AutoConfig, name).dtype if read_config(name).get("kernel_ffn") is None else None
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def read_config(name: str) -> dict:
    """config.json at ``name`` as a mapping."""
    if Path(name).exists() and not Path(name, "config.json").is_file():
        raise InputError(f"found no config.json in {name}, expected the folder of a saved model: check the path")
    try:
        file = cached_file(name, "config.json")
        entry = json.loads(Path(str(file)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"found no readable model at {name!r} ({_first_line(error)}): give a local folder or a hub id"
        ) from error
    if not isinstance(entry, dict):
        raise InputError(f"found a {type(entry).__name__} in {name}/config.json, expected a mapping: the checkpoint is damaged")
    return entry


def has_custom_kernel(name: str) -> bool:
    """Whether the checkpoint at ``name`` brings a kernel file of its author's own."""
    own = Path(__file__).with_name("custom_kernel.py").read_bytes()
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
        raise InputError(f"found {file} failing when run ({_first_line(error)}): repair it") from error
    return name


def _loaded(auto_class, name: str, **kwargs) -> Any:
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except InputError:
        raise
    except Exception as error:  # the libraries raise many kinds for a damaged or absent checkpoint
        raise InputError(f"could not load {name} ({_first_line(error)}): check that it is complete") from error


def _placed(model: Any, device: str | torch.device) -> Any:
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # torch built without that device raises an AssertionError
        raise InputError(f"found device {str(device)!r} unusable ({_first_line(error)}): choose another") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
