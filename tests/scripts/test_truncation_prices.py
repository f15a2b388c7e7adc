"""Prices of units: the rule of the package is the baseline's own, and both are scored."""

import json
import re

import pytest
import torch
import truncation_prices
import typer
from real_fidelity import compare, read_rows
from typer.testing import CliRunner

from hf_kernel_ffn import load_teacher, load_tokenizer
from hf_kernel_ffn.evaluation.baselines import teacher_as_student


def test_lengths_are_the_package_s_own_rule(teacher_folder, text_file):
    folder = str(teacher_folder("llama"))
    app = typer.Typer()
    app.command()(truncation_prices.main)
    options = ["--test", str(text_file), "--train", str(text_file), "--count", "6"]
    done = CliRunner().invoke(app, [folder, *options, "--tokens", "1024"])
    assert done.exit_code == 0, done.output
    printed = re.findall(r'\{"rule".*\}', done.output)  # behind bars of loading
    length, fisher = map(json.loads, printed)
    assert (length["rule"], fisher["rule"]) == ("length", "fisher")

    teacher = load_teacher(folder)
    ids = read_rows(load_tokenizer(folder), str(text_file), 1024, spread=True)
    student = teacher_as_student(teacher, ids=ids, simplex="threshold", top_k=6)
    test = read_rows(load_tokenizer(folder), str(text_file), 1024)
    assert length[str(text_file)]["kl"] == pytest.approx(compare(student, teacher, test)["kl"])
    assert fisher[str(text_file)]["kl"] != length[str(text_file)]["kl"]


def test_the_information_is_that_of_small_changes(make_teacher, ids):
    """F predicts the KL of a small change of what a layer writes: ½ δ·F δ for each token."""
    teacher = make_teacher("llama").double().requires_grad_(False)
    rows = ids[:, :24].repeat(8, 1)
    path = "layers.2.mlp"
    fisher = truncation_prices.measure_fisher(teacher, [path], rows, seed=0)[path]
    change = 0.02 * torch.randn(fisher.shape[0], dtype=torch.float64)

    def shift(module, args, output):
        moved = output.clone()
        moved[:, 1:] += change
        return moved

    plain = teacher(rows).logits.log_softmax(-1)
    handle = teacher.base_model.get_submodule(path).register_forward_hook(shift)
    moved = teacher(rows).logits.log_softmax(-1)
    handle.remove()
    found = (plain.exp() * (plain - moved)).sum()
    assert found.item() == pytest.approx((change @ fisher @ change).item() / 2, rel=0.35)
