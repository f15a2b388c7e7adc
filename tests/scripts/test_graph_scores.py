"""Scores of circuits: questions from templates, and a small run over a shipped teacher."""

import json
import subprocess
import sys

import pytest
import torch
from graph_questions import TASKS, make_questions
from graph_scores import changed, read_layers
from teachers import RECIPES

from hf_kernel_ffn import KernelFFNConfig, convert

ROOT = RECIPES.parent


@pytest.mark.parametrize("task", TASKS)
def test_questions_differ_and_have_two_answers_of_one_token(task, tokenizer):
    questions = make_questions(tokenizer, task, 5, seed=0)
    assert len(set(questions)) == 5
    for question in questions:
        ids = [tokenizer(answer)["input_ids"] for answer in (question.right, question.wrong)]
        assert ids[0] != ids[1] and all(len(answer) == 1 for answer in ids)
    assert questions == make_questions(tokenizer, task, 5, seed=0)
    assert questions != make_questions(tokenizer, task, 5, seed=1)


@pytest.mark.parametrize("skip", [False, True])
def test_coefficients_that_nobody_changes_leave_the_model_as_it_is(make_teacher, ids, skip):
    settings = KernelFFNConfig(rows="tied", simplex="threshold", top_k=6, skip=skip)
    student, _ = convert(make_teacher("llama"), settings, calibration_ids=ids)
    with torch.no_grad():
        expected = student(ids).logits
        with changed(read_layers(student), lambda number, coefficients: coefficients):
            found = student(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_small_run_has_figures_of_every_task(tmp_path):
    out = tmp_path / "scores.json"
    command = [
        *(sys.executable, "scripts/experiments/graph_scores.py", "recipes/teachers/llama"),
        *("--text", "recipes/text/books-test.txt", "--out", str(out), "--prompts", "2"),
        *("--graphs", "1", "--nodes", "8", "--tokens", "1024"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert {row["task"] for row in rows} == set(TASKS)
    agreement = rows[0]
    assert agreement["task"] == "agreement" and agreement["prompts"] == 1
    assert 0 < agreement["circuit_size"] < 4 * 512 * 16
    assert agreement["correlation"] > 0.5  # a graph that says nothing has about zero
