#!/usr/bin/env python3
"""What reading a converted model is worth: a distilled student against its own untouched teacher
and against the truncated teacher.

hf-kernel-ffn distill recipes/llama-readable.yaml python scripts/experiments/readings.py
recipes/teachers/llama runs/llama-readable --out recipes/results/llama/reading
"""

import json
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import typer

MOST_USED, SPLITS, EDITS, LIKELY = 100, 200, 50, 0.5
"""Prototypes whose contexts are looked at per layer; logit gaps that are split; edits; the
probability that an edit is to reach."""
ROWS = {
    "effective prototypes": ".1f",
    "coherence": ".3f",
    "purity of the 100 most used": ".3f",
    "gap carried by 10, median": ".2f",
    "|contributions| in 10": ".1%",
    "AUC nearest, scrambled": ".2f",
    "AUC nearest, code": ".2f",
    "AUC mass, scrambled": ".2f",
    "AUC mass, code": ".2f",
    "edits that reach 50%": ".0%",
    "collateral KL, median": ".5f",
    "collateral KL, mean": ".5f",
    "new prototypes that reach 50%": ".0%",
    "their collateral KL, median": ".5f",
    "their collateral KL, mean": ".5f",
}


def main(
    teacher: Annotated[str, typer.Argument(help="local folder or hub id")],
    student: Annotated[str, typer.Argument(help="a distilled student of it")],
    out: Annotated[Path, typer.Option(help="folder of readings.json and table.md")],
    train: Annotated[
        str, typer.Option(help="ordinary text, to find contexts on")
    ] = "recipes/text/books-distil.txt",
    test: Annotated[str, typer.Option(help="text to measure on")] = "recipes/text/books-test.txt",
    code: Annotated[Path, typer.Option(help="a file of another domain")] = Path(
        "hf_kernel_ffn/readout.py"
    ),
    seed: int = 0,
) -> None:
    """Write the figures into OUT, and print the table."""
    import torch

    from hf_kernel_ffn.evaluation.baselines import teacher_as_student
    from hf_kernel_ffn.evaluation.report import evaluate_student
    from hf_kernel_ffn.reading.contexts import contexts
    from hf_kernel_ffn.reading.support import scrambled, separations
    from hf_kernel_ffn.storage.files import write_text
    from hf_kernel_ffn.storage.loading import load_student, load_teacher, load_tokenizer
    from hf_kernel_ffn.text.packing import read_token_ids

    tokenizer, stock, converted = (
        load_tokenizer(teacher),
        load_teacher(teacher),
        load_student(student),
    )
    ordinary = read_token_ids(tokenizer, [train], 256, 32_768, spread=True)
    ids = read_token_ids(tokenizer, [test], 256, 16_384)
    other = torch.tensor(tokenizer(code.read_text(encoding="utf-8"))["input_ids"])
    other = other[: len(other) // 256 * 256].view(-1, 256)
    top_k = next(iter(converted.kernel_ffns().values())).config.settings.top_k
    truncated = teacher_as_student(stock, ids=ordinary[:64], simplex="threshold", top_k=top_k)
    students = {"student": converted, "truncated": truncated}
    reports = {name: evaluate_student(model, stock, ids) for name, model in students.items()}
    goals = targets(stock, tokenizer, ids[:32], seed)
    found = {}
    for name, model in {"teacher": stock, **students}.items():
        layers = reports["student" if name == "teacher" else name]["layers"]
        layers = [layer["teacher"] for layer in layers] if name == "teacher" else layers
        used = contexts(model, ordinary.split(8))
        found[name] = entry = {
            "effective prototypes": fmean(layer["effective_prototypes"] for layer in layers),
            "coherence": fmean(layer["coherence"] for layer in layers),
            "purity of the 100 most used": fmean(
                u.purity()[u.most_used(MOST_USED)].nanmean().item() for u in used.values()
            ),
            **gaps(model, tokenizer, ids, seed),
            **edits(model, tokenizer, goals, used, ordinary[:12], ids[32:40], name == "student"),
        }
        if name != "teacher":
            entry |= {k: reports[name][k] for k in ("delta_cross_entropy", "kl")}
        if name != "truncated":  # which has the teacher's own rows
            scores = separations(model, ids, {"scrambled": scrambled(ids, seed), "code": other})
            for score in ("nearest", "mass"):
                for against in ("scrambled", "code"):
                    some = [s.auc for s in scores if (s.score, s.against) == (score, against)]
                    entry[f"AUC {score}, {against}"] = fmean(some)
        typer.echo(f"{name}: done")
    write_text(
        out / "readings.json",
        json.dumps({"teacher": teacher, "student": student, "seed": seed, **found}, indent=1)
        + "\n",
    )
    table = markdown(found)
    write_text(out / "table.md", table)
    typer.echo(table, nl=False)


def gaps(model, tokenizer, ids, seed: int) -> dict:
    """How much of the gap between the two likeliest tokens the 10 largest contributions carry, of
    whatever kind."""
    import torch

    from hf_kernel_ffn.reading import trace
    from hf_kernel_ffn.reading.attribution import logit_split

    generator, ratios, shares = torch.Generator().manual_seed(seed), [], []
    for row in torch.randint(len(ids), (SPLITS,), generator=generator).tolist():
        position = int(torch.randint(20, ids.shape[1], (1,), generator=generator))
        passed = trace(model, tokenizer, ids[row, : position + 1], [position])
        first, second = passed.logits[0].topk(2).indices.tolist()
        split = logit_split(passed, first, second, position)
        amounts = [part.amount for part in split.parts]
        ratios.append(sum(amounts[:10]) / split.value)
        shares.append(sum(map(abs, amounts[:10])) / sum(map(abs, amounts)))
    return {"gap carried by 10, median": median(ratios), "|contributions| in 10": fmean(shares)}


def targets(teacher, tokenizer, ids, seed: int) -> list:
    """Contexts of 20 to 60 tokens, and for each a token that the teacher ranks between 10th and
    1000th after it."""
    import torch

    from hf_kernel_ffn.reading import trace

    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(EDITS):
        row, end, rank = (
            int(torch.randint(*bounds, (1,), generator=generator))
            for bounds in ((0, len(ids)), (20, 61), (10, 1001))
        )
        order = trace(teacher, tokenizer, ids[row, :end], [-1]).logits[0].argsort(descending=True)
        found.append((ids[row, :end], order[rank - 1].item()))
    return found


def edits(model, tokenizer, goals, used, ordinary, others, additions: bool) -> dict:
    """Success and collateral of one rewritten prototype, or neuron, per goal, and of one new
    prototype."""
    from hf_kernel_ffn.reading import trace
    from hf_kernel_ffn.reading.steering import raise_token, raise_token_by_addition

    rewritten, added = [], []
    for context, token in goals:
        passed = trace(model, tokenizer, context, [-1])
        rewritten.append(raise_token(passed, token, used, others, probability=LIKELY))
        if additions:
            added.append(
                raise_token_by_addition(passed, token, ordinary, others, probability=LIKELY)
            )
    figures = {}
    for name, prefix, done in (("edits", "", rewritten), ("new prototypes", "their ", added)):
        kl = [result[1].collateral_kl for result in done if result is not None]
        if kl:
            figures[f"{name} that reach 50%"] = len(kl) / len(done)
            figures |= {
                f"{prefix}collateral KL, median": median(kl),
                f"{prefix}collateral KL, mean": fmean(kl),
            }
    return figures


def markdown(found: dict) -> str:
    """The figures, one line each."""
    lines = ["| | teacher | truncated teacher | student |", "|---|---|---|---|"]
    for row, form in ROWS.items():
        values = [
            format(found[who][row], form) if row in found[who] else "–"
            for who in ("teacher", "truncated", "student")
        ]
        lines.append(f"| {row} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
