"""Converting what does not fit in memory: safetensors to safetensors, one block at a time.

The blocks before the current one are stood in for by what they put out on the calibration tokens,
so that each is read once. What is held: the tensors of one block and the next, read ahead, and
hidden_size numbers per calibration token; twice that in a mixture of experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.layer_config import LayerConfig, name_reference_values
from ..checkpoint_code.settings import KernelFFNConfig
from ..compat import get_tied_parameter_names
from ..families.lookup import StockFFN
from ..families.student import make_config_entry, make_meta_student
from ..families.weights import read_stock_weights
from ..progress import track_progress
from ..storage.checkpoint import save_around_weights
from ..storage.files import new_folder
from ..storage.loading import load_stock_on_meta, read_stored_dtype, require_usable_device
from .calibration_set import (
    CALIBRATION_TOKENS,
    CalibrationSet,
    choose_calibration,
    fits_only_pieces,
)
from .convert import (
    ConversionReport,
    choose_ffns,
    convert_block,
    require_finite,
    start_report,
)
from .layer import make_layer_config
from .replay import Replay, find_reason_against_stack
from .streamed_model import StreamedModel
from .tensor_reader import Reader
from .tensor_writer import Writer

if TYPE_CHECKING:
    from ..families.student import ConvertedModel


@torch.no_grad()
def convert_streamed(
    source: str,
    out: Path,
    config: KernelFFNConfig | None = None,
    layers: str | None = None,
    *,
    calibration_ids: Tensor | None = None,
    calibration_tokens: int | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Convert the stock model at ``source`` into the new or empty folder ``out``.

    That is the checkpoint that :func:`hf_kernel_ffn.convert` and saving make, bit for bit on a CPU.
    It is there whole or not at all.

    Args:
        source: local folder or hub id.
        config: settings for every layer.
        layers: as in :func:`hf_kernel_ffn.convert`.
        calibration_ids: (rows, length) token ids of text; None only with ``calibration_tokens`` 0,
            since a model that is never whole in memory cannot write its own.
        calibration_tokens: how many of them are read; 0: no calibration; None: 16,384.
        dtype: of the weights while they are computed with.
        device: where the current block is, and what the blocks before it put out.
        trust_remote_code: whether code that the model brings may run.
        progress: show a bar.

    Raises:
        InputError: as convert(); the model is not one stack of blocks behind an embedding of token
            ids; the checkpoint's tensors are not the stock model's; or the device is unusable.
    """
    require_usable_device(device)
    if (calibration_ids is None) != (calibration_tokens == 0):
        raise InputError(
            "found a streamed conversion without text, expected calibration text, or 0 calibration "
            "tokens: give one"
        )
    teacher = load_stock_on_meta(source, dtype, trust_remote_code)
    chosen, settings = choose_ffns(teacher, config, layers)
    _require_one_stack(teacher)
    reader = Reader(source, teacher)
    calibration = None
    if calibration_ids is not None:
        calibration = choose_calibration(
            calibration_ids,
            CALIBRATION_TOKENS if calibration_tokens is None else calibration_tokens,
            only_pieces=fits_only_pieces(settings.values()),
        )
    stored = read_stored_dtype(source)
    described = _describe_student(teacher, chosen, settings, stored)

    with new_folder(out) as folder:
        weights = folder / "weights"
        weights.mkdir()
        with Writer(weights, described) as writer:
            conversion = StreamedConversion(
                teacher,
                reader,
                writer,
                calibration=calibration,
                chosen=chosen,
                settings=settings,
                device=device,
            )
            conversion.convert_blocks(progress)
            conversion.copy_what_is_left()
        student = _make_final_student(teacher, conversion.layers, stored)
        report = conversion.report.to_dict()
        save_around_weights(student, weights, source, folder, place=out, conversion=report)
    return conversion.report


class StreamedConversion:
    """One conversion from files to files, block by block."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        reader: Reader,
        writer: Writer,
        *,
        calibration: CalibrationSet | None,
        chosen: Mapping[str, StockFFN],
        settings: Mapping[str, KernelFFNConfig],
        device: str | torch.device = "cpu",
    ):
        """Convert the FFNs ``chosen`` of ``teacher``, which is on the meta device.

        Args:
            reader: of the teacher's tensors.
            writer: of the student's.
            settings: by FFN path.
        """
        self.teacher = teacher
        self.reader = reader
        self.writer = writer
        self.chosen = chosen
        self.settings = settings
        self.streamed = StreamedModel(teacher, reader, device)
        self.source = None if calibration is None else Replay(teacher, calibration)
        self.report = start_report(teacher, calibration, "text")
        self.layers: dict[str, LayerConfig] = {}
        """What config.json says of the readouts that are made, by path."""

    def convert_blocks(self, progress: bool) -> None:
        """Write all blocks, those that keep their FFN as well; ``progress``: show a bar."""
        numbers = range(len(self.streamed.blocks))
        names = [self.streamed.get_block_names(number) for number in numbers]
        for number, tensors in zip(
            track_progress(numbers, "converting", progress),
            read_ahead(self.reader, names),
            strict=True,
        ):
            ffns = [ffn for ffn in self.chosen.values() if ffn.number == number]
            self._place_and_copy(tensors, ffns)
            self._convert_ffns(ffns)
            self._close_block(number)
            for ffn in ffns:  # no part of the block any more: the readout has taken its place
                ffn.host.to("meta")
            _give_back()

    def _place_and_copy(self, tensors: Mapping[str, Tensor], ffns: list[StockFFN]) -> None:
        """Give a block the ``tensors`` that are read, and write those that the student has."""
        read = set(tensors)
        if self.source is None:
            read = self.streamed.get_names_read_by(ffns)
        for name, tensor in tensors.items():
            require_finite(name, tensor)
            if name in read:
                self.streamed.place(name.removeprefix(self.streamed.prefix), tensor)
            if name in self.writer.left:
                self.writer.write(name, [_round(tensor, self.teacher.dtype)])

    def _convert_ffns(self, ffns: list[StockFFN]) -> None:
        """Convert one block's ``ffns`` and write the readouts."""
        readouts = convert_block(self.teacher, ffns, self.settings, self.source, self.report)
        for path, ffn in readouts.items():
            self.layers[path] = ffn.config
            for name, tensor in ffn.state_dict().items():
                self.writer.write(f"{self.streamed.prefix}{path}.{name}", [tensor])

    def _close_block(self, number: int) -> None:
        """Give up the weights of a block, and keep what it puts out if a later block reads that."""
        later = any(ffn.number > number for ffn in self.chosen.values())
        if self.source is not None and later:
            self.source.close_blocks(number)
            self.streamed.stop_reading_embedding()
        self.streamed.drop_block(number)

    def copy_what_is_left(self) -> None:
        """Write the tensors outside of the blocks, a piece at a time."""
        for name in sorted(self.writer.left):
            pieces = _require_finite_pieces(name, self.reader.pieces(name))
            self.writer.write(name, (_round(piece, self.teacher.dtype) for piece in pieces))


def _require_one_stack(model: PreTrainedModel) -> None:
    """InputError unless ``model`` is one stack of blocks, each with an FFN, behind an embedding."""
    embedding = None
    with suppress(NotImplementedError):
        embedding = model.get_input_embeddings()
    if find_reason_against_stack(model) is not None or not isinstance(embedding, nn.Embedding):
        raise InputError(
            f"found a {type(model).__name__}, expected one stack of blocks behind an embedding of "
            "token ids: convert it in memory"
        )


def _describe_student(
    teacher: PreTrainedModel,
    chosen: Mapping[str, StockFFN],
    settings: Mapping[str, KernelFFNConfig],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of the student's files, on the meta device, by name."""
    layers = {path: _expect_layer(teacher, ffn, settings[path]) for path, ffn in chosen.items()}
    student = make_meta_student(teacher, make_config_entry(teacher, layers)).to(dtype)
    tied = get_tied_parameter_names(student)
    return {name: tensor for name, tensor in student.state_dict().items() if name not in tied}


def _expect_layer(
    teacher: PreTrainedModel, stock: StockFFN, settings: KernelFFNConfig
) -> LayerConfig:
    """What config.json is to say of the readout for ``stock``, but for reference values."""
    up = read_stock_weights(teacher, stock).up
    reference = dict.fromkeys(name_reference_values(settings), 1.0)
    prototypes = round((settings.expansion or 1.0) * len(up))
    layer = make_layer_config(
        teacher, stock, settings, size=up.shape[1], prototypes=prototypes, reference=reference
    )
    return replace(layer, gated=settings.rows == "tied" and stock.shape.gated)


def _make_final_student(
    teacher: PreTrainedModel, layers: dict[str, LayerConfig], dtype: torch.dtype
) -> ConvertedModel:
    """The student of ``teacher`` without its weights, which are in files already."""
    student = make_meta_student(teacher, make_config_entry(teacher, layers))
    student.to(dtype)
    if teacher.can_generate():
        student.generation_config = teacher.generation_config
    return student


def _give_back() -> None:
    """Return freed memory to the system.

    glibc keeps what lies below its threshold, more of it with every block.
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _round(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as a model loaded in ``dtype`` has it, unless that has room for all its digits."""
    has_room = torch.promote_types(tensor.dtype, dtype) == dtype
    if has_room or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def _require_finite_pieces(name: str, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same ``pieces``; InputError if one is not finite."""
    for piece in pieces:
        require_finite(name, piece)
        yield piece


def read_ahead(reader: Reader, groups: list[list[str]]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each group by name; while one is at work, the next is read."""

    def read_group(names: list[str]) -> dict[str, Tensor]:
        return {name: reader.read(name) for name in names}

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(read_group, groups[0])
        for number in range(len(groups)):
            tensors = following.result()
            if number + 1 < len(groups):
                following = pool.submit(read_group, groups[number + 1])
            yield tensors
