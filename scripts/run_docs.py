#!/usr/bin/env python3
"""Run the bash and python blocks of Markdown pages in order, and check what the pages show.

    python scripts/run_docs.py README.md docs/pages      # quick pages and quick blocks
    python scripts/run_docs.py docs/pages --slow         # whatever needs no hub and no GPU
    python scripts/run_docs.py PAGE --slow --write       # write what is printed into the page

Every page runs in a copy of the project, so nothing that it writes stays. All python blocks of a
page are one session. The ``text`` block after a python block shows what that block printed. One
after a bash block does so too; without one the output of a bash block is not looked at. Numbers
may differ by 2%.

Comments in a page say what is not to be run, or when:

    <!-- run: no, needs a hub -->          the next block never runs
    <!-- run: slow -->                     the next block runs with --slow only
    <!-- run: output varies -->            the next block runs, and its output is not compared
    <!-- page: slow, trains a model -->    the same for all blocks without a comment of their own
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = (".*", "__pycache__", "runs", "build", "dist", "tests", "results")
"""What a copy of the project leaves out: no page may read it."""
TOLERANCE = 0.02
"""How far a number may be from the one shown, as a share of it: processors round differently."""
NOISE = 1e-4
"""Numbers below this count as zero."""
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
PAGE_MARK = re.compile(r"^<!-- page: (.*?) -->$", re.MULTILINE)
BLOCK = re.compile(
    r"^(?:<!-- run: (?P<mark>.*?) -->\n+)?"
    r"```(?P<language>bash|python)\n(?P<code>.*?)^```\n"
    r"(?P<output>\n```text\n(?P<shown>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One block of a page."""

    language: str
    code: str
    mark: str
    """What a comment says of it, or of its page."""
    shown: str | None
    """The text block after it; None if there is none."""
    line: int
    match: re.Match[str]

    @property
    def never(self) -> bool:
        return self.mark.split(",")[0] == "no"

    @property
    def slow(self) -> bool:
        return self.mark.split(",")[0] == "slow"

    @property
    def varies(self) -> bool:
        return "output varies" in self.mark


@dataclass
class Report:
    """What came of one page."""

    page: str
    seconds: float = 0.0
    ran: int = 0
    left_out: int = 0
    failures: list[str] = field(default_factory=list)


def blocks(text: str) -> list[Block]:
    """The bash and python blocks of a page, in order."""
    page_mark = PAGE_MARK.search(text)
    found = []
    for match in BLOCK.finditer(text):
        mark = match["mark"] or (page_mark[1] if page_mark else "")
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(match["language"], match["code"], mark, match["shown"], line, match))
    return found


def pages(paths: list[Path]) -> list[Path]:
    """The Markdown files among ``paths`` and in the folders among them, sorted by name."""
    found: list[Path] = []
    for path in paths:
        found += sorted(path.rglob("*.md")) if path.is_dir() else [path]
    return found


def same(shown: str, printed: str) -> bool:
    """Whether two outputs are the same, but for the last digits of their numbers."""
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    return all(
        _close(a, b) for a, b in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    )


def _close(shown: str, printed: str) -> bool:
    decimals = len(shown.partition("e")[0].partition(".")[2])
    last_digit = 10.0**-decimals if "e" not in shown else 0.0
    allowed = max(TOLERANCE * abs(float(shown)), last_digit, NOISE)
    return abs(float(shown) - float(printed)) <= allowed * 1.001


def run_page(page: Path, slow: bool, write: bool) -> Report:
    """Run the blocks of ``page`` in the current folder; ``write`` puts what they print into it."""
    text = page.read_text(encoding="utf-8")
    report, session = Report(str(page)), {"__name__": "__docs__"}
    pieces, end = [], 0
    for block in blocks(text):
        if block.never or (block.slow and not slow):
            report.left_out += 1
            continue
        report.ran += 1
        where = f"{page}:{block.line}"
        try:
            printed = _run(block, session, where)
        except (
            BaseException
        ) as error:  # the block may do anything; the blocks after it may need what it did not do
            report.failures.append(f"{where}: {_reason(error)}")
            break
        if write:
            pieces += [text[end : block.match.start()], _with_output(block, printed)]
            end = block.match.end()
        elif not block.varies and not _as_shown(block, printed):
            report.failures.append(
                f"{where}: the page shows\n{block.shown or ''}\nbut the block printed\n{printed}"
            )
    if write and not report.failures:
        page.write_text("".join([*pieces, text[end:]]), encoding="utf-8")
    return report


def _run(block: Block, session: dict[str, Any], where: str) -> str:
    """What the block printed, without spaces at the ends of lines."""
    if block.language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", block.code]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
        printed = done.stdout
    else:
        caught = io.StringIO()
        with contextlib.redirect_stdout(caught):
            exec(compile(block.code, where, "exec"), session)
        printed = caught.getvalue()
    return "".join(f"{line.rstrip()}\n" for line in printed.splitlines())


def _as_shown(block: Block, printed: str) -> bool:
    if block.language == "bash" and block.shown is None:
        return True
    return same(block.shown or "", printed)


def _with_output(block: Block, printed: str) -> str:
    """The text of the block as it stands in the page, with what it printed after it."""
    whole = block.match[0].removesuffix(block.match["output"] or "")
    if block.language == "bash" and block.shown is None or not printed:
        return whole
    return f"{whole}\n```text\n{printed}```\n"


def _reason(error: BaseException) -> str:
    if isinstance(error, RuntimeError) and str(error).startswith("exit code"):
        return str(error)
    return "".join(traceback.format_exception(error))


def _copy(folder: Path) -> None:
    """Put a copy of the project into ``folder``, unless there is one."""
    for path in ROOT.iterdir():
        if (
            path.name in ("recipes", "scripts", "hf_kernel_ffn", "pyproject.toml")
            and not (folder / path.name).exists()
        ):
            if path.is_dir():
                shutil.copytree(
                    path, folder / path.name, ignore=shutil.ignore_patterns(*NOT_COPIED)
                )
            else:
                shutil.copyfile(path, folder / path.name)
    (folder / "runs").mkdir(exist_ok=True)


@contextlib.contextmanager
def project_copy(work: Path | None) -> Iterator[Path]:
    """Make a copy of the project the current folder: ``work``, which stays, or a temporary one."""
    here = Path.cwd()
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory()) if work is None else work
        ).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        _copy(folder)
        os.chdir(folder)
        stack.callback(os.chdir, here)
        yield folder


COMMAND = """#!/usr/bin/env bash
exec "{python}" -m hf_kernel_ffn "$@"
"""
"""``hf-kernel-ffn`` by this project's package, whichever is installed."""


def _prepare(folder: Path) -> None:
    """Let blocks use this project's package, the interpreter's own commands, and no hub."""
    commands = folder / "runs" / "bin"
    commands.mkdir(exist_ok=True)
    command = commands / "hf-kernel-ffn"
    command.write_text(COMMAND.format(python=sys.executable), encoding="utf-8")
    command.chmod(0o755)
    sys.path[0] = str(ROOT)
    sys.path.append(str(folder))  # modules that a page writes
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    first = [str(commands), str(Path(sys.executable).parent)]
    os.environ["PATH"] = os.pathsep.join([*first, os.environ["PATH"]])
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_MODULES_CACHE"] = str(folder / "runs" / "modules")
    os.environ["OMP_NUM_THREADS"] = "1"  # outputs that do not depend on the number of cores
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["COLUMNS"] = "100"


def main(
    paths: Annotated[list[Path], typer.Argument(help="Markdown files, or folders of them")],
    slow: Annotated[bool, typer.Option("--slow", help="run what is marked slow as well")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="write what the blocks print into the pages")
    ] = False,
    work: Annotated[
        Optional[Path],
        typer.Option(help="folder to run in, which is kept  [default: a scratch one]"),
    ] = None,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write what came of each page")
    ] = None,
) -> None:
    """Run the blocks of PATHS. Exit code 1 if one fails, or prints other than its page shows."""
    chosen = [page.resolve() for page in pages(paths)]
    json_path = None if json_file is None else json_file.resolve()
    reports = []
    with project_copy(work) as folder:
        _prepare(folder)
        for page in chosen:
            start = time.perf_counter()
            report = run_page(page, slow, write)
            report.seconds = round(time.perf_counter() - start, 1)
            reports.append(report)
            verdict = "FAILED" if report.failures else "ok"
            typer.echo(
                f"{page}: {verdict}, {report.ran} blocks run in {report.seconds} s, "
                f"{report.left_out} left out"
            )
            for failure in report.failures:
                typer.echo(failure, err=True)
    if json_path is not None:
        json_path.write_text(
            json.dumps([vars(report) for report in reports], indent=1) + "\n", encoding="utf-8"
        )
    if any(report.failures for report in reports):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
