"""hf-kernel-ffn evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .options import Bos, Chat, Device, Dtype, TextField, Trust, make_text_format, quieten
from .tables import print_report

if TYPE_CHECKING:
    from torch import Tensor


def evaluate(
    student: Annotated[str, typer.Argument(help="local folder or hub id of a converted model")],
    teacher: Annotated[
        str, typer.Option(help="local folder, .gguf file or hub id of its stock model")
    ],
    text: Annotated[str, typer.Option(help="text that neither was trained on")],
    max_tokens: Annotated[int, typer.Option(min=2, help="tokens of the text to read")] = 65_536,
    sequence_length: Annotated[
        Optional[int],
        typer.Option(
            min=2, help="tokens per sequence  [default: 256, or the teacher's most if that is less]"
        ),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="tokens to read at once; fewer take less memory")
    ] = 2048,
    prompts: Annotated[
        int,
        typer.Option(
            min=0,
            help="beginnings of rows that both continue by 32 tokens, to compare; with --chat the "
            "conversations or lines, which both answer",
        ),
    ] = 0,
    chat: Chat = False,
    bos: Bos = "auto",
    text_field: TextField = "text",
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write the report")
    ] = None,
    trust_remote_code: Trust = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Compare STUDENT with its teacher on TEXT: fidelity of its predictions, and readability of
    every layer."""
    from ..checkpoint_code.errors import InputError, MissingPackage
    from ..families.student import check_pair, share_equal_parameters
    from ..storage.files import require_place, write_text
    from ..storage.loading import (
        check_tokenizer,
        check_vocabularies,
        load_student,
        load_teacher,
        load_tokenizer,
    )
    from ..storage.model_files import read_config, read_stock_config
    from ..text.documents import require_readable
    from ..text.inputs import find_longest_row
    from ..text.packing import read_token_ids
    from ..text.row_frame import find_row_frame

    try:
        from ..evaluation.generation import select_chat_prompts
        from ..evaluation.report import evaluate_student
    except ImportError as error:
        raise MissingPackage(
            "evaluate needs the evaluate package: pip install 'hf-kernel-ffn[evaluate]'"
        ) from error
    if json_file is not None:
        require_place(json_file, student, teacher, text)
    quieten()
    text_format = make_text_format(chat, bos, text_field)
    read_config(student)
    read_stock_config(teacher)
    tokenizer = load_tokenizer(teacher)
    find_row_frame(tokenizer, text_format)  # refuses before the models are loaded
    require_readable([text])
    converted = load_student(student, dtype, device, trust_remote_code)
    stock = load_teacher(teacher, dtype, device, trust_remote_code)
    check_pair(converted, stock)
    check_vocabularies(student, teacher)
    share_equal_parameters(converted, stock)  # which halves what both hold
    limit = find_longest_row(stock)
    sequence_length = sequence_length or min(256, limit or 256)
    if limit is not None and sequence_length > limit:
        raise InputError(
            f"found sequence length {sequence_length}, expected at most the teacher's {limit}"
        )
    check_tokenizer(tokenizer, stock)
    ids = read_token_ids(tokenizer, [text], sequence_length, max_tokens, text_format)
    asked: int | list[Tensor] = prompts
    if chat and prompts > 0:
        asked = select_chat_prompts(stock, tokenizer, text, prompts, text_format)
    report = evaluate_student(
        converted,
        stock,
        ids,
        tokenizer=tokenizer,
        batch_tokens=batch_tokens,
        prompts=asked,
        progress=True,
    )
    report = {
        "student_path": student,
        "teacher_path": teacher,
        "text": text,
        "sequence_length": sequence_length,
        "chat": chat,
        "bos": bos,
        **report,
    }
    try:
        if json_file is not None:
            write_text(json_file, json.dumps(report, indent=1) + "\n")
    finally:  # a disk that is full by now takes no figures away
        print_report(report)
