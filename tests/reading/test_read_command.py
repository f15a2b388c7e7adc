"""``hf-kernel-ffn read`` prints what the functions say, for converted and stock models."""

import json
from functools import partial

import pytest
from tiny_families import tiny

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.reading import trace
from hf_kernel_ffn.reading.regimes import contributions
from hf_kernel_ffn.storage.loading import load_teacher, load_tokenizer

PROMPT = "The old man looked at the sea and"


@pytest.fixture
def read(cli):
    """Exit code, stdout and stderr of one command."""
    return partial(cli, "read")


@pytest.fixture(scope="module")
def folders(teacher_folder, tmp_path_factory, ids):
    """A stock and a converted tiny Llama."""
    stock, converted = teacher_folder("llama"), tmp_path_factory.mktemp("read") / "student"
    student, _ = convert(load_teacher(str(stock)), KernelFFNConfig(), calibration_ids=ids)
    student.save_pretrained(converted)
    load_tokenizer(str(stock)).save_pretrained(converted)
    return stock, converted


@pytest.mark.parametrize("which", ["stock", "converted"])
def test_reading_a_model(read, folders, which, tmp_path):
    folder = folders[which == "converted"]
    code, printed, _ = read(
        folder,
        "--prompt",
        PROMPT,
        "--top",
        3,
        "--layers",
        "0,2",
        "--json",
        tmp_path / "made" / "out.json",
    )
    assert code == 0
    found = json.loads((tmp_path / "made" / "out.json").read_text())
    assert found["prompt"] == PROMPT and [layer["layer"] for layer in found["layers"]] == [0, 2]
    for layer in found["layers"]:
        assert layer["regime"] == ("conic" if which == "converted" else "linear")
        assert len(layer["contributions"]) == 3 and "support" not in layer
        assert (layer["contributions"][0]["share"] is None) == (which == "stock")
    logit = found["logit"]
    assert (
        sum(logit["kinds"].values()) + logit["remainder"] == pytest.approx(logit["value"])
        and abs(logit["remainder"]) < 1e-4
    )
    assert ("share" in printed) == (which == "converted") and "remainder" in printed


def test_what_is_printed_is_what_was_written(read, folders, tmp_path):
    stock, converted = folders
    read(converted, "--prompt", PROMPT, "--position", 3, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    from hf_kernel_ffn.storage.loading import load_student

    passed = trace(load_student(str(converted)), load_tokenizer(str(stock)), PROMPT)
    assert found["position"] == 3 and found["token"] == passed.tokens[3]
    for layer in found["layers"]:
        parts = contributions(passed.ffn(layer["path"]), 3, 10)
        assert [c["prototype"] for c in layer["contributions"]] == [
            part.prototype for part in parts
        ]
        assert [c["share"] for c in layer["contributions"]] == pytest.approx(
            [part.share for part in parts], rel=1e-3
        )


def test_support_is_given_with_text(read, folders, text_file, tmp_path):
    code, _, _ = read(
        folders[1], "--prompt", PROMPT, "--text", text_file, "--json", tmp_path / "out.json"
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and all(0 <= layer["support"]["nearest"] <= 100 for layer in found["layers"])


def test_what_cannot_be_read(read, folders, tmp_path):
    for arguments, error in (
        ((folders[0], "--prompt", ""), "a prompt without a token"),
        ((folders[0], "--prompt", PROMPT, "--position", 99), "expected numbers from"),
        ((folders[0], "--prompt", PROMPT, "--layers", "7"), "the model has 3 layers"),
        ((tmp_path, "--prompt", PROMPT), "found no config.json"),
    ):
        code, _, stderr = read(*arguments)
        assert code == 2 and error in stderr and len(stderr.splitlines()) == 1


def test_a_model_with_few_positions_reads_text(read, teacher_folder, text_file, tmp_path):
    folder = teacher_folder("gpt2")
    code, _, stderr = read(
        folder, "--prompt", PROMPT, "--text", text_file, "--json", tmp_path / "out.json"
    )
    assert code == 0, stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert all("support" in layer for layer in found["layers"])


def test_the_page_takes_the_positions_that_the_terminal_takes(read, folders, tmp_path):
    prompt = " ".join([PROMPT] * 12)
    for position in (5, -1):
        arguments = (folders[1], "--prompt", prompt, "--position", position, "--alternatives", 0)
        code, plain, _ = read(*arguments)
        code_of_page, _, stderr = read(
            *arguments, "--html", tmp_path / "page.html", "--teacher", folders[0]
        )
        assert (code, code_of_page) == (0, 0), stderr
        assert plain and "What the FFNs wrote" in (tmp_path / "page.html").read_text()
    code, _, stderr = read(
        folders[1], "--prompt", prompt, "--position", 9999, "--html", tmp_path / "page.html"
    )
    assert code == 2 and "found positions [9999], expected numbers from" in stderr


def test_a_logit_that_cannot_be_split_is_said_to_be(read, tmp_path, tokenizer):
    model = tiny("gemma2", "AutoModelForCausalLM", vocab_size=4096)
    model.save_pretrained(tmp_path / "gemma2")
    tokenizer.save_pretrained(tmp_path / "gemma2")
    code, printed, stderr = read(tmp_path / "gemma2", "--prompt", PROMPT)
    assert code == 0 and "cannot be split" in printed.replace("\n", " "), stderr
