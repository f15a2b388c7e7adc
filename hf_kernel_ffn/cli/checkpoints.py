"""hf-kernel-ffn verify, export, apply and push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .options import Trust, quieten
from .tables import print_table


def verify(
    folder: Annotated[Path, typer.Argument(help="local folder of a converted model")],
) -> None:
    """Check that FOLDER is whole and carries no code but this package's: config, weights,
    checksums, code. Runs none of it."""
    from ..checkpoint_code.errors import InputError
    from ..storage.verification import verify_folder

    quieten()
    found = verify_folder(folder)
    print_table(["", "found", ""], [[f.what, f.found, "ok" if f.good else "NOT OK"] for f in found])
    bad = [f.what for f in found if not f.good]
    if bad:
        raise InputError(
            f"found {folder} not as it was saved ({', '.join(bad)}): see the table, and copy or "
            "convert it again"
        )


def export(
    student: Annotated[str, typer.Argument(help="local folder or hub id of a converted model")],
    file: Annotated[Path, typer.Argument(help="FILE.safetensors to write")],
    trust_remote_code: Trust = False,
) -> None:
    """Write the converted FFNs of STUDENT alone to FILE, which `apply` puts into the original
    model."""
    from ..storage.exporting import export_surgery
    from ..storage.files import require_place
    from ..storage.loading import load_student

    quieten()
    require_place(file, student)
    export_surgery(load_student(student, trust_remote_code=trust_remote_code), file)
    typer.echo(f"saved in {file}")


def apply(
    file: Annotated[Path, typer.Argument(help="FILE.safetensors written by export")],
    teacher: Annotated[
        str,
        typer.Argument(help="local folder, .gguf file or hub id that it was made from"),
    ],
    out_dir: Annotated[Path, typer.Argument(help="new or empty folder for the student")],
    trust_remote_code: Trust = False,
) -> None:
    """Make the student of TEACHER that FILE was exported from; refused if TEACHER is another
    model."""
    from ..storage.checkpoint import save_converted
    from ..storage.exporting import apply_surgery, require_export
    from ..storage.files import new_folder, require_empty
    from ..storage.loading import load_teacher

    quieten()
    require_empty(out_dir)
    require_export(file)
    stock = load_teacher(teacher, trust_remote_code=trust_remote_code)
    student = apply_surgery(file, stock)
    with new_folder(out_dir) as made:
        save_converted(student, teacher, made, place=out_dir)
    typer.echo(f"saved in {out_dir}")


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
    """Upload FOLDER to the hub with a model card: base model, settings, evaluation, how to load
    it."""
    from ..storage.publishing import push_to_hub

    typer.echo(f"pushed to {push_to_hub(folder, repo, base_model, report=report, private=private)}")
