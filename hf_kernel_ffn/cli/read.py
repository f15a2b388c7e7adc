"""hf-kernel-ffn read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from .options import Bos, Chat, Device, Dtype, TextField, Trust, make_text_format, quieten
from .tables import print_reading


def read(
    model: Annotated[
        str, typer.Argument(help="local folder, .gguf file or hub id, converted or stock")
    ],
    prompt: Annotated[str, typer.Option(help="text to read the model at")],
    position: Annotated[
        int, typer.Option(help="token of the prompt to read at, negative from the end")
    ] = -1,
    layers: Annotated[Optional[str], typer.Option(help="such as 0-5,7  [default: all]")] = None,
    top: Annotated[
        int, typer.Option(min=1, help="contributions to print per layer, and of the logit")
    ] = 10,
    text: Annotated[
        Optional[str],
        typer.Option(help="ordinary text: support is then given as percentiles of it"),
    ] = None,
    teacher: Annotated[
        Optional[str], typer.Option(help="stock model to set beside it in the report")
    ] = None,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write all of it")
    ] = None,
    html: Annotated[
        Optional[Path],
        typer.Option(help="where to write the report, one page that opens from disk"),
    ] = None,
    alternatives: Annotated[
        int,
        typer.Option(
            min=0,
            help="other mixtures of the last token's outputs in the report; seconds each, "
            "minutes if wide",
        ),
    ] = 3,
    chat: Chat = False,
    bos: Bos = "auto",
    text_field: TextField = "text",
    trust_remote_code: Trust = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Read MODEL at one token: what every FFN chose and how loudly, what it wrote, and who wrote
    the next token's logit."""
    import torch

    from ..families.lookup import parse_layers
    from ..reading import trace
    from ..reading.model_parts import require_readable_family
    from ..reading.summary import summary
    from ..reading.support import Support
    from ..reading.tracing import list_last_positions, tokenize_prompt
    from ..storage.files import require_place, write_text
    from ..storage.loading import check_tokenizer, load_model, load_teacher, load_tokenizer
    from ..storage.model_files import read_config, read_stock_config
    from ..text.documents import require_readable
    from ..text.inputs import find_longest_row
    from ..text.packing import read_token_ids
    from ..text.prediction import require_embedded
    from ..text.prompts import encode_prompt

    for file in (json_file, html):
        if file is not None:
            require_place(file, model, teacher, text)
    quieten()
    text_format = make_text_format(chat, bos, text_field)
    require_readable_family(read_config(model))
    if teacher is not None:
        read_stock_config(teacher)
    if text is not None:
        require_readable([text])
    tokenizer = load_tokenizer(model)
    ids = tokenize_prompt(tokenizer, torch.tensor(encode_prompt(tokenizer, prompt, text_format)))
    loaded = load_model(model, dtype, device, trust_remote_code)
    check_tokenizer(tokenizer, loaded)
    require_embedded(loaded, ids)
    positions = [position] if html is None else [*list_last_positions(len(ids)), position]
    passed = trace(loaded, tokenizer, ids, positions)

    chosen = None if layers is None else parse_layers(layers, len(passed.ffn_inputs))
    support = None
    if text is not None:
        length = min(256, find_longest_row(loaded) or 256)
        support = Support(loaded, read_token_ids(tokenizer, [text], length, 16_384, text_format))
    found = summary(passed, tokenizer, position, layers=chosen, top=top, support=support)
    try:
        if json_file is not None:
            content = {"model": model, "prompt": prompt, **found}
            write_text(json_file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        if html is not None:
            from ..reading.report import other_mixtures, report_data, write_report

            beside = None
            if teacher is not None:
                stock = load_teacher(teacher, dtype, device, trust_remote_code)
                beside = trace(stock, tokenizer, ids, positions)
            mixtures = other_mixtures(passed, alternatives)
            write_report(
                html,
                report_data(passed, beside, tokenizer=tokenizer, alternatives=mixtures),
            )
    finally:  # what goes wrong with a file takes no figures away
        print_reading(found)
