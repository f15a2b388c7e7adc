"""The picture of real_frontier.py, with what others publish of other models beside."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARKS = {"kernel": "*", "teacher": "o", "transcoder": "^"}
COUNTS = (24, 48, 96, 192, 384)
"""Active units that the axis names."""
WORST = 1.5
"""nats; rows that lose more are not drawn."""
VPD_PARTS = 205
VPD_LOSSES = (0.13, 0.23)
"""Adversarial parameter decomposition of a model of 67M: cross-entropy 2.71 → 2.84 to 2.94."""
CLT_AGREEMENT = 0.5
"""About how often a cross-layer transcoder in place of all FFNs agrees on the next token (Ameisen
et al. 2025)."""


def plot(reports: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw ΔCE and top-1 agreement against active units per token: a line for each kind of row,
    training text, rate and test text, a column of panels for each test text."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    texts = list(reports[0]["texts"])
    figure, panels = plt.subplots(
        2,
        len(texts),
        figsize=(6 * len(texts), 8),
        layout="constrained",
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for column, text in enumerate(texts):
        losses, agreements = panels[:, column]
        for label, rows in group(reports).items():
            active = [row["active"] for row in rows]
            options = {"marker": MARKS[rows[0]["kind"]], "label": label, "markersize": 9}
            losses.plot(
                active, [row["texts"][text]["delta_cross_entropy"] for row in rows], **options
            )
            agreements.plot(
                active, [row["texts"][text]["top1_agreement"] for row in rows], **options
            )
        draw_others(losses, agreements)
        losses.set(title=text, xscale="log", ylim=(0, WORST))
        agreements.set(xscale="log", xlabel="active units per token and layer")
        agreements.set_xticks(COUNTS, map(str, COUNTS), minor=False)
        agreements.set_xticks([], minor=True)
    panels[0, 0].set_ylabel("ΔCE (nats per token)")
    panels[1, 0].set_ylabel("top-1 agreement")
    panels[0, 0].legend(fontsize=8)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def group(reports: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The trained rows that are drawn, by label and in the order of their active units."""
    groups: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for report in sorted(reports, key=lambda report: report["active"]):
        worst = max(each["delta_cross_entropy"] for each in report["texts"].values())
        if report["trained"] and worst <= WORST:
            name = report["row"].removesuffix(f", {report['count']}")
            label = f"{name}, {Path(report['train']).stem}"
            groups[f"{label}, rate {report['learning_rate']:g}"].append(report)
    return dict(groups)


def draw_others(losses: Any, agreements: Any) -> None:
    """Mark what others publish, of other models and texts."""
    losses.plot([VPD_PARTS] * 2, VPD_LOSSES, color="grey", linewidth=5, alpha=0.5)
    losses.annotate(
        "VPD, another model (67M)", (VPD_PARTS, VPD_LOSSES[1]), fontsize=8, color="grey", ha="right"
    )
    agreements.axhline(CLT_AGREEMENT, color="grey", linestyle=":")
    agreements.annotate(
        "cross-layer transcoders, another model",
        (0.02, CLT_AGREEMENT + 0.005),
        xycoords=("axes fraction", "data"),
        fontsize=8,
        color="grey",
    )
