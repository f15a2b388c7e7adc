"""The table and the figure of the frontier, from its reports."""

from __future__ import annotations

import csv
from pathlib import Path

from frontier_rows import CONTROLS

from hf_kernel_ffn.storage.files import replace_file

COLUMNS = (
    "row", "regime", "tokens", "parameters_per_layer", "prototypes", "active_prototypes",
    "active_prototypes_student_inputs", "dead_prototypes", "delta_cross_entropy", "kl",
    "top1_agreement", "loss_recovered", "cloze", "fvu", "coherence", "orthogonal_coherence",
    "effective_prototypes", "opposed_share", "write_mass_ratio", "seed",
)  # fmt: skip
"""Of table.csv."""
HEAD = (
    "| # | | regime | parameters | tokens | ΔCE | KL | top-1 | cloze | read | own | dead "
    "| coherence | 1/√n_eff | opposed | mass |"
)
"""Of table.md. ``read`` is how many rows of the dictionary a token reads, of how many, at the
teacher's inputs (as all figures of readability are); ``own`` the same when the student runs."""
GROUPS = ("operating points", "dense", "sparse", "controls")
MARKS = {"kernel": "o", "recipe": "*", "teacher": "s", "transcoder": "^"}
LEAST_LOSS = 1e-4
"""ΔCE that is drawn at the bottom of a logarithmic axis, for all that have less."""


def find_group(report: dict) -> int:
    """Return the number in GROUPS of a report."""
    if report["kind"] == "recipe":
        return 0
    if report["kind"] != "kernel":
        return 3
    if str(report["settings"].get("kernel", "")).startswith(CONTROLS):
        return 3
    return 2 if report["settings"].get("top_k") else 1


def write_csv(reports: list[dict], file: Path) -> None:
    """Write COLUMNS of every report, whole or not at all."""
    with (
        replace_file(file) as beside,
        beside.open("w", encoding="utf-8", newline="") as opened,
    ):
        writer = csv.DictWriter(opened, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(reports)


def format_markdown(reports: list[dict]) -> str:
    """Format the table, a line per report, by groups."""
    cells = HEAD.count("|") - 1
    lines = [HEAD, "|" + "---|" * cells, format_untouched(reports[0])]
    before = None
    for number, report in enumerate(reports, 1):
        group = find_group(report)
        if group != before:
            lines.append(f"| | *{GROUPS[group]}* {'| ' * (cells - 2)}|")
        lines.append(format_report(number, report))
        before = group
    return "\n".join(lines) + "\n"


def format_untouched(report: dict) -> str:
    """The line of the teacher itself, as any of the reports has it."""
    return (
        f"| | *the teacher, untouched* | linear | | | 0 | 0 | 100% "
        f"| {format_share(report['teacher_cloze'])} "
        f"| {report['teacher_active_prototypes']:.0f} | | | {report['teacher_coherence']:.3f} "
        f"| {report['teacher_orthogonal_coherence']:.3f} "
        f"| {report['teacher_opposed_share']:.3f} | 1 |"
    )


def format_report(number: int, report: dict) -> str:
    """One line of the table."""
    own = report.get("active_prototypes_student_inputs")
    return (
        f"| {number} | {report['row']} | {report['regime']} "
        f"| {report['parameters_per_layer'] / 1000:.0f}k | {report['tokens'] / 1e6:.1f}M "
        f"| {report['delta_cross_entropy']:.4f} | {report['kl']:.4f} "
        f"| {report['top1_agreement']:.1%} | {format_share(report.get('cloze'))} "
        f"| {report['active_prototypes']:.1f} of {report['prototypes']} "
        f"| {'–' if own is None else format(own, '.1f')} | {report['dead_prototypes']:.0f} "
        f"| {report['coherence']:.3f} | {report['orthogonal_coherence']:.3f} "
        f"| {report['opposed_share']:.3f} | {report['write_mass_ratio']:.2f} |"
    )


def format_share(value: float | None) -> str:
    """Percent, or a dash where nothing was asked."""
    return "–" if value is None else f"{value:.1%}"


def plot(reports: list[dict], file: Path) -> None:
    """Plot ΔCE against active prototypes per token, coloured by coherence, and against coherence;
    points by their number in the table."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(14, 7), layout="constrained", sharey=True)
    scale = plt.Normalize(0, max(report["coherence"] for report in reports))
    losses = [max(report["delta_cross_entropy"], LEAST_LOSS) for report in reports]
    for axes, across in zip(panels, ("active_prototypes", "coherence"), strict=True):
        for kind, mark in MARKS.items():
            places = [place for place, report in enumerate(reports) if report["kind"] == kind]
            points = axes.scatter(
                [reports[place][across] for place in places],
                [losses[place] for place in places],
                c=[reports[place]["coherence"] for place in places],
                norm=scale,
                cmap="viridis",
                marker=mark,
                s=160 if mark == "*" else 70,
                edgecolors="black",
                linewidths=0.6,
                label=kind,
            )
        for number, (report, loss) in enumerate(zip(reports, losses, strict=True), 1):
            point = (report[across], loss)
            axes.annotate(str(number), point, xytext=(5, 3), textcoords="offset points", fontsize=8)

    panels[0].set(xscale="log", yscale="log", xlabel="active prototypes per token")
    panels[0].set_ylabel("ΔCE (nats per token; 1e-4 or less at the bottom)")
    panels[1].set_xlabel("coherence")
    panels[0].legend()
    figure.colorbar(points, label="coherence")
    figure.savefig(file, dpi=90)
