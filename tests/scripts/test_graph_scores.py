"""Scores of circuits: questions from templates, and a small run over a shipped teacher."""

import json
import subprocess
import sys

import pytest
import torch
from graph_circuits import (
    changed,
    count_circuit,
    list_sizes,
    measure_gaps,
    measure_pairs,
    measure_place_means,
    rank_pairs,
    read_layers,
)
from graph_questions import TASKS, make_questions
from graph_scores import ask_all, find_right
from real_frontier_saved import load_any, load_row, save_row
from teachers import RECIPES

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.evaluation.baselines import teacher_as_student, transcoder_student
from hf_kernel_ffn.storage.kernel_files import import_kernel
from hf_kernel_ffn.storage.loading import load_model, load_tokenizer
from hf_kernel_ffn.text.text_format import PLAIN

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


@pytest.fixture(scope="module")
def asked_of_llama():
    """The shipped Llama, its layers, and a question with what the others of its task do."""
    model = load_model("recipes/teachers/llama").requires_grad_(False)
    tokenizer = load_tokenizer("recipes/teachers/llama")
    layers = read_layers(model)
    questions = ask_all(tokenizer, "names", 12, 0, PLAIN)
    same = [one for one in questions if len(one.ids) == len(questions[0].ids)]
    means = measure_place_means(model, layers, torch.stack([one.ids for one in same]))
    return model, layers, same, means


def find_gap(model, question):
    with torch.no_grad():
        return measure_gaps(model, question.ids[None], question).item()


def test_the_order_of_effects_is_a_permutation_that_spares_the_start():
    effects = [torch.tensor([[9.0, 9.0], [1.0, -2.0]]), torch.tensor([[9.0], [0.5]])]
    ranks = rank_pairs(effects, first=1)
    assert ranks[0].tolist() == [[-1, -1], [0, 2]]
    assert ranks[1].tolist() == [[-1], [1]]


def test_no_smaller_circuit_of_the_sizes_tried_has_the_gap(asked_of_llama):
    model, layers, questions, means = asked_of_llama
    sizes = [
        (count_circuit(model, layers, means, one), one)
        for one in questions
        if find_right(model, [one])[0]
    ]
    size, question = next(pair for pair in sizes if pair[0] is not None)
    ranks = rank_pairs(measure_pairs(model, layers, means, question), question.first)

    def keep(count):
        def cut(number, coefficients):
            return torch.where(ranks[number] < count, coefficients, means[number])

        with changed(layers, cut):
            return find_gap(model, question)

    wanted = keep(0) + 0.8 * (keep(10**9) - keep(0))
    assert keep(10**9) == pytest.approx(find_gap(model, question), abs=1e-4)
    assert keep(size) >= wanted - 1e-4
    smaller = [count for count in list_sizes(10**6) if count < size]
    assert all(keep(count) < wanted + 1e-4 for count in smaller)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("kind", ["kernel", "own kernel", "teacher", "transcoder"])
def test_saved_students_and_controls_are_the_same_again(kind, make_teacher, ids, tmp_path):
    teacher = make_teacher("llama")
    if kind.endswith("kernel"):
        settings = {"rows": "tied", "simplex": "threshold", "top_k": 6, "skip": True}
        if kind == "own kernel":
            settings |= {"kernel": "recipes/examples/kernels/controls.py:relu2"}
            settings |= {"values": "product"}
        given = dict(settings)
        if "kernel" in given:
            given["kernel"] = import_kernel(given["kernel"])
        student, _ = convert(teacher, KernelFFNConfig(**given), calibration_ids=ids)
    elif kind == "teacher":
        settings = {"simplex": "threshold", "top_k": 6}
        student = teacher_as_student(teacher, ids, **settings)
    else:
        settings = {"width": 64, "top_k": 6, "skip": True}
        student = transcoder_student(teacher, ids, **settings)
    file = tmp_path / "saved" / "row.safetensors"
    save_row(student, kind.removeprefix("own "), settings, file)
    if kind == "own kernel":
        again = load_any(str(file.with_suffix("")), "nowhere")
    else:
        again = load_row(file, teacher)
    with torch.no_grad():
        expected = student(ids).logits
        torch.testing.assert_close(again(ids).logits, expected)
        with changed(read_layers(again), lambda number, coefficients: coefficients):
            found = again(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("baseline", ["task", "text"])
def test_a_small_run_has_figures_of_every_task(tmp_path, baseline):
    out = tmp_path / "scores.json"
    command = [
        *(sys.executable, "scripts/experiments/graph_scores.py", "recipes/teachers/llama"),
        *("--out", str(out), "--prompts", "10", "--graphs", "1", "--nodes", "8"),
        *("--baseline", baseline, "--tokens", "1024"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert {row["task"] for row in rows} == set(TASKS)
    agreement = rows[0]
    assert agreement["task"] == "agreement" and agreement["right"] == agreement["prompts"] > 0
    found = [row for row in rows if row["circuits"]]
    assert found and all(row["circuits"] <= row["prompts"] <= row["of"] for row in found)
    assert all(0 < row["circuit_size"] < 4 * 512 * 64 for row in found)
    assert agreement["correlation"] > 0.5  # a graph that says nothing has about zero
    assert agreement["correlation_of_gradient"] > 0.5
