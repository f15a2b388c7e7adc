"""Every command takes a GGUF file where it takes a stock model, by the same loader."""

import json

import pytest
import torch
import yaml
from gguf_files import make_llama, write_gguf
from safetensors.torch import load_file
from teachers import tiny_teacher
from transformers import AutoModelForCausalLM

pytest.importorskip("gguf")

FEW = ("--calibration-tokens", 256)


@pytest.fixture(scope="module")
def file(tokenizer, tmp_path_factory):
    llama = make_llama()
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama, tokenizer, "Q8_0")


@pytest.fixture
def converted(cli, file, tmp_path, text_file):
    out = tmp_path / "student"
    code, printed, error = cli("convert", file, out, *FEW, "--calibration-text", text_file)
    assert code == 0, error
    assert "256 tokens (text)" in printed
    return out


def test_convert_evaluate_read_and_distil(cli, file, converted, tmp_path, text_file):
    assert AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True)
    report = tmp_path / "report.json"
    options = ("--teacher", file, "--text", text_file, "--max-tokens", 512, "--json", report)
    code, _, error = cli("evaluate", converted, *options)
    assert code == 0, error
    assert 0 < json.loads(report.read_text())["kl"] < 1e-3

    code, printed, error = cli("read", file, "--prompt", "The sea", "--layers", "0")
    assert code == 0 and "next:" in printed, error

    recipe = tmp_path / "recipe.yaml"
    stage = {"name": "layer-wise", "tokens": 64, "learning_rate": 0.01, "batch_size": 2}
    recipe.write_text(
        yaml.safe_dump(
            {
                "teacher": str(file),
                "student": str(converted),
                "data": {"train": str(text_file), "sequence_length": 32},
                "stages": [stage],
                "output_dir": str(tmp_path / "distilled"),
                "dtype": "bfloat16",
            }
        )
    )
    code, _, error = cli("distill", recipe)
    assert code == 0, error
    stored = load_file(tmp_path / "distilled" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.bfloat16"}


def test_the_dtype_of_the_student_is_the_one_asked_for(cli, file, tmp_path):
    out = tmp_path / "student"
    code, _, error = cli("convert", file, out, "--calibration-tokens", 0, "--dtype", "bfloat16")
    assert code == 0, error
    stored = load_file(out / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.bfloat16"}


def test_families_look_into_it(cli, file):
    code, printed, error = cli("families", "--check", file)
    assert code == 0 and "ok" in printed, error
    code, printed, error = cli("families", "--explain", file)
    assert code == 0 and "mlp" in printed, error


def test_what_is_found_while_it_is_read_is_one_line_too(cli, tokenizer, tmp_path):
    llama = tiny_teacher("llama", vocab_size=4096, intermediate_size=64)
    more = {"rope_freqs.weight": torch.ones(4)}
    bad = write_gguf(tmp_path / "more.gguf", llama, tokenizer, more=more)
    code, _, error = cli("convert", bad, tmp_path / "out", *FEW)
    assert code == 2 and len(error.splitlines()) == 1 and "rope_freqs" in error


@pytest.mark.parametrize("command", ["stream", "absent", "cut", "other"])
def test_bad_files_are_one_line_before_any_work(cli, file, tmp_path, command):
    bad = tmp_path / "bad.gguf"
    if command == "cut":
        bad.write_bytes(file.read_bytes()[:-100])
    if command == "other":
        bad.write_text("no GGUF file at all")
    if command == "stream":
        bad.write_bytes(file.read_bytes())
    out = tmp_path / "out"
    options = ("--stream", "--calibration-tokens", 0) if command == "stream" else FEW
    code, _, error = cli("convert", bad, out, *options)
    assert code == 2 and len(error.splitlines()) == 1 and str(bad) in error
    assert not out.exists()
