"""What a conversion without text does to real models, by the scripts that make the tables."""

import json
import subprocess
import sys

import pytest
from teachers import RECIPES

ROOT = RECIPES.parent
EXPERIMENTS = ROOT / "scripts" / "experiments"
HELD_OUT = RECIPES / "text" / "books-test.txt"

pytestmark = pytest.mark.slow


def run(script, *arguments):
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def fetch(name):
    """The model's folder under runs, where the demo keeps it too."""
    folder = ROOT / "runs" / name
    if not (folder / "config.json").exists():
        done = run(ROOT / "scripts" / "real_models.py", name, folder)
        if done.returncode:
            pytest.skip(f"{name} cannot be fetched here: {done.stderr.strip()[-300:]}")
    return folder


def measure(script, out, *arguments):
    done = run(EXPERIMENTS / script, *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("name", "most", "top1"), [("smollm2", 0.01, 0.955), ("gemma3", 0.03, 0.93)]
)
def test_language_models_stay_near_their_teachers(name, most, top1, tmp_path):
    model = fetch(name)
    options = ["--text", HELD_OUT, "--tokens", 4096]
    found = measure("real_fidelity.py", tmp_path / "figures.json", model, *options)
    assert found["parameters_ratio"] <= 1.02
    assert max(layer["fvu"] for layer in found["layers"].values()) <= 0.01
    spikes = [layer["spike_error"] for layer in found["layers"].values()]
    assert max((error for error in spikes if error is not None), default=0.0) <= 0.05
    figures = found["texts"][HELD_OUT.name]
    assert abs(figures["delta_cross_entropy"]) <= most
    assert 0 < figures["kl"] <= most
    assert top1 <= figures["top1_agreement"] < 1


def test_sentences_keep_their_embeddings(tmp_path):
    model = fetch("minilm")
    found = measure("sentence_fidelity.py", tmp_path / "figures.json", model, "--text", HELD_OUT)
    figures = found["texts"][HELD_OUT.name]
    assert 0.99 <= figures["mean_cosine"] < 1
    assert figures["worst_cosine"] >= 0.97


def test_a_saved_student_writes_and_answers_as_its_teacher(tmp_path):
    model = fetch("smollm2")
    student = tmp_path / "student"
    done = run(ROOT / "scripts" / "convert.py", model, student)
    assert done.returncode == 0, done.stderr
    options = ["--teacher", model, "--text", HELD_OUT, "--questions", 50]
    found = measure("real_answers.py", tmp_path / "answers.json", student, *options)
    assert found["continuations"][HELD_OUT.name]["equal_continuations"] >= 0.5
    assert found["chat"]["prompts"] == 50
    assert found["chat"]["equal_continuations"] >= 0.5
    assert found["cloze"]["same_choice"] >= 0.9


def test_the_tutorial_prints_what_it_shows(tmp_path):
    """Its page is marked as one that fetches models, so other runs leave it out."""
    model = fetch("smollm2")
    page = ROOT / "docs" / "pages" / "guide" / "tutorial.md"
    runnable = page.read_text(encoding="utf-8").replace(
        "<!-- page: no, fetches models -->", "<!-- page: slow -->"
    )
    (tmp_path / "tutorial.md").write_text(runnable, encoding="utf-8")
    (tmp_path / "work" / "runs").mkdir(parents=True)
    (tmp_path / "work" / "runs" / "smollm2").symlink_to(model)
    options = ["--slow", "--work", tmp_path / "work"]
    done = run(ROOT / "scripts" / "run_docs.py", tmp_path / "tutorial.md", *options)
    assert done.returncode == 0, done.stderr
    assert "0 left out" in done.stdout
