"""Readings of students that differ in their kernel, on a tiny teacher."""

import json

import kernel_readings
import pytest
import typer
from real_frontier_saved import save_row
from teachers import RECIPES
from typer.testing import CliRunner

from hf_kernel_ffn import KernelFFNConfig, convert, load_teacher


def test_every_model_is_read_in_the_same_way(teacher_folder, text_file, ids, tmp_path):
    folder = teacher_folder("llama")
    settings = {"rows": "tied", "simplex": "threshold", "top_k": 6}
    student, _ = convert(load_teacher(folder), KernelFFNConfig(**settings), calibration_ids=ids)
    save_row(student, "kernel", settings, tmp_path / "sparse.safetensors")

    app = typer.Typer()
    app.command()(kernel_readings.main)
    out = tmp_path / "out.json"
    code = RECIPES.parent / "hf_kernel_ffn" / "checkpoint_code" / "ffn.py"
    arguments = [folder, tmp_path / "sparse.safetensors", "--out", out, "--text", text_file]
    language = RECIPES / "text" / "german.txt"
    options = ["--tokens", 2048, "--code", code, "--language", language]
    done = CliRunner().invoke(app, [*map(str, arguments), *map(str, options)])
    assert done.exit_code == 0, done.output

    teacher, sparse = json.loads(out.read_text())
    assert (teacher["model"], sparse["model"]) == (folder.name, "sparse")
    for row in (teacher, sparse):
        assert 0 < row["purity"] <= 1
        assert all(0 <= row[name] <= 1 for name in row if name.startswith("auc_"))
    # The rows are the teacher's: so far away as they are.
    for against in ("scrambled", "code", "language"):
        name = f"auc_nearest_{against}"
        assert sparse[name] == pytest.approx(teacher[name], abs=0.02)
