"""Converting what does not fit in memory: safetensors to safetensors, one block of the model at a time.

The blocks before the current one are stood in for by what they put out on the calibration tokens, so that each is read once.
What is held: the tensors of one block and the next, read ahead, and hidden_size numbers per calibration token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.kernels import get_kernel
from ..checkpoint_code.settings import KernelFFNConfig
from ..compat import get_tied_parameter_names
from ..families.lookup import find_stacks
from ..families.registry import get_architecture_of_model
from ..families.student import get_name_prefix, make_config_entry, make_meta_student
from ..families.weights import read_stock_weights
from ..storage.checkpoint import save_around_weights
from ..storage.files import new_folder
from ..storage.loading import load_stock_on_meta, read_stored_dtype
from .convert import (
    CALIBRATION_TOKENS,
    ConversionReport,
    choose_calibration_rows,
    choose_ffns,
    convert_block,
    make_layer_config,
    require_finite,
    track_progress,
)
from .replay import Replay
from .tensor_files import Reader, Writer


@torch.no_grad()
def convert_streamed(
    source: str,
    out: Path,
    config: KernelFFNConfig | None = None,
    layers: str | None = None,
    *,
    calibration_ids: Tensor | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    dtype: str = "float32",
    progress: bool = False,
) -> ConversionReport:
    """Convert the stock model at ``source`` into the new or empty folder ``out``: the checkpoint that :func:`hf_kernel_ffn.convert`
    and saving make, bit for bit, on the CPU. It is there whole or not at all.

    Args:
        calibration_ids: (rows, length) token ids of text; None only with ``calibration_tokens`` 0, since a model that is never
            whole in memory cannot write its own.
        dtype: of the weights while they are computed with.

    Raises:
        InputError: as convert(); the model is not one stack of blocks behind an embedding of token ids; or the checkpoint's tensors
            are not the stock model's.
    """
    if (calibration_ids is None) != (calibration_tokens == 0):
        raise InputError(
            "found a streamed conversion without text, expected calibration text, or 0 calibration tokens: give one"
        )
    teacher = load_stock_on_meta(source, dtype)
    chosen, settings = choose_ffns(teacher, config, layers)
    stack, reader = _only_stack(teacher), Reader(source, teacher)
    ids, report = choose_calibration_rows(teacher, calibration_ids, calibration_tokens, "text")
    stored, prefix = read_stored_dtype(source), get_name_prefix(teacher)
    found = {path: _expected(teacher, ffn, settings[path]) for path, ffn in chosen.items()}
    student = make_meta_student(teacher, make_config_entry(teacher, found)).to(stored)
    tied = get_tied_parameter_names(student)
    described = {name: t for name, t in student.state_dict().items() if name not in tied}

    with new_folder(out) as made:
        weights = made / "weights"
        weights.mkdir()
        with Writer(weights, described) as writer:
            replay = Replay(teacher, reader, stack)
            groups = [
                [prefix + name for name in replay.names(i)] for i in range(len(replay.blocks))
            ]
            for i, tensors in zip(
                track_progress(range(len(groups)), "converting", progress),
                read_ahead(reader, groups),
                strict=True,
            ):
                here = [ffn for ffn in chosen.values() if ffn.number == i]
                read = set(tensors) if ids is not None else replay.read_by(here)
                for name, tensor in tensors.items():
                    require_finite(name, tensor)
                    if name in read:
                        replay.place(name.removeprefix(prefix), tensor)
                    if name in described:
                        writer.write(name, [_rounded(tensor, teacher.dtype)])
                for path, ffn in convert_block(teacher, here, settings, ids, report)[0].items():
                    found[path] = ffn.config
                    for name, tensor in ffn.state_dict().items():
                        writer.write(f"{prefix}{path}.{name}", [tensor])
                if ids is not None and any(ffn.number > i for ffn in chosen.values()):
                    replay.advance(i, ids)
                replay.leave(i)
                for (
                    stock
                ) in here:  # no part of the block any more, where the readout has taken its place
                    stock.host.to("meta")
                _give_back()
            for name in sorted(writer.left):
                writer.write(
                    name,
                    (
                        _rounded(piece, teacher.dtype)
                        for piece in _finite(name, reader.pieces(name))
                    ),
                )
        student = make_meta_student(teacher, make_config_entry(teacher, found)).to(stored)
        if teacher.can_generate():
            student.generation_config = teacher.generation_config
        save_around_weights(student, weights, source, made, conversion=report.to_dict())
    return report


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps what lies below its threshold, more of it with every block."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _only_stack(model: Any) -> str:
    """The path of the model's blocks; InputError unless it is one stack, each with FFNs of its own, behind an embedding."""
    architecture = get_architecture_of_model(model)
    found = find_stacks(model.base_model, architecture)
    embedding = None
    with suppress(NotImplementedError):
        embedding = model.get_input_embeddings()
    alone = len(found) == 1 and not architecture.shared and not model.config.is_encoder_decoder
    if not alone or not isinstance(embedding, nn.Embedding):
        raise InputError(
            f"found a {type(model).__name__}, expected one stack of blocks behind an embedding of token ids: convert it in memory"
        )
    return found[0]


def _expected(teacher, stock, settings):
    """The LayerConfig of the readout that is to replace ``stock``, but for its reference values."""
    up = read_stock_weights(teacher, stock).up
    reference = dict.fromkeys(
        (*get_kernel(settings.kernel).parameters, "scale", "temperature", "threshold"), 1.0
    )
    return make_layer_config(
        teacher, stock, settings, up.shape[1], round(settings.expansion * len(up)), reference
    )


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as a model loaded in ``dtype`` has it, unless that has room for all its digits."""
    return (
        tensor
        if torch.promote_types(tensor.dtype, dtype) == dtype or not tensor.is_floating_point()
        else tensor.to(dtype)
    )


def _finite(name: str, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same ``pieces``; InputError if one is not finite."""
    for piece in pieces:
        require_finite(name, piece)
        yield piece


def read_ahead(reader: Reader, groups: list[list[str]]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each group by name; while one is at work, the next is read."""

    def read(names: list[str]) -> dict[str, Tensor]:
        return {name: reader.read(name) for name in names}

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(read, groups[0])
        for number in range(len(groups)):
            tensors = following.result()
            if number + 1 < len(groups):
                following = pool.submit(read, groups[number + 1])
            yield tensors
