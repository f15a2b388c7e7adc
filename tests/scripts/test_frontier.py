"""The frontier script: its rows, and that what it has measured once stays and becomes a table."""

import csv
import json

import frontier
import pytest
from frontier_rows import make_recipe, make_rows
from teachers import RECIPES
from typer.testing import CliRunner

TRUNCATED, SPARSE = "teacher truncated to 3", "half-yat, top-k 3"  # of 48 units


@pytest.fixture(scope="module")
def root():
    """In the root of the project, where the script finds recipes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RECIPES.parent)
        yield


@pytest.fixture(scope="module")
def run(root, teacher_folder, text_file):
    """Run the rows whose name contains ``only`` for a tiny Llama; the names it says it ran."""

    def run(out, only, *more):
        text = ["--train", text_file, "--test", text_file, "--cloze", ""]
        arguments = [
            "run",
            teacher_folder("llama"),
            "--out",
            out,
            "--only",
            only,
            "--tokens",
            2048,
            "--test-tokens",
            1024,
        ]
        done = CliRunner().invoke(
            frontier.app, [*map(str, [*arguments, *text, *more])], catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
        return [
            line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith("row ")
        ]

    return run


@pytest.fixture(scope="module")
def reports(run, tmp_path_factory):
    """The folder of three rows, two of them with training."""
    out = tmp_path_factory.mktemp("frontier") / "reports"
    assert run(out, TRUNCATED) == [TRUNCATED]
    assert run(out, SPARSE) == [SPARSE]
    assert run(out, "teacher, top-k 3") == ["teacher, top-k 3, trained"]
    return out


def read(out):
    found = [json.loads(file.read_text(encoding="utf-8")) for file in out.glob("*.json")]
    return {report["row"]: report for report in found}


def test_the_controls_are_among_the_rows(root):
    rows = make_rows(512, True, "llama")
    assert {
        "polarised half-yat",
        "gated half-yat",
        "half-yat, threshold 32, write mass",
        "teacher truncated to 32",
        "teacher truncated to 16",
        "teacher, threshold 32, trained",
        "teacher trained further",
        "transcoder, 1m wide, top-k 32",
        "transcoder, 4m wide, top-k 32, skip",
    } <= rows.keys()
    assert {name for name in rows if name.startswith("recipe ")} == {
        f"recipe {file.stem}" for file in RECIPES.glob("llama-*.yaml")
    }
    plain = make_rows(512, False, "gpt2")
    assert "single half-yat" in plain and not [
        name for name in plain if "gated" in name or "polarised" in name
    ]
    for name, row in {**rows, **plain}.items():  # the name says how many
        if row.settings.get("top_k"):
            assert str(row.settings["top_k"]) in name.replace(",", "").split()


@pytest.mark.parametrize("units, gated, family", [(512, True, "llama"), (512, False, "gpt2")])
def test_every_row_is_a_recipe_of_the_same_budget(root, registry, units, gated, family):
    for name, row in make_rows(units, gated, family).items():
        recipe = make_recipe("", row, "text.txt", 1000, 3)
        recipe.kernel_settings()  # which are not refused
        if row.kind == "recipe":
            continue
        assert sum(stage.tokens for stage in recipe.stages) == 1000 and recipe.seed == 3, name
        assert any(stage.write_mass for stage in recipe.stages) == ("write mass" in name)


def test_a_report_per_row(reports):
    found = read(reports)
    assert found.keys() == {TRUNCATED, SPARSE, "teacher, top-k 3, trained"}
    for report in found.values():
        assert report["kl"] > 0 and report["fvu"] > 0 and report["test_tokens"] == 4 * 255
        assert report["active_prototypes"] <= 3 < report["teacher_active_prototypes"]
        assert report["teacher_cloze"] is None and "cloze" not in report
    assert found[TRUNCATED]["tokens"] == 0 and found[TRUNCATED]["stages"] == []
    assert found[SPARSE]["tokens"] == found["teacher, top-k 3, trained"]["tokens"] == 2048
    assert (found[TRUNCATED]["prototypes"], found[SPARSE]["prototypes"]) == (48, 96)
    assert found[SPARSE]["parameters_per_layer"] == 2 * 96 * 32 + 96 + 32 + 2  # ε and the scale
    assert found[TRUNCATED]["kl"] != found["teacher, top-k 3, trained"]["kl"]


def test_what_is_there_is_not_run_again(reports, run, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in reports.iterdir()}
    monkeypatch.setattr(frontier, "measure", lambda *arguments: pytest.fail("measured again"))
    for only in (TRUNCATED, SPARSE):
        assert run(reports, only) == []
    assert {file: file.stat().st_mtime_ns for file in reports.iterdir()} == before


def test_parts_share_the_rows(run, monkeypatch, tmp_path):
    figures = dict.fromkeys(("delta_cross_entropy", "kl", "top1_agreement", "coherence"), 0.0)
    monkeypatch.setattr(frontier, "measure", lambda name, *more: {"row": name, **figures})
    one, two = (run(tmp_path, "threshold", "--part", part) for part in ("1/2", "2/2"))
    wanted = [name for name in make_rows(48, True, "llama") if "threshold" in name]
    assert sorted([*one, *two]) == sorted(wanted) == sorted(read(tmp_path))
    assert abs(len(one) - len(two)) <= 1


def test_the_table_and_the_figure(reports):
    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(frontier.app, ["show", str(reports)], catch_exceptions=False)
    assert done.exit_code == 0
    found, markdown = read(reports), (reports / "table.md").read_text(encoding="utf-8")
    assert done.stdout == markdown
    with (reports / "table.csv").open(encoding="utf-8", newline="") as file:
        table = {row["row"]: row for row in csv.DictReader(file)}
    assert table.keys() == found.keys()
    for name, report in found.items():
        assert float(table[name]["kl"]) == report["kl"] and f"| {name} |" in markdown
    assert f"| {found[SPARSE]['kl']:.4f} |" in markdown
    assert (reports / "frontier.png").read_bytes().startswith(b"\x89PNG")
    again = markdown
    CliRunner().invoke(
        frontier.app, ["show", str(reports)], catch_exceptions=False
    )  # what it wrote is no report
    assert (reports / "table.md").read_text(encoding="utf-8") == again


def test_nothing_to_show(tmp_path):
    done = CliRunner().invoke(frontier.app, ["show", str(tmp_path)])
    assert done.exit_code != 0 and not list(tmp_path.iterdir())
