"""hf-kernel-ffn families."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .options import Trust, quieten
from .tables import print_table


def families(
    explain: Annotated[
        Optional[str],
        typer.Option(
            metavar="MODEL",
            help="what looks like an FFN in this model, and which entry describes it",
        ),
    ] = None,
    check: Annotated[
        Optional[str],
        typer.Option(
            metavar="MODEL",
            help="whether what its family's entry says by names is so by numbers",
        ),
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """List the architectures that can be converted."""
    from ..families.lookup import join_path
    from ..families.registry import ARCHITECTURES

    if explain is not None:
        from ..families.detection import explain_ffns
        from ..storage.loading import load_empty_teacher

        quieten()
        rows = explain_ffns(load_empty_teacher(explain, trust_remote_code))
        print_table(["FFN", "sizes", "activation", "entry"], [list(row.values()) for row in rows])
        return
    if check is not None:
        _check_family(check, trust_remote_code)
        return
    print_table(
        ["model_type", "FFN", "W_in", "gate", "W_out", "default values"],
        [
            [
                a.model_type,
                " ".join(join_path(stack, "*", a.ffn) for stack in a.stacks),
                a.up,
                a.gate or ("–" if a.gate_half is None else f"half {a.gate_half}"),
                a.down,
                "product" if a.gated else "fixed",
            ]
            for a in ARCHITECTURES.values()
        ],
    )


def _check_family(model: str, trust_remote_code: bool) -> None:
    """Print what the entry for ``model`` claims; InputError if a claim is wrong."""
    from ..checkpoint_code.errors import InputError
    from ..reading.validate import check_family
    from ..storage.loading import load_teacher

    quieten()
    checks = check_family(load_teacher(model, trust_remote_code=trust_remote_code))
    verdicts = {True: "ok", False: "NOT OK", None: "–"}
    rows = [
        [
            check.claim,
            "–" if check.error is None else f"{check.error:.1e}",
            verdicts[check.ok],
            check.reason,
        ]
        for check in checks
    ]
    print_table(["claim", "error", "", ""], rows)
    wrong = sum(check.ok is False for check in checks)
    if wrong:
        raise InputError(
            f"found {wrong} claim{'s' * (wrong > 1)} of the family's entry wrong, expected none: "
            "see the table, and mend the Architecture"
        )
