"""The command line: convert, record, distill, evaluate, read, verify, export, apply, push, families. Bad input is one
line on stderr and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from .tables import print_reading, print_report, print_table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Dtype = Annotated[
    str,
    typer.Option(help="float32, bfloat16 or float16: of the weights while they are computed with"),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="allow a checkpoint's own kernel file")
]


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="local folder or hub id of a stock model")],
    out_dir: Annotated[Path, typer.Argument(help="new or empty folder for the student")],
    kernel: Annotated[
        str, typer.Option(help="registered kernel, or FILE.py:NAME for one of your own")
    ] = "half-yat",
    simplex: Annotated[
        str, typer.Option(help="softmax, sparsemax, entmax-1.5 or top-k")
    ] = "softmax",
    top_k: Annotated[Optional[int], typer.Option(help="prototypes kept by top-k")] = None,
    intensity: Annotated[str, typer.Option(help="none, mass or gate")] = "mass",
    init: Annotated[
        Optional[str],
        typer.Option(help="single, polarised, data-scale or firing-means  [default: the family's]"),
    ] = None,
    values: Annotated[str, typer.Option(help="fixed or gated")] = "fixed",
    expansion: Annotated[
        Optional[float],
        typer.Option(help="prototypes per hidden unit, 1 to 8  [default: 2 polarised, else 1]"),
    ] = None,
    temperature: Annotated[
        Optional[float], typer.Option(help="[default: 1, or fitted where it is free]")
    ] = None,
    layers: Annotated[Optional[str], typer.Option(help="such as 0-5,7  [default: all]")] = None,
    calibration_text: Annotated[
        Optional[str], typer.Option(help=".txt, .jsonl, .parquet or a datasets name")
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(min=0, help="tokens to calibrate on; 0: no calibration")
    ] = 16_384,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="a block at a time, for a model that does not fit in memory; needs text, or 0 tokens",
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            help="of masks in the text, or of the tokens the model makes itself without any"
        ),
    ] = 0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Replace the FFNs of MODEL by kernel readouts and save the student in OUT_DIR, in the dtype MODEL is stored in."""
    from ..checkpoint_code.errors import InputError
    from ..checkpoint_code.settings import KernelFFNConfig
    from ..conversion import convert as surgery
    from ..storage.checkpoint import save_converted
    from ..storage.files import new_folder, require_empty
    from ..storage.loading import import_kernel, load_stock_on_meta, load_teacher, load_tokenizer
    from ..text.packing import read_token_ids
    from ..text.prediction import make_inputs_for_prediction

    quieten()
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # large tensors in huge pages: fresh ones take a third of the time
    require_empty(out_dir)
    if 0 < calibration_tokens < 256:
        raise InputError(
            f"found {calibration_tokens} calibration tokens, expected 0, or 256 and more: give more"
        )
    if stream and device != "cpu":
        raise InputError(f"found --stream with device {device!r}, expected cpu: it computes there")
    settings = KernelFFNConfig(
        import_kernel(kernel), simplex, intensity, init, values, temperature, top_k, expansion
    )
    teacher = load_stock_on_meta(model) if stream else load_teacher(model, dtype, device)
    ids = None
    if calibration_text is not None:
        length = min(256, getattr(teacher.config, "max_position_embeddings", None) or 256)
        tokenizer = load_tokenizer(model)
        text = read_token_ids(
            tokenizer, [calibration_text], length, calibration_tokens, spread=True
        )
        ids = make_inputs_for_prediction(teacher, tokenizer, text, seed)
    options: dict = dict(calibration_ids=ids, calibration_tokens=calibration_tokens, progress=True)
    if stream:
        from ..conversion.streaming import convert_streamed

        report = convert_streamed(model, out_dir, settings, layers, dtype=dtype, **options)
    else:
        student, report = surgery.convert(teacher, settings, layers, seed=seed, **options)
        with new_folder(out_dir) as made:
            save_converted(student, model, made, conversion=report.to_dict())
    print_table(
        ["layer", "prototypes", "parameters", "FVU held out", "dictionary growth"],
        [
            [path, f"{f['prototypes']}", f"{f['parameters']:,}"]
            + [
                f"{f[name]:.{digits}f}" if name in f else "–"
                for name, digits in (("fvu", 4), ("dictionary_growth", 2))
            ]
            for path, f in report.layers.items()
        ],
    )
    typer.echo(
        f"calibrated on {report.calibration_tokens:,} tokens ({report.calibration}); saved in {out_dir}"
    )


@app.command()
def record(
    recipe: Annotated[Path, typer.Argument(help="YAML file")],
    out_dir: Annotated[
        Path, typer.Argument(help="new or empty folder, for stored_logits in the recipe")
    ],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="dotted.key=value …, as for distill")
    ] = None,
    top_k: Annotated[
        int, typer.Option(min=1, help="tokens to record at every position; the others count as one")
    ] = 64,
    processes: Annotated[int, typer.Option(min=1, help="that the distillation will run on")] = 1,
) -> None:
    """Run the teacher of RECIPE over what its logits stages will read, and write its likeliest tokens to OUT_DIR."""
    from ..distillation import load_recipe
    from ..distillation.recording import record

    quieten()
    record(load_recipe(recipe, overrides), out_dir, top_k, processes, typer.echo)
    typer.echo(f"saved in {out_dir}")


@app.command()
def distill(
    recipe: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Annotated[
        Optional[list[str]],
        typer.Argument(help="dotted.key=value …, such as stages.0.tokens=600000"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the state an interrupted run left")
    ] = False,
) -> None:
    """Distil a converted model back to its teacher by RECIPE. Also: accelerate launch scripts/distill.py RECIPE …"""
    from ..distillation import Terminated, distill, load_recipe

    quieten()
    try:
        out = distill(load_recipe(recipe, overrides), resume=resume)
    except Terminated as stopped:
        sys.stderr.write(f"{stopped}\n")
        raise typer.Exit(143) from stopped  # 128 + SIGTERM, as a shell reports it
    typer.echo(f"saved in {out}")


@app.command()
def evaluate(
    student: Annotated[str, typer.Argument(help="local folder or hub id of a converted model")],
    teacher: Annotated[str, typer.Option(help="local folder or hub id of its stock model")],
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
        typer.Option(min=0, help="beginnings of rows that both continue by 32 tokens, to compare"),
    ] = 0,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write the report")
    ] = None,
    trust_remote_code: Trust = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Compare STUDENT with its teacher on TEXT: fidelity of its predictions, and readability of every layer."""
    from ..checkpoint_code.errors import InputError
    from ..families.student import check_pair, share_equal_parameters
    from ..storage.files import require_place, write_text
    from ..storage.loading import check_vocabularies, load_student, load_teacher, load_tokenizer
    from ..text.packing import read_token_ids

    try:
        from ..evaluation.report import evaluate_student
    except ImportError as error:
        raise InputError(
            "evaluate needs the evaluate package: pip install 'hf-kernel-ffn[evaluate]'"
        ) from error
    if json_file is not None:
        require_place(json_file)
    quieten()
    converted, stock = (
        load_student(student, dtype, device, trust_remote_code),
        load_teacher(teacher, dtype, device),
    )
    check_pair(converted, stock)
    check_vocabularies(student, teacher)
    share_equal_parameters(converted, stock)  # which halves what both hold
    limit = getattr(stock.config, "max_position_embeddings", None)
    sequence_length = sequence_length or min(256, limit or 256)
    if limit is not None and sequence_length > limit:
        raise InputError(
            f"found sequence length {sequence_length}, expected at most the teacher's {limit}"
        )
    tokenizer = load_tokenizer(teacher)
    ids = read_token_ids(tokenizer, [text], sequence_length, max_tokens)
    report = evaluate_student(
        converted,
        stock,
        ids,
        tokenizer=tokenizer,
        batch_tokens=batch_tokens,
        prompts=prompts,
        progress=True,
    )
    report = {
        "student_path": student,
        "teacher_path": teacher,
        "text": text,
        "sequence_length": sequence_length,
        **report,
    }
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")
    print_report(report)


@app.command()
def read(
    model: Annotated[str, typer.Argument(help="local folder or hub id, converted or stock")],
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
            help="other mixtures of the last token's outputs in the report; seconds each, minutes if wide",
        ),
    ] = 3,
    trust_remote_code: Trust = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Read MODEL at one token: what every FFN chose and how loudly, what it wrote, and who wrote the next token's logit."""
    from ..families.lookup import parse_layers
    from ..reading import trace
    from ..reading.summary import summary
    from ..reading.support import Support
    from ..storage.files import require_place, write_text
    from ..storage.loading import load_model, load_teacher, load_tokenizer
    from ..text.packing import read_token_ids

    for file in (json_file, html):
        if file is not None:
            require_place(file)
    quieten()
    loaded, tokenizer = load_model(model, dtype, device, trust_remote_code), load_tokenizer(model)
    ids = None if text is None else read_token_ids(tokenizer, [text], 256, 16_384)
    passed = trace(loaded, tokenizer, prompt, None if html is not None else [position])
    chosen = None if layers is None else parse_layers(layers, len(passed.ffn_inputs))
    found = summary(
        passed, tokenizer, position, chosen, top, None if ids is None else Support(loaded, ids)
    )
    if json_file is not None:
        write_text(
            json_file,
            json.dumps({"model": model, "prompt": prompt, **found}, indent=1, ensure_ascii=False)
            + "\n",
        )
    if html is not None:
        from ..reading.report import other_mixtures, report_data, write_report

        beside = (
            None
            if teacher is None
            else trace(load_teacher(teacher, dtype, device), tokenizer, prompt)
        )
        write_report(
            html,
            report_data(
                passed,
                beside,
                tokenizer=tokenizer,
                alternatives=other_mixtures(passed, alternatives),
            ),
        )
    print_reading(found)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="local folder of a converted model")],
) -> None:
    """Check that FOLDER is whole and carries no code but this package's: config, weights, checksums, code. Runs none of it."""
    from ..checkpoint_code.errors import InputError
    from ..storage.verification import verify_folder

    quieten()
    found = verify_folder(folder)
    print_table(["", "found", ""], [[f.what, f.found, "ok" if f.good else "NOT OK"] for f in found])
    bad = [f.what for f in found if not f.good]
    if bad:
        raise InputError(
            f"found {folder} not as it was saved ({', '.join(bad)}): see the table, and copy or convert it again"
        )


@app.command()
def export(
    student: Annotated[str, typer.Argument(help="local folder or hub id of a converted model")],
    file: Annotated[Path, typer.Argument(help="FILE.safetensors to write")],
) -> None:
    """Write the converted FFNs of STUDENT alone to FILE, which `apply` puts into the original model."""
    from ..storage.exporting import export_surgery
    from ..storage.files import require_place
    from ..storage.loading import load_student

    quieten()
    require_place(file)
    export_surgery(load_student(student), file)
    typer.echo(f"saved in {file}")


@app.command()
def apply(
    file: Annotated[Path, typer.Argument(help="FILE.safetensors written by export")],
    teacher: Annotated[
        str, typer.Argument(help="local folder or hub id of the model that it was made from")
    ],
    out_dir: Annotated[Path, typer.Argument(help="new or empty folder for the student")],
) -> None:
    """Make the student of TEACHER that FILE was exported from; refused if TEACHER is another model."""
    from ..storage.checkpoint import save_converted
    from ..storage.exporting import apply_surgery
    from ..storage.files import new_folder, require_empty
    from ..storage.loading import load_teacher

    quieten()
    require_empty(out_dir)
    student = apply_surgery(file, load_teacher(teacher))
    with new_folder(out_dir) as made:
        save_converted(student, teacher, made)
    typer.echo(f"saved in {out_dir}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="local folder of a converted model")],
    repo: Annotated[str, typer.Argument(help="repository of the hub, such as me/llama-kernel")],
    report: Annotated[
        Optional[Path], typer.Option(help="what evaluate --json wrote, for the model card")
    ] = None,
    base_model: Annotated[
        Optional[str], typer.Option(help="the teacher  [default: as the card in FOLDER has it]")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="if the repository has to be made")
    ] = False,
) -> None:
    """Upload FOLDER to the hub with a model card: base model, settings, evaluation, how to load it."""
    from ..storage.publishing import push_to_hub

    typer.echo(f"pushed to {push_to_hub(folder, repo, base_model, report, private)}")


@app.command()
def families(
    explain: Annotated[
        Optional[str],
        typer.Option(
            metavar="MODEL",
            help="what looks like an FFN in this model, and which entry describes it",
        ),
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="run the model's own code")] = False,
) -> None:
    """List the architectures that can be converted."""
    from ..families.lookup import join_path
    from ..families.registry import ARCHITECTURES

    if explain is not None:
        from ..families.detection import explain_ffns as rows
        from ..storage.loading import load_empty_teacher

        quieten()
        found = rows(load_empty_teacher(explain, trust_remote_code))
        print_table(["FFN", "sizes", "activation", "entry"], [list(row.values()) for row in found])
        return
    print_table(
        ["model_type", "FFN", "W_in", "gate", "W_out", "default"],
        [
            [
                a.model_type,
                " ".join(join_path(stack, "*", a.ffn) for stack in a.stacks),
                a.up,
                a.gate or ("–" if a.gate_half is None else f"half {a.gate_half}"),
                a.down,
                "polarised" if a.gated else "single",
            ]
            for a in ARCHITECTURES.values()
        ],
    )


def quieten() -> None:
    """Keep transformers off a stderr that is a file or a pipe: it is for the one line that says what is wrong."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()


def main() -> None:
    """Entry point of ``hf-kernel-ffn``."""
    run_app(app)


def run_app(command: Callable[[], object]) -> None:
    """Call ``command``; bad input, and versions out of range, become one line on stderr and exit code 2."""
    from ..checkpoint_code.errors import InputError

    try:
        command()
    except (InputError, FloatingPointError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    except Exception as error:
        from ..versions import unsupported

        reason = unsupported()
        if reason is None:
            raise
        sys.stderr.write(f"error: {reason} ({type(error).__name__})\n")
        raise SystemExit(2) from error
