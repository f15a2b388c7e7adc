"""Intruder detection: its parts by hand, and the script on a small teacher and its student."""

import json

import pytest
import torch
import typer
from intruders import OWN, bootstrap, find_intruder, main, overlap
from teachers import RECIPES
from transformers import BertModel
from typer.testing import CliRunner

from hf_kernel_ffn import KernelFFNConfig, convert, load_teacher, load_tokenizer


def test_the_odd_one_is_found():
    own = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, -0.1], [1.0, 0.2]])
    odd = torch.tensor([[0.0, 1.0]])
    for place in range(OWN + 1):
        five = torch.cat([own[:place], odd, own[place:]])
        assert find_intruder(torch.nn.functional.normalize(five, dim=-1)) == place


def test_shifted_contexts_are_one_passage():
    passage = list(range(20))
    assert overlap(passage[:11], passage[7:18])
    assert not overlap(passage[:11], passage[8:19])


def test_the_interval_holds_the_accuracy():
    low, high = bootstrap([True] * 30 + [False] * 70, seed=0)
    assert 0.2 < low < 0.3 < high < 0.4
    assert bootstrap([True] * 30 + [False] * 70, seed=0) == (low, high)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student of the shipped Llama, and a random encoder of the shipped BERT's shape."""
    folder = tmp_path_factory.mktemp("models")
    student, _ = convert(
        load_teacher(str(RECIPES / "teachers" / "llama")), KernelFFNConfig(rows="tied", pieces=2)
    )
    student.save_pretrained(folder / "student")
    bert = str(RECIPES / "teachers" / "bert")
    torch.manual_seed(0)
    BertModel(load_teacher(bert).config).save_pretrained(folder / "encoder")
    load_tokenizer(bert).save_pretrained(folder / "encoder")
    return folder


def test_the_script_asks_the_same_prototypes_of_both(folders, tmp_path):
    app = typer.Typer()
    app.command()(main)
    out = tmp_path / "figures.json"
    arguments = [RECIPES / "teachers" / "llama", folders / "student"]
    options = ["--encoder", folders / "encoder", "--text", RECIPES / "text" / "books-test.txt"]
    sizes = ["--out", out, "--units", 12, "--layers", 2, "--tokens", 2048]
    done = CliRunner().invoke(app, [str(part) for part in (*arguments, *options, *sizes)])
    assert done.exit_code == 0, done.output

    unit_sides, units, student_sides = json.loads(out.read_text())
    assert [row["prototype"] for row in (unit_sides, units)] == ["side of a unit", "unit"]
    assert student_sides["prototype"] == "side of a unit"
    assert len({row["asked"] for row in (unit_sides, units, student_sides)}) == 1
    for row in (unit_sides, units, student_sides):
        assert 0 < row["asked"] <= row["of"] == 12
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["chance"] == 0.2
        assert row["tokens"] == 2048 and row["layers"] == 2
