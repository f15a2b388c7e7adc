"""Teachers, students and tokenizers from a local folder, a GGUF file or a hub id.

Whatever is wrong with them becomes one InputError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..checkpoint_code.errors import CheckpointError, InputError
from ..compat import (
    find_unread_gguf_tensors,
    forget_quantizer,
    make_gguf_options,
    make_model_from_config,
)
from ..families.task_classes import get_stock_heads
from .gguf_header import is_gguf, read_gguf_header
from .kernel_files import CUSTOM_KERNEL, has_custom_kernel
from .model_classes import get_student_class, get_teacher_class
from .model_files import (
    find_file,
    first_line,
    get_auto_class,
    load_pretrained,
    read_config,
    read_stock_config,
    read_unconverted_config,
)

if TYPE_CHECKING:
    from ..families.student import ConvertedModel

Place = str | os.PathLike[str]
"""A local folder or file, or a hub id."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights may be computed with, by name."""


def get_torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the dtype called ``name``, which may be one; InputError if it is none of
    ``DTYPES``."""
    if name in DTYPES.values():
        return cast(torch.dtype, name)
    if name not in DTYPES:
        raise InputError(f"found dtype {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[cast(str, name)]


def load_teacher(
    name: Place,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the stock model at ``name``.

    It has the head it is stored with. One that is stored without a head has that of a causal
    language model where that is all in the embedding, else none. Its config remembers the dtype it
    is stored in. The weights of a GGUF file are dequantised.

    Args:
        name: local folder, local file that ends in .gguf, or hub id.
        trust_remote_code: needed for a family that transformers does not have.

    Returns:
        the model, in eval mode.

    Raises:
        InputError: there is no such model, it is converted, quantised, incomplete or of no known
            family, or the device is unusable.
    """
    name = os.fspath(name)
    entry = read_stock_config(name)
    options = make_gguf_options() if is_gguf(name) else {"use_safetensors": True}
    model, missing, _ = _load_model_and_check_keys(
        get_teacher_class(entry, name, trust_remote_code),
        name,
        trust_remote_code=trust_remote_code,
        dtype=get_torch_dtype(dtype),
        **options,
    )
    if missing:
        raise CheckpointError(
            f"found {len(missing)} tensors missing at {name}, the first {missing[0]!r}, "
            "expected a whole model: they would be random; copy it again"
        )
    if is_gguf(name):
        _finish_gguf(model, name)
    return _move_to_device(model, device)


def load_stock_on_meta(
    name: str, dtype: str = "float32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load the stock model at ``name`` without its weights, on the meta device.

    Raises:
        InputError: as :func:`load_teacher`; the weights must be safetensors.
    """
    if is_gguf(name):
        raise InputError(
            f"found the GGUF file {name} for a streamed conversion, expected a folder of "
            "safetensors: leave out --stream"
        )
    model_class = get_teacher_class(read_stock_config(name), name, trust_remote_code)
    config = load_pretrained(AutoConfig.from_pretrained, name, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = make_model_from_config(
            model_class, config, get_torch_dtype(dtype), trust_remote_code
        )
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval()


def load_empty_teacher(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a stock model of whatever family without its weights, on the meta device.

    Raises:
        InputError: there is no such model, it is converted, or its config cannot be read.
    """
    entry = read_unconverted_config(name)
    config = load_pretrained(AutoConfig.from_pretrained, name, trust_remote_code=trust_remote_code)
    head = (entry.get("architectures") or [""])[0]
    with torch.device("meta"):
        if hasattr(transformers, head):
            return getattr(transformers, head)(config)
        auto_class = get_auto_class(entry, head) if entry.get("auto_map") else AutoModel
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)


def load_student(
    name: Place,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> ConvertedModel:
    """Load the converted model at ``name`` by this package's own classes.

    Args:
        trust_remote_code: needed if its kernel is a user's own, or its family one that transformers
            does not have. Without it no code of the checkpoint runs.

    Returns:
        the model, in eval mode.

    Raises:
        InputError: there is no such model, it is not converted, it is damaged, its code is not
            trusted, or the device is unusable.
    """
    name = os.fspath(name)
    entry = read_config(name)
    if entry.get("kernel_ffn") is None:
        raise InputError(
            f"found {name} not converted, expected a kernel_ffn entry in its config: "
            "run hf-kernel-ffn convert"
        )
    student_class, author_file = get_student_class(entry, name)
    if has_custom_kernel(name):
        author_file = CUSTOM_KERNEL

    options: dict[str, Any] = {"dtype": get_torch_dtype(dtype)}
    model_class: Any = student_class
    if author_file:
        if not trust_remote_code:
            raise InputError(
                f"found code of its author's own at {name}: read {name}/{author_file}, "
                "then allow it by --trust-remote-code (in a recipe: trust_remote_code)"
            )
        options["trust_remote_code"] = True
        model_class = get_auto_class(entry, entry["architectures"][0])

    model, missing, unexpected = _load_model_and_check_keys(model_class, name, **options)
    odd = sorted({*missing, *unexpected})
    if odd and entry.get("quantization_config") is None:
        raise CheckpointError(
            f"found {len(odd)} tensors missing or too many at {name}, the first {odd[0]!r}: "
            "the weights are not those of its config.json; copy or convert it again"
        )
    return cast("ConvertedModel", _move_to_device(model, device))


def load_model(
    name: Place,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the model at ``name``, converted or stock; see :func:`load_student`."""
    name = os.fspath(name)
    if read_config(name).get("kernel_ffn") is None:
        return load_teacher(name, dtype, device, trust_remote_code)
    return load_student(name, dtype, device, trust_remote_code)


def load_tokenizer(name: Place) -> PreTrainedTokenizerBase:
    """Load the tokenizer at ``name``; no code of its author's runs."""
    name = os.fspath(name)
    config = _read_stock_family(name)
    options = {} if config is None else {"config": config}
    # None would ask at the terminal about the model's code.
    tokenizer = load_pretrained(
        AutoTokenizer.from_pretrained, name, trust_remote_code=False, **options
    )
    return cast(PreTrainedTokenizerBase, tokenizer)


def _read_stock_family(name: str) -> PreTrainedConfig | None:
    """A config of the family that the converted model at ``name`` was made from; None if there is
    no such thing.

    AutoTokenizer looks at a config too, and warns of a model_type that it does not know.
    """
    if find_file(name, "config.json") is None:
        return None
    entry = read_config(name).get("kernel_ffn")
    family = entry.get("family") if isinstance(entry, dict) else None
    if not isinstance(family, str) or not get_stock_heads(family):
        return None
    return AutoConfig.for_model(family)


def check_vocabularies(student: str, teacher: str) -> None:
    """Check that the tokenizers at ``student`` and ``teacher`` have the same tokens.

    A student may have no tokenizer of its own.

    Raises:
        InputError: they differ.
    """
    if find_file(student, "tokenizer_config.json") is None:
        return
    if load_tokenizer(student).get_vocab() != load_tokenizer(teacher).get_vocab():
        raise InputError(
            f"found other tokens at {student} than at {teacher}, expected equal: "
            "give the student's own teacher"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Check that ``model`` has an embedding of every token of ``tokenizer``.

    Tokens that were added to it count when a text has them.

    Raises:
        InputError: it has fewer.
    """
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    tokens = getattr(tokenizer, "vocab_size", None)
    if isinstance(size, int) and isinstance(tokens, int) and tokens > size:
        raise InputError(
            f"found {tokens} tokens in the tokenizer of {tokenizer.name_or_path}, expected at most "
            f"{size}, the vocabulary of the model: give the model its own tokenizer"
        )


def read_stored_dtype(name: str) -> torch.dtype:
    """Return the dtype in which the stock model at ``name`` is stored.

    float32 if its config does not say, or if it is converted. No code of its author's runs.
    """
    entry = read_config(name)
    if entry.get("kernel_ffn") is not None:
        return torch.float32
    if not get_stock_heads(str(entry.get("model_type"))):
        named = str(entry.get("dtype") or entry.get("torch_dtype")).removeprefix("torch.")
        return DTYPES.get(named, torch.float32)
    dtype = load_pretrained(AutoConfig.from_pretrained, name).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def rounds_weights(name: str, dtype: str) -> bool:
    """Return whether the stock model at ``name`` has weights that ``dtype`` cannot hold.

    Those of a GGUF file have no one dtype: False.
    """
    if is_gguf(name):
        return False
    stored = torch.finfo(read_stored_dtype(name))
    given = torch.finfo(get_torch_dtype(dtype))
    return given.eps > stored.eps or given.max < stored.max


def _finish_gguf(model: PreTrainedModel, name: str) -> None:
    """Make ``model``, read from the GGUF file ``name``, one like any other.

    Raises:
        InputError: the file has weights that transformers' reader has left out.
    """
    header = read_gguf_header(name)
    unread = find_unread_gguf_tensors(model, header.architecture, header.tensors)
    if unread:
        raise InputError(
            f"found {len(unread)} tensors in {name} that transformers does not read, the first "
            f"{unread[0]!r}, expected none: without them it is another model; convert it from its "
            "safetensors"
        )
    forget_quantizer(model)
    model.config.name_or_path = name
    model.name_or_path = name


def _load_model_and_check_keys(
    model_class: type[Any], name: str, **options: object
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """Load a model.

    Returns:
        the model, and the names in order of the tensors that are missing and of those too many.
    """
    model, info = load_pretrained(
        model_class.from_pretrained, name, output_loading_info=True, **options
    )
    return model, sorted(info["missing_keys"]), sorted(info["unexpected_keys"])


def _move_to_device(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """Move ``model`` to ``device``, in eval mode; InputError if that is unusable."""
    with _refuse_unusable(device):
        nn_module: torch.nn.Module = model
        nn_module.to(device)
    return model.eval()


def require_usable_device(device: str | torch.device) -> None:
    """InputError unless tensors can be on ``device``."""
    with _refuse_unusable(device):
        torch.empty(1, device=device)


@contextmanager
def _refuse_unusable(device: str | torch.device) -> Iterator[None]:
    """Turn what torch says of ``device`` into an InputError."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # the latter: torch built without that device
        raise InputError(
            f"found device {str(device)!r} unusable ({first_line(error)}): choose another"
        ) from error
