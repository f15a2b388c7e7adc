"""Steering scored, on a shipped teacher with few goals."""

import json

import edit_scores
import typer
from teachers import RECIPES
from typer.testing import CliRunner


def test_edits_of_a_teacher_are_scored(tmp_path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    app = typer.Typer()
    app.command()(edit_scores.main)
    out = tmp_path / "edits.json"
    options = ["--edits", "2", "--others", "1", "--tokens", "512", "--out", str(out)]
    done = CliRunner().invoke(app, ["recipes/teachers/llama", *options])
    assert done.exit_code == 0, done.output

    (row,) = json.loads(out.read_text())
    assert row["model"] == "llama" and row["goals"] == 2
    assert row["edits that reach 50%"] in (0.5, 1.0)
    assert 0 < row["collateral KL, median"] < 1
