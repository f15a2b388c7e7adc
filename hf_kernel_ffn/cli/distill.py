"""hf-kernel-ffn record and distill."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from .options import quieten


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
    exact: Annotated[
        bool, typer.Option("--exact", help="probabilities in float32, in three times the bytes")
    ] = False,
) -> None:
    """Run the teacher of RECIPE over what its logits stages will read, and write its likeliest
    tokens to OUT_DIR."""
    from ..distillation import load_recipe
    from ..distillation.recording import record

    quieten()
    loaded = load_recipe(recipe, overrides)
    record(loaded, out_dir, top_k, processes, exact=exact, say=typer.echo)
    typer.echo(f"saved in {out_dir}")


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
    """Distil a converted model back to its teacher by RECIPE. Also: accelerate launch
    scripts/distill.py RECIPE …"""
    from ..distillation import Terminated, distill, load_recipe

    quieten()
    try:
        out = distill(load_recipe(recipe, overrides), resume=resume)
    except Terminated as stopped:
        sys.stderr.write(f"{stopped}\n")
        raise typer.Exit(stopped.exit_code) from stopped
    typer.echo(f"saved in {out}")
