"""--chat and --bos reach every command, and what cannot be read is one line before any work."""

import copy
import json
import shutil

import pytest
import torch
import yaml

from hf_kernel_ffn import InputError
from hf_kernel_ffn.distillation import load_recipe
from hf_kernel_ffn.distillation.batches import open_text
from hf_kernel_ffn.storage.loading import load_tokenizer

FEW = ("--calibration-tokens", 256)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WORDS = "the old man looked at the sea and thought of the fish of his youth "


@pytest.fixture
def model(teacher_folder, tokenizer, tmp_path):
    """A tiny Llama whose tokenizer has a start token of its own and a chat template."""
    folder = shutil.copytree(teacher_folder("llama"), tmp_path / "model")
    changed = copy.deepcopy(tokenizer)
    changed.bos_token = tokenizer.convert_ids_to_tokens(7)
    changed.chat_template = TEMPLATE
    changed.save_pretrained(folder)
    return folder


@pytest.fixture
def talks(tmp_path):
    file = tmp_path / "talks.jsonl"
    rows = []
    for number in range(40):
        question = {"role": "user", "content": f"Say {number}: {WORDS}"}
        answer = {"role": "assistant", "content": WORDS * 4}
        rows.append(json.dumps({"messages": [question, answer]}))
    file.write_text("\n".join(rows))
    return file


def line(result):
    code, _, error = result
    assert code == 2 and len(error.splitlines()) == 1 and error.startswith("error: "), error
    return error


def test_convert_evaluate_and_read_a_chat(cli, model, talks, tmp_path, monkeypatch):
    seen = []
    from hf_kernel_ffn.conversion import convert as conversion

    original = conversion.convert

    def noted(teacher, *arguments, **options):
        seen.append(options["calibration_ids"])
        return original(teacher, *arguments, **options)

    monkeypatch.setattr(conversion, "convert", noted)
    out = tmp_path / "student"
    text = ("--calibration-text", talks)
    code, _, error = cli("convert", model, out, *FEW, *text, "--chat")
    assert code == 0, error
    assert (seen[0][:, 0] == 7).all()

    report = tmp_path / "report.json"
    options = ("--teacher", model, "--text", talks, "--max-tokens", 512, "--json", report)
    options = (*options, "--chat", "--prompts", 5)
    code, _, error = cli("evaluate", out, *options)
    assert code == 0, error
    found = json.loads(report.read_text())
    assert found["chat"] is True and found["generation"]["prompts"] == 5

    read = tmp_path / "reading.json"
    prompt = ("--prompt", "Who?", "--position", 0, "--layers", "0", "--json", read)
    code, _, error = cli("read", model, *prompt, "--chat", "--text", talks)
    assert code == 0, error
    start = load_tokenizer(str(model)).bos_token
    assert json.loads(read.read_text())["token"] == start
    code, _, error = cli("read", model, *prompt, "--bos", "always")
    assert code == 0 and json.loads(read.read_text())["token"] == start


@pytest.mark.parametrize("bos", ["always", "never"])
def test_convert_begins_rows_as_asked(cli, model, text_file, tmp_path, monkeypatch, bos):
    seen = []
    from hf_kernel_ffn.conversion import convert as conversion

    def noted(teacher, *arguments, **options):
        seen.append(options["calibration_ids"])
        raise InputError("enough")

    monkeypatch.setattr(conversion, "convert", noted)
    options = ("--calibration-text", text_file, "--bos", bos)
    assert "enough" in line(cli("convert", model, tmp_path / "out", *FEW, *options))
    assert (seen[0][:, 0] == 7).all() == (bos == "always")


@pytest.fixture
def recipe(model, talks, tmp_path):
    def write(**data):
        file = tmp_path / "recipe.yaml"
        stage = {"name": "logits", "tokens": 64, "learning_rate": 0.01, "batch_size": 2}
        content = {
            "teacher": str(model),
            "calibration_tokens": 256,
            "data": {"train": str(talks), "sequence_length": 32, **data},
            "stages": [stage],
            "output_dir": str(tmp_path / "distilled"),
        }
        file.write_text(yaml.safe_dump(content))
        return file

    return write


def test_a_recipe_reads_a_chat(cli, recipe, model, tmp_path):
    file = recipe(chat=True)
    code, _, error = cli("record", file, tmp_path / "record", "--top-k", 8)
    assert code == 0, error
    code, _, error = cli("distill", file, f"stages.0.stored_logits={tmp_path / 'record'}")
    assert code == 0, error
    data = load_recipe(file).data
    rows = torch.stack([next(open_text(load_tokenizer(str(model)), data, 0)) for _ in range(3)])
    assert (rows[:, 0] == 7).all()
    assert "data.bos" in line(cli("distill", recipe(bos="sometimes")))


def test_what_cannot_be_read_is_one_line_before_any_work(
    cli, recipe, model, talks, text_file, teacher_folder, tmp_path
):
    out = tmp_path / "out"
    plain = teacher_folder("llama")
    with_talks = ("--calibration-text", talks)
    assert "no chat template" in line(cli("convert", plain, out, *FEW, *with_talks, "--chat"))
    assert "--chat" in line(cli("convert", model, out, *FEW, *with_talks))
    assert "--calibration-text" in line(cli("convert", model, out, *FEW, "--chat"))
    assert "expected one of auto" in line(cli("convert", model, out, *FEW, "--bos", "no"))
    assert "no chat template" in line(cli("read", plain, "--prompt", "x", "--chat"))
    assert "--chat" in line(cli("distill", recipe()))
    options = ("--teacher", plain, "--text", talks)
    line(cli("evaluate", model, *options, "--chat"))
    assert not out.exists() and not (tmp_path / "distilled" / "config.json").exists()


def test_a_tokenizer_of_another_model_is_refused(cli, model, text_file, teacher_folder, tmp_path):
    small = shutil.copytree(teacher_folder("llama", vocab_size=300), tmp_path / "small")
    message = line(cli("convert", small, tmp_path / "out", *FEW, "--calibration-text", text_file))
    assert "found 4096 tokens in the tokenizer" in message and "at most 300" in message
    assert "found 4096 tokens" in line(cli("read", small, "--prompt", "the sea"))


def test_a_tokenizer_without_a_start_token_cannot_begin_with_it(cli, model, text_file, tmp_path):
    tokenizer = load_tokenizer(str(model))
    tokenizer.bos_token = None
    tokenizer.save_pretrained(model)
    message = line(
        cli(
            "convert",
            model,
            tmp_path / "out",
            *FEW,
            "--calibration-text",
            text_file,
            "--bos",
            "always",
        )
    )
    assert "no start token" in message
