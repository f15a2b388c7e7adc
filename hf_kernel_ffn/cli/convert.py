"""hf-kernel-ffn convert."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .options import Bos, Chat, Device, Dtype, TextField, Trust, make_text_format, quieten
from .tables import print_conversion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..families.student import ConvertedModel
    from ..text.inputs import Inputs
    from ..text.text_format import TextFormat

LEAST_CALIBRATION_TOKENS = 256
"""Fewer say too little of what a unit reads."""
ROW_LENGTH = 256
"""Tokens in a row of calibration text, unless the model has fewer positions."""


def convert(
    model: Annotated[
        str, typer.Argument(help="local folder, .gguf file or hub id of a stock model")
    ],
    out_dir: Annotated[Path, typer.Argument(help="new or empty folder for the student")],
    rows: Annotated[
        Optional[str],
        typer.Option(
            help="tied: kernels in the plane of a unit's own rows; free: a row per prototype  "
            "[default: tied without any of these options, or with pieces; else free]"
        ),
    ] = None,
    pieces: Annotated[
        Optional[int],
        typer.Option(help="kernels per unit of tied rows  [default: 8, or 7 without a gate]"),
    ] = None,
    kernel: Annotated[
        Optional[str],
        typer.Option(
            help="registered kernel, or FILE.py:NAME for one of your own  "
            "[default: brownian tied, half-yat free]"
        ),
    ] = None,
    values: Annotated[
        Optional[str],
        typer.Option(
            help="fixed, gated (free rows) or product (tied rows)  "
            "[default: product with a gate and tied rows, else fixed]"
        ),
    ] = None,
    simplex: Annotated[
        Optional[str],
        typer.Option(help="softmax, sparsemax, entmax-1.5, top-k or threshold  [default: softmax]"),
    ] = None,
    top_k: Annotated[
        Optional[int], typer.Option(help="prototypes kept by top-k, by threshold on average")
    ] = None,
    skip: Annotated[
        bool,
        typer.Option("--skip", help="write a linear map beside the mixture (tied rows)"),
    ] = False,
    allocate: Annotated[
        bool,
        typer.Option(
            "--allocate",
            help="share the units that a sparse map keeps out over layers, by what leaving one "
            "out costs",
        ),
    ] = False,
    start: Annotated[
        Optional[str],
        typer.Option(help="converted model with tied rows whose pieces are taken, not fitted"),
    ] = None,
    intensity: Annotated[
        Optional[str], typer.Option(help="none, mass or gate  [default: mass]")
    ] = None,
    init: Annotated[
        Optional[str],
        typer.Option(
            help="of free rows: single, polarised, data-scale or firing-means  "
            "[default: the family's]"
        ),
    ] = None,
    expansion: Annotated[
        Optional[float],
        typer.Option(
            help="free prototypes per hidden unit, 1 to 8  [default: 2 polarised, else 1]"
        ),
    ] = None,
    temperature: Annotated[
        Optional[float], typer.Option(help="[default: 1, or fitted where it is free]")
    ] = None,
    layers: Annotated[Optional[str], typer.Option(help="such as 0-5,7  [default: all]")] = None,
    calibration_text: Annotated[
        Optional[str], typer.Option(help=".txt, .jsonl, .parquet or a datasets name")
    ] = None,
    calibration_tokens: Annotated[
        Optional[int],
        typer.Option(
            min=0,
            help="tokens to calibrate on; 0: no calibration  [default: 16384; 4096 of the model's "
            "own for tied rows]",
        ),
    ] = None,
    chat: Chat = False,
    bos: Bos = "auto",
    text_field: TextField = "text",
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="a block at a time, for a model that does not fit in memory; needs text, "
            "or 0 tokens",
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            help="of masks in the text, or of the tokens the model makes itself without any"
        ),
    ] = 0,
    trust_remote_code: Trust = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Replace the FFNs of MODEL by kernel readouts and save the student in OUT_DIR.

    It is saved in the dtype that MODEL is stored in; that of a .gguf file in --dtype.
    """
    from ..checkpoint_code.errors import InputError
    from ..checkpoint_code.settings import make_settings
    from ..conversion import convert as conversion
    from ..conversion.streaming import convert_streamed
    from ..storage.checkpoint import save_converted
    from ..storage.files import new_folder, require_empty
    from ..storage.kernel_files import import_kernel
    from ..storage.loading import (
        load_stock_on_meta,
        load_teacher,
        load_tokenizer,
        rounds_weights,
    )
    from ..storage.model_files import read_stock_config
    from ..text.documents import require_readable
    from ..text.row_frame import find_row_frame

    quieten()
    # Large tensors in huge pages: fresh ones take a third of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    require_empty(out_dir)
    if stream and (allocate or start is not None):
        raise InputError(
            "found --stream with --allocate or --start, expected neither: they need a whole model "
            "in memory; leave them out"
        )
    text_format = make_text_format(chat, bos, text_field)
    _check_calibration_options(calibration_text, calibration_tokens, text_format)
    fields = {
        "rows": rows,
        "pieces": pieces,
        "kernel": None if kernel is None else import_kernel(kernel),
        "values": values,
        "simplex": simplex,
        "top_k": top_k,
        "skip": skip or None,
        "intensity": intensity,
        "init": init,
        "expansion": expansion,
        "temperature": temperature,
    }
    settings = make_settings({name: value for name, value in fields.items() if value is not None})

    tokenizer = None
    if calibration_text is not None:
        read_stock_config(model)
        tokenizer = load_tokenizer(model)
        find_row_frame(tokenizer, text_format)  # refuses before the model is loaded
        require_readable([calibration_text])
    if stream:
        teacher = load_stock_on_meta(model, trust_remote_code=trust_remote_code)
    else:
        teacher = load_teacher(model, dtype, device, trust_remote_code)
    ids = None
    if calibration_text is not None and tokenizer is not None:
        ids = _read_calibration_rows(
            teacher,
            tokenizer,
            calibration_text,
            tokens=calibration_tokens,
            text_format=text_format,
            seed=seed,
        )
    options: dict = dict(calibration_ids=ids, calibration_tokens=calibration_tokens, progress=True)
    if stream:
        report = convert_streamed(
            model,
            out_dir,
            settings,
            layers,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            **options,
        )
    else:
        options["start"] = _load_start(start, teacher, dtype, device, trust_remote_code)
        options["allocate"] = allocate
        student, report = conversion.convert(teacher, settings, layers, seed=seed, **options)
        with new_folder(out_dir) as folder:
            save_converted(student, model, folder, place=out_dir, conversion=report.to_dict())
    print_conversion(report.layers)
    if rounds_weights(model, dtype):
        typer.echo(
            f"{model} is stored in a wider dtype than {dtype}: weights outside of the FFNs are "
            "rounded too, so that an export of these does not fit the teacher"
        )
    typer.echo(
        f"calibrated on {report.calibration_tokens:,} tokens ({report.calibration}); "
        f"saved in {out_dir}"
    )


def _load_start(
    start: str | None,
    teacher: PreTrainedModel,
    dtype: str,
    device: str,
    trust_remote_code: bool,
) -> ConvertedModel | None:
    """The model whose pieces are taken; InputError if it was not made of one like ``teacher``."""
    from ..families.student import check_pair
    from ..storage.loading import load_student

    if start is None:
        return None
    student = load_student(start, dtype, device, trust_remote_code)
    check_pair(student, teacher)
    return student


def _check_calibration_options(
    text: str | None, tokens: int | None, text_format: TextFormat
) -> None:
    """InputError if there are too few tokens, or a format of a text that is not given."""
    from ..checkpoint_code.errors import InputError
    from ..text.text_format import PLAIN

    if tokens is not None and 0 < tokens < LEAST_CALIBRATION_TOKENS:
        raise InputError(
            f"found {tokens} calibration tokens, expected 0, or {LEAST_CALIBRATION_TOKENS} and "
            "more: give more"
        )
    if text is None and text_format != PLAIN:
        raise InputError(
            "found --chat, --bos or --text-field without a text that they are of, expected "
            "--calibration-text: give one, or leave them out"
        )


def _read_calibration_rows(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    tokens: int | None,
    text_format: TextFormat,
    seed: int,
) -> Inputs:
    """What ``teacher`` is to read of ``text``, from all over it; masked where it predicts masks.

    Raises:
        InputError: the text cannot be read or is too short, or the tokenizer is another model's.
    """
    from ..conversion.calibration_set import CALIBRATION_TOKENS
    from ..storage.loading import check_tokenizer
    from ..text.inputs import find_longest_row
    from ..text.packing import read_token_ids
    from ..text.prediction import make_inputs_for_prediction

    check_tokenizer(tokenizer, teacher)
    count = CALIBRATION_TOKENS if tokens is None else tokens
    length = min(ROW_LENGTH, find_longest_row(teacher) or ROW_LENGTH)
    rows = read_token_ids(tokenizer, [text], length, count, text_format, spread=True)
    return make_inputs_for_prediction(teacher, tokenizer, rows, seed)
