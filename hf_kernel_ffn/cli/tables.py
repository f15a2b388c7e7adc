"""What the commands print: tables of a report and of a reading."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import typer


def print_report(report: dict) -> None:
    names = [
        "student.cross_entropy",
        "teacher.cross_entropy",
        "delta_cross_entropy",
        "kl",
        "top1_agreement",
        "loss_recovered",
    ]
    names += ["pooled_cosine", "pooled_cosine_centred"] if "pooled_cosine" in report else []
    if "generation" in report:
        names += ["generation.tokens_until_difference", "generation.equal_continuations"]
    rows = []
    for name in names:
        value = report
        for key in name.split("."):
            value = value[key]
        rows.append([name, f"{value:.4f}"])
    print_table(["figure", f"over {report['tokens']:,} predicted tokens"], rows)
    columns = {
        "fvu": ("FVU", ".4f"),
        "spike_tokens": ("spikes", "d"),
        "fvu_spikes": ("their FVU", ".4f"),
        "fvu_student_inputs": ("FVU own inputs", ".4f"),
        "active_prototypes": ("active", ".1f"),
        "effective_prototypes": ("effective", ".1f"),
        "coherence": ("coherence", ".4f"),
        "opposed_share": ("opposed", ".4f"),
        "write_mass_ratio": ("write mass", ".4f"),
    }
    rows = []
    for layer in report["layers"]:
        for who, figures in ((layer["path"], layer), ("  teacher", layer["teacher"])):
            cells = [
                "–" if figures.get(name) is None else format(figures[name], digits)
                for name, (_, digits) in columns.items()
            ]
            rows.append([who, *cells])
    print_table(["layer", *(title for title, _ in columns.values())], rows)
    print_spike_units(report["layers"])


def print_spike_units(layers: list[dict]) -> None:
    """Print which units write the spikes of every layer that has some; nothing if none has."""
    rows = []
    for layer in layers:
        if layer["spike_tokens"]:
            positions = layer["spike_positions"] or []
            where = ", ".join(f"{position} ({count}x)" for position, count in positions)
            units = [_format_units(whose["spike_units"]) for whose in (layer["teacher"], layer)]
            rows.append([layer["path"], where or "–", *units])
    if rows:
        print_table(["spikes of", "at positions", "written by units: teacher", "student"], rows)


def _format_units(units: list) -> str:
    """Units with their shares of a spike."""
    return ", ".join(f"{unit}: {share:.0%}" for unit, share in units) or "no few"


def print_reading(found: dict) -> None:
    typer.echo(
        f"at token {found['position']} {found['token']!r}; next: "
        + ", ".join(f"{t!r} {p:.1%}" for t, p in found["next"])
    )
    head = [
        "layer",
        "regime",
        "intensity",
        "entropy",
        "active",
        "effective",
        "coherence",
        "negative mass",
        "support",
        "",
    ]
    rows = []
    for layer in found["layers"]:
        support = layer.get("support")
        rows.append(
            [
                str(layer["layer"]),
                layer["regime"],
                f"{layer['intensity']:.2f}",
                f"{layer['entropy']:.2f}",
                str(layer["active"]),
                f"{layer['effective']:.1f}",
                f"{layer['coherence']:.3f}",
                f"{layer['negative_mass_share']:.1%}",
                "–" if support is None else f"{support['nearest']:.0f}%",
                layer["diagnosis"],
            ]
        )
    print_table(head, rows)
    for layer in found["layers"]:
        shares = layer["contributions"] and layer["contributions"][0]["share"] is not None
        rows = [
            [
                c["name"],
                f"{c['share']:.1%}" if shares else f"{c['coefficient']:+.3f}",
                f"{c['along']:+.3f}",
                c["writes"],
            ]
            for c in layer["contributions"]
        ]
        print_table(
            [
                f"layer {layer['layer']}",
                "share" if shares else "coefficient",
                "along the output",
                "writes",
            ],
            rows,
        )
    logit = found["logit"]
    rows = [
        [
            "–" if p["layer"] is None else str(p["layer"]),
            p["kind"],
            p["name"],
            f"{p['amount']:+.3f}",
        ]
        for p in logit["parts"]
    ]
    rows += [["", f"all {kind}", "", f"{amount:+.3f}"] for kind, amount in logit["kinds"].items()]
    rows += [["", "remainder", "", f"{logit['remainder']:+.1e}"]]
    print_table(
        [
            "layer",
            "from",
            "",
            f"logit of {logit['token']!r} over {logit['against']!r}: {logit['value']:.3f}",
        ],
        rows,
    )
    if "reason" in logit:
        typer.echo(logit["reason"])


def print_table(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def print_conversion(layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the figures of a conversion, by FFN path."""
    names = {
        "fvu": "FVU held out",
        "spike_tokens": "spikes",
        "spike_error": "worst spike",
        "dictionary_growth": "dictionary growth",
    }
    shown = [name for name in names if any(name in figures for figures in layers.values())]
    rows = []
    for path, figures in layers.items():
        row = [path, str(figures["prototypes"]), f"{figures['parameters']:,}"]
        for name in shown:
            value = figures.get(name)
            text = "–" if value is None else str(value)
            row.append(f"{value:.4f}" if isinstance(value, float) else text)
        rows.append(row)
    print_table(["layer", "prototypes", "parameters", *(names[name] for name in shown)], rows)
