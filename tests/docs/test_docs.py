"""The documentation runs, prints what it shows, builds, and names what there is."""

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_kernel_ffn

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "pages"
API = PAGES / "api"
PACKAGE = Path(hf_kernel_ffn.__file__).parent
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
CODE_PATH = re.compile(
    r"(?<![\w/.-])((?:scripts|recipes|docs|tests|hf_kernel_ffn)/[\w./²-]*\w)(?![\w{*])"
)
MADE_BY_COMMANDS = ("recipes/results/",)
"""Paths below these may be named as the place of an output."""
SIZE_OF_README = 14_000
"""Bytes: what a reader takes in before they try it."""


def load_runner():
    spec = importlib.util.spec_from_file_location("run_docs", ROOT / "scripts" / "run_docs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_docs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


runner = load_runner()


def all_pages():
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(PAGES.rglob("*.md"))]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def pages_to_run(slow):
    """Pages with a block that runs in the quick tests, or with one that is slow."""
    found = []
    for page in all_pages():
        blocks = [
            block for block in runner.blocks(page.read_text(encoding="utf-8")) if not block.never
        ]
        if any(block.slow for block in blocks) if slow else any(not block.slow for block in blocks):
            found.append(name_of(page))
    return found


def run_pages(folder, names, *options):
    """Reports by page, of one run of scripts/run_docs.py."""
    report = folder / "report.json"
    command = [sys.executable, ROOT / "scripts" / "run_docs.py", *(ROOT / name for name in names)]
    done = subprocess.run(
        [*command, "--json", report, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert report.exists(), done.stderr
    reports = json.loads(report.read_text(encoding="utf-8"))
    return {name_of(Path(entry["page"])): entry for entry in reports}


@pytest.fixture(scope="session")
def quick_reports(tmp_path_factory):
    return run_pages(tmp_path_factory.mktemp("docs"), pages_to_run(slow=False))


@pytest.fixture(scope="session")
def slow_reports(tmp_path_factory):
    return run_pages(tmp_path_factory.mktemp("docs"), pages_to_run(slow=True), "--slow")


@pytest.mark.parametrize("page", pages_to_run(slow=False))
def test_quick_blocks_print_what_the_page_shows(quick_reports, page):
    assert quick_reports[page]["failures"] == []
    assert quick_reports[page]["ran"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_to_run(slow=True))
def test_all_blocks_print_what_the_page_shows(slow_reports, page):
    assert slow_reports[page]["failures"] == []
    assert slow_reports[page]["ran"] > 0


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The documentation, built; a warning is an error."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        ROOT / "docs" / "mkdocs.yml",
        "-d",
        folder,
    ]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_without_a_warning(site):
    assert (site / "index.html").exists()
    assert (site / "assets" / "llama-frontier.png").exists()
    assert (site / "assets" / "readout.svg").exists()


def test_the_page_of_commands_has_every_command(site):
    text = (site / "guide" / "commands" / "index.html").read_text(encoding="utf-8")
    for command in ("convert", "distill", "evaluate", "read", "verify"):
        assert f'id="{command}"' in text


def test_docstring_roles_are_not_shown(site):
    text = (site / "api" / "conversion" / "index.html").read_text(encoding="utf-8")
    assert ":func:" not in text


def directives():
    return {
        name
        for page in API.glob("*.md")
        for name in DIRECTIVE.findall(page.read_text(encoding="utf-8"))
    }


@pytest.mark.parametrize("name", sorted(set(hf_kernel_ffn.__all__) - {"__version__"}))
def test_every_public_name_is_in_the_api_pages(name):
    assert f"hf_kernel_ffn.{name}" in directives()


def test_every_public_name_is_on_its_page_of_the_site(site):
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    missing = [name for name in hf_kernel_ffn.__all__ if f'id="hf_kernel_ffn.{name}"' not in text]
    assert missing in ([], ["__version__"])


def test_every_folder_of_the_package_has_an_api_page():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {f"hf_kernel_ffn.{folder}" for folder in folders} <= directives()


def test_every_name_that_a_page_imports_exists():
    """In blocks that are never run too."""
    for page in all_pages():
        for block in runner.blocks(page.read_text(encoding="utf-8")):
            if block.language != "python":
                continue
            for node in ast.walk(ast.parse(block.code)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "hf_kernel_ffn"
                ):
                    module = importlib.import_module(node.module)
                    missing = [a.name for a in node.names if not hasattr(module, a.name)]
                    assert not missing, f"{name_of(page)}: {node.module} has no {missing}"


@pytest.mark.parametrize("page", [name_of(page) for page in all_pages()])
def test_every_file_that_a_page_names_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in CODE_PATH.findall(text):
        if not path.startswith(MADE_BY_COMMANDS):
            assert (ROOT / path).exists(), path


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= SIZE_OF_README


PAGE = """# Page

```bash
echo out > runs/file
```

```python
x = 1.004
print(f"x is {x}")
```

```text
x is 1.0
```

<!-- run: no, needs a hub -->
```python
raise SystemExit
```

<!-- run: slow -->
```python
raise ValueError("slow")
```

```bash
cat runs/file
```

```text
old
```
"""


def run_one(tmp_path, text, *options):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    report = tmp_path / "report.json"
    command = [sys.executable, ROOT / "scripts" / "run_docs.py", page, "--json", report, *options]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return (
        done.returncode,
        json.loads(report.read_text(encoding="utf-8"))[0],
        page.read_text(encoding="utf-8"),
    )


def test_the_runner_finds_an_output_that_is_not_as_shown(tmp_path):
    code, report, text = run_one(tmp_path, PAGE)
    assert code == 1 and text == PAGE
    assert (report["ran"], report["left_out"]) == (3, 2)
    assert len(report["failures"]) == 1 and "old" in report["failures"][0]


def test_the_runner_writes_what_is_printed(tmp_path):
    code, report, text = run_one(tmp_path, PAGE, "--write")
    assert code == 0 and report["failures"] == []
    assert text == PAGE.replace("x is 1.0\n", "x is 1.004\n").replace("old\n", "out\n")


def test_the_runner_runs_slow_blocks_on_request_and_stops_where_one_fails(tmp_path):
    code, report, text = run_one(tmp_path, PAGE, "--slow", "--write")
    assert code == 1 and text == PAGE
    assert "ValueError: slow" in report["failures"][0]
    assert (report["ran"], report["left_out"]) == (3, 1)


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("a 1.00 b", "a 1.01 b", True),
        ("a 1.00 b", "a 1.05 b", False),
        ("a 1.00 b", "a 1.00 c", False),
        ("a 1 b", "a 1 2 b", False),
        ("KL 0.000006", "KL 0.000001", True),
        ("-2e-06", "-9e-06", True),
        ("3.0e5", "3.1e5", False),
    ],
)
def test_numbers_may_differ_in_their_last_digits(shown, printed, expected):
    assert runner.same(shown, printed) is expected
