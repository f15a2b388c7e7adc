"""What gpu_day.py found, as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def format_table(found: dict[str, dict]) -> str:
    """A line for every part with its seconds, and below it its figures or its error."""
    lines = []
    for name, entry in found.items():
        lines.append(f"{name}: {entry.get('seconds', 0)} s{', FAILED' if 'error' in entry else ''}")
        if "result" in entry:
            form = FORMS.get(name.split()[0], format_plainly)
            try:
                lines += [f"  {line}" for line in form(entry["result"])]
            except (KeyError, TypeError, IndexError, AttributeError):
                lines += [f"  {line}" for line in format_plainly(entry["result"])]
        if "error" in entry:
            lines += [f"  | {line}" for line in entry["error"].splitlines()[-6:]]
    return "\n".join(lines)


def format_plainly(result: Any) -> Iterator[str]:
    """The figures of ``result`` that are no collections."""
    for name, value in result.items() if isinstance(result, dict) else ():
        if not isinstance(value, (dict, list)):
            yield f"{name} {show(value)}"


def format_accuracy(result: list[dict]) -> Iterator[str]:
    """Errors of output and gradients, plain and fused."""
    for row in result:
        plain = format_errors(row["plain"])
        other = row.get("not fused") or row.get("failed")
        fused = f"({other})"[:100] if other else format_errors(row["fused"])
        yield f"{row['readout']:36} {row['dtype']:9} plain {plain}  fused {fused}"


def format_errors(errors: dict) -> str:
    """Output and gradient error."""
    return " ".join(f"{errors[name]:.1e}" for name in ("output", "gradient") if name in errors)


def format_speed(result: dict) -> Iterator[str]:
    """Milliseconds, and times those of the stock FFN."""
    for row in result["rows"]:
        held = f"{row['memory'] / 2**20:8.1f} MiB" if "memory" in row else ""
        yield (
            f"{row.get('shape', ''):13} {row['mode']:9} {row['phase']:17} {row['variant']:26} "
            f"{row['seconds']['median'] * 1e3:9.3f} ms {row['ratio']['median']:6.2f} × "
            f"{row['against']} {held}"
        )


def format_distil(result: dict) -> Iterator[str]:
    """Tokens per second and losses of the stages, and the memory."""
    yield f"conversion {result['conversion_seconds']:.1f} s"
    for kind, run in (("probe", result["probe"]), ("run", result)):
        for stage in run.get("stages", []):
            yield (
                f"{kind:6} {stage['stage']:11} {stage['tokens']:>10,} tokens "
                f"{stage['tokens_per_second']:>10,.0f} tokens/s, "
                f"loss {stage['first_loss']:.4g} to {stage['last_loss']:.4g}"
            )
    if "epochs" in result:
        yield f"peak {result['peak_gpu_gb']:.1f} GB, the text {result['epochs']:.1f} times"


def format_evaluation(result: dict) -> Iterator[str]:
    """Fidelity, and FVU where it was measured."""
    names = ("tokens", "delta_cross_entropy", "kl", "top1_agreement")
    yield ", ".join(f"{name} {show(result[name])}" for name in names)
    layers = result.get("mean_of_layers", {})
    for name in ("fvu", "fvu_student_inputs", "active_prototypes_student_inputs"):
        if name in layers:
            yield f"{name}, mean of layers {show(layers[name])}"


def format_generation(result: dict) -> Iterator[str]:
    """Tokens per second, and the student's over the teacher's."""
    for name, speed in result["tokens_per_second"].items():
        share = result["ratio"].get(name)
        over = f", {share['median']:.2f} × the teacher's" if share else ""
        yield f"{name:16} {speed['median']:8.1f} tokens/s{over}"


def format_tests(result: dict) -> Iterator[str]:
    """How many passed, and what failed."""
    for name, counts in result.items():
        yield f"{name}: {', '.join(f'{key} {show(value)}' for key, value in counts.items())}"


def show(value: Any) -> str:
    """A figure with four digits that matter, whatever else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).strip()


FORMS: dict[str, Callable[[Any], Iterator[str]]] = {
    "accuracy": format_accuracy,
    "speed": format_speed,
    "distil": format_distil,
    "evaluate": format_evaluation,
    "generate": format_generation,
    "tests": format_tests,
}
"""By the first word of a part's name."""
