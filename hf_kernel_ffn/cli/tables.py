"""What the commands print: tables of a report and of a reading."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer

PLAIN_WIDTH = 140
"""Columns of a table that goes to no terminal."""


def print_report(report: Mapping[str, Any]) -> None:
    """Print an evaluation: figures of the predictions, and of every layer beside its teacher's."""
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
        value: Any = report
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


def print_reading(reading: Mapping[str, Any]) -> None:
    """Print a :func:`~hf_kernel_ffn.reading.summary.summary`: layers, contributions, the logit."""
    likely = ", ".join(f"{token!r} {probability:.1%}" for token, probability in reading["next"])
    typer.echo(f"at token {reading['position']} {reading['token']!r}; next: {likely}")
    _print_mixtures(reading["layers"])
    for layer in reading["layers"]:
        _print_contributions(layer)
    _print_logit(reading["logit"])


def _print_mixtures(layers: Sequence[Mapping[str, Any]]) -> None:
    """Print the figures of every layer's mixture."""
    header = [
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
    for layer in layers:
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
    print_table(header, rows)


def _print_contributions(layer: Mapping[str, Any]) -> None:
    """Print the largest contributions of one layer: shares of them where there are any."""
    contributions = layer["contributions"]
    has_shares = bool(contributions) and contributions[0]["share"] is not None
    amount = "share" if has_shares else "coefficient"
    form = ".1%" if has_shares else "+.3f"
    rows = [
        [
            contribution["name"],
            format(contribution[amount], form),
            f"{contribution['along']:+.3f}",
            contribution["writes"],
        ]
        for contribution in contributions
    ]
    print_table([f"layer {layer['layer']}", amount, "along the output", "writes"], rows)


def _print_logit(logit: Mapping[str, Any]) -> None:
    """Print the parts of the gap between two logits, or why it cannot be split."""
    rows = [
        [
            "–" if part["layer"] is None else str(part["layer"]),
            part["kind"],
            part["name"],
            f"{part['amount']:+.3f}",
        ]
        for part in logit["parts"]
    ]
    rows += [["", f"all {kind}", "", f"{amount:+.3f}"] for kind, amount in logit["kinds"].items()]
    rows += [["", "remainder", "", f"{logit['remainder']:+.1e}"]]
    gap = f"logit of {logit['token']!r} over {logit['against']!r}: {logit['value']:.3f}"
    print_table(["layer", "from", "", gap], rows)
    if "reason" in logit:
        typer.echo(logit["reason"])


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table, as wide as the terminal, or PLAIN_WIDTH where there is none."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


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
