"""The command line where people meet it: code of a model's own, other columns, prompts with special
tokens, companions, the card as printed, terminals, late failures."""

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from own_code import EXAMPLE, save_causal_mean
from teachers import tiny_teacher

from hf_kernel_ffn import register_architecture
from hf_kernel_ffn.cli.app import main
from hf_kernel_ffn.families.registry import ARCHITECTURES
from hf_kernel_ffn.storage import files
from hf_kernel_ffn.storage.loading import load_student, load_tokenizer
from hf_kernel_ffn.storage.verification import verify_folder

FEW = ("--calibration-tokens", 256)
SHORT = ("--sequence-length", 32, "--max-tokens", 256)


@pytest.fixture
def refused(cli):
    """Run what has to fail in one line, which is returned."""

    def run(*arguments):
        code, _, error = cli(*arguments)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


@pytest.fixture
def made(cli, teacher_folder, tmp_path):
    """A converted tiny Llama."""
    assert cli("convert", teacher_folder("llama"), tmp_path / "made", *FEW)[0] == 0
    return tmp_path / "made"


# code of a model's own


@pytest.fixture
def own_code(monkeypatch, tokenizer, tmp_path):
    """A family that transformers does not have, in the table, and a model of it with a
    tokenizer."""
    for name in list(ARCHITECTURES):
        monkeypatch.setitem(ARCHITECTURES, name, ARCHITECTURES[name])
    spec = importlib.util.spec_from_file_location("edges_example", EXAMPLE / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    register_architecture(module.CAUSAL_MEAN)

    folder = save_causal_mean(tmp_path / "causal_mean", vocab_size=4096)
    tokenizer.save_pretrained(folder)
    yield folder
    ARCHITECTURES.pop("causal_mean", None)


def test_a_model_with_code_of_its_own_goes_through_every_command(
    cli, refused, own_code, text_file, tmp_path, monkeypatch
):
    """Refused without the flag, by a sentence that names one which the command has."""
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked at the terminal"))
    student, other, export = tmp_path / "student", tmp_path / "other", tmp_path / "ffns.safetensors"
    recipe = tmp_path / "recipe.yaml"
    stage = {"name": "layer-wise", "tokens": 64, "learning_rate": 0.01, "batch_size": 2}
    content = {
        "teacher": str(own_code),
        "student": str(student),
        "data": {"train": str(text_file), "sequence_length": 32},
        "stages": [stage, {**stage, "name": "logits"}],
        "output_dir": str(tmp_path / "distilled"),
    }
    recipe.write_text(yaml.safe_dump(content))
    text = ("--calibration-text", text_file)
    commands = [
        ("families", "--check", own_code),
        ("families", "--explain", own_code),
        ("convert", own_code, student, *FEW, *text),
        ("convert", own_code, tmp_path / "streamed", *FEW, *text, "--stream"),
        ("evaluate", student, "--teacher", own_code, "--text", text_file, *SHORT),
        ("export", student, export),
        ("apply", export, own_code, other),
        ("record", recipe, tmp_path / "record", "trust_remote_code=TRUST", "--top-k", 4),
        ("distill", recipe, "trust_remote_code=TRUST"),
    ]
    for command in commands:
        without = [part for part in command if part != "trust_remote_code=TRUST"]
        assert "--trust-remote-code" in refused(*without) or "--explain" in command
        given = [
            "trust_remote_code=true" if part == "trust_remote_code=TRUST" else part
            for part in command
        ]
        flag = [] if given != [*command] else ["--trust-remote-code"]
        code, _, error = cli(*given, *flag)
        assert code == 0, (command, error)


@pytest.mark.parametrize("dtype, says", [("float32", False), ("bfloat16", True)])
def test_a_dtype_that_rounds_what_is_stored_is_said(cli, teacher_folder, tmp_path, dtype, says):
    command = ("convert", teacher_folder("llama"), tmp_path / "made", *FEW, "--dtype", dtype)
    code, printed, _ = cli(*command)
    assert code == 0 and ("rounded too" in printed) == says


# text


@pytest.mark.parametrize("kind", ["convert", "evaluate", "read"])
def test_the_text_may_have_a_column_of_another_name(
    cli, refused, made, teacher_folder, text_file, tmp_path, kind
):
    rows = tmp_path / "rows.jsonl"
    lines = text_file.read_text(encoding="utf-8").splitlines()
    rows.write_text("".join(json.dumps({"id": 1, "content": line}) + "\n" for line in lines))
    command = {
        "convert": ("convert", teacher_folder("llama"), tmp_path / "out", *FEW)
        + ("--calibration-text", rows),
        "evaluate": ("evaluate", made, "--teacher", teacher_folder("llama"), "--text", rows)
        + SHORT,
        "read": ("read", made, "--prompt", "A whale", "--text", rows),
    }[kind]
    message = refused(*command)
    assert "'id', 'content'" in message and "--text-field" in message
    assert cli(*command, "--text-field", "content")[0] == 0


def test_a_text_that_cannot_be_read_is_refused_before_a_model_is_loaded(
    refused, made, teacher_folder, tmp_path, monkeypatch
):
    from hf_kernel_ffn.storage import loading

    def fail(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "_load_model_and_check_keys", fail)
    bad, teacher = tmp_path / "nowhere.txt", teacher_folder("llama")
    refused("convert", teacher, tmp_path / "out", "--calibration-text", bad)
    refused("evaluate", made, "--teacher", teacher, "--text", bad)
    refused("read", made, "--prompt", "A", "--text", bad)
    assert "kernel_ffn" in (made / "config.json").read_text()
    refused("read", made, "--prompt", "A", "--teacher", made, "--html", tmp_path / "r.html")


# what comes along


def test_whatever_lies_beside_the_teacher_comes_along(cli, teacher_folder, tmp_path):
    teacher = Path(shutil.copytree(teacher_folder("llama"), tmp_path / "teacher"))
    kept = {
        "preprocessor_config.json": "{}",
        "processor_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "sentence_bert_config.json": "{}",
        "LICENSE": "mine",
        "vocab.custom": "x",
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "../out"}]),
        "1_Pooling/config.json": "{}",
        "1_Pooling/model.safetensors": "x",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
    }
    left = {
        "pytorch_model.bin": "x",
        "model.onnx": "x",
        "optimizer.pt": "x",
        "README.md": "of the teacher",
        "code.py": "x",
        ".gitattributes": "x",
        "runs/events": "x",
        "checkpoint-5/config.json": "{}",
        "1_Pooling/pytorch_model.bin": "x",
    }
    for name, content in {**kept, **left}.items():
        (teacher / name).parent.mkdir(exist_ok=True)
        (teacher / name).write_text(content)
    outputs = [tmp_path / "memory", tmp_path / "streamed"]
    assert cli("convert", teacher, outputs[0], "--calibration-tokens", 0)[0] == 0
    assert cli("convert", teacher, outputs[1], "--calibration-tokens", 0, "--stream")[0] == 0
    for out in outputs:
        for name, content in kept.items():
            assert (out / name).read_text() == content, name
        for name, content in left.items():
            assert not (out / name).exists() or (out / name).read_text() != content, name
        assert all(finding.good for finding in verify_folder(out))


def test_the_cards_example_runs_as_printed(cli, teacher_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked at the terminal"))
    assert cli("convert", teacher_folder("llama"), "students/café", *FEW)[0] == 0
    card = Path("students/café/README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in front  # a place on this disk is no model of a hub
    assert "# café" in card and str(tmp_path) not in card
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    names = {}
    exec(example, names)
    assert len(names["readouts"]) == 3


def test_a_card_without_a_hubs_model_says_how_to_name_it(refused, made):
    assert "--base-model" in refused("push", made, "me/student")


# what a Trainer leaves, adapters


def test_a_trainers_folder_is_whole_and_says_what_is_more(cli, made, refused):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (made / name).write_bytes(b"x")
    refused("verify", made)  # pickles of nobody knows whom
    (made / "trainer_state.json").write_text("{}")
    code, printed, _ = cli("verify", made)
    assert code == 0 and "optimizer.pt" in printed and "NOT OK" not in printed
    (made / "other.bin").write_bytes(b"x")
    refused("verify", made)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_an_adapter_beside_a_model_is_refused(refused, teacher_folder, tmp_path, stream):
    teacher = Path(shutil.copytree(teacher_folder("llama"), tmp_path / "teacher"))
    (teacher / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (teacher / "adapter_model.safetensors").write_bytes(b"x")
    message = refused("convert", teacher, tmp_path / "out", "--calibration-tokens", 0, *stream)
    assert "adapter" in message and "merge" in message
    (teacher / "config.json").unlink()
    assert "adapter" in refused("convert", teacher, tmp_path / "out", "--calibration-tokens", 0)


def test_an_adapter_beside_a_student_is_refused(refused, made, teacher_folder, text_file):
    (made / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    command = ("evaluate", made, "--teacher", teacher_folder("llama"), "--text", text_file)
    assert "adapter" in refused(*command, *SHORT)


# bare models


@pytest.mark.parametrize("family, tied", [("mistral", False), ("llama", True), ("gpt2", True)])
def test_a_bare_model_is_converted_and_says_what_it_cannot(
    cli, refused, tokenizer, text_file, tmp_path, family, tied
):
    bare = tmp_path / "bare"
    sizes = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    tiny_teacher(family, "base", **sizes).save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    text = ("--calibration-text", text_file)
    for name, more in (("out", []), ("streamed", ["--stream"])):
        code, _, error = cli("convert", bare, tmp_path / name, *FEW, *text, *more)
        assert code == 0, error
        student = load_student(str(tmp_path / name))
        assert (student.get_output_embeddings() is not None) == tied
    command = ("evaluate", tmp_path / "out", "--teacher", bare, "--text", text_file, *SHORT)
    if tied:  # the head is the embedding: it is a language model
        assert cli(*command)[0] == 0
        return
    assert "MistralModel" in refused(*command)
    assert "MistralModel" in refused("read", tmp_path / "out", "--prompt", "A whale")
    assert "MistralModel" in refused("read", bare, "--prompt", "A whale")
    recipe = tmp_path / "recipe.yaml"
    stage = {"name": "logits", "tokens": 64, "learning_rate": 0.01, "batch_size": 2}
    content = {
        "teacher": str(bare),
        "data": {"train": str(text_file), "sequence_length": 32},
        "stages": [stage],
        "output_dir": str(tmp_path / "distilled"),
    }
    recipe.write_text(yaml.safe_dump(content))
    assert "MistralModel" in refused("distill", recipe)
    assert "MistralModel" in refused("record", recipe, tmp_path / "record")
    assert cli("distill", recipe, "stages.0.name=layer-wise")[0] == 0


# prompts, terminals, late failures


def test_a_start_token_that_is_typed_in_is_not_put_twice(cli, made, tmp_path):
    tokenizer = load_tokenizer(str(made))
    file = made / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    start = tokenizer.convert_ids_to_tokens(0)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": start, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {start: {"id": start, "ids": [0], "tokens": [start]}},
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(str(made))("A")["input_ids"][0] == 0
    read = []
    for prompt in ("A whale", f"{start}A whale"):
        assert cli("read", made, "--prompt", prompt, "--json", tmp_path / "r.json")[0] == 0
        read.append(json.loads((tmp_path / "r.json").read_text(encoding="utf-8")))
    assert read[0]["position"] == read[1]["position"] and read[0]["next"] == read[1]["next"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_cannot_show_a_character_ends_nothing(
    made, teacher_folder, text_file, tmp_path, monkeypatch, encoding
):
    for command in (
        ("verify", made),
        ("families",),
        ("evaluate", made, "--teacher", teacher_folder("llama"), "--text", text_file, *SHORT),
        ("read", made, "--prompt", "naïve 模型 😀"),
        ("verify", tmp_path / "模型"),
    ):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        monkeypatch.setattr(sys, "argv", ["hf-kernel-ffn", *map(str, command)])
        with pytest.raises(SystemExit) as stopped:
            main()
        missing = command[-1] == tmp_path / "模型"
        assert stopped.value.code == (2 if missing else 0), command
        streams[1].flush()
        assert streams[1].buffer.getvalue().count(b"\n") == missing


def test_a_name_that_is_no_text_is_said(refused, made, teacher_folder, tmp_path):
    """A file's name may have any bytes; Python stands for those that are no UTF-8 by half pairs."""
    name = os.fsdecode(b"caf\xe9")
    refused("verify", name)
    refused("read", made, "--prompt", name)
    refused("convert", teacher_folder("llama"), tmp_path / name, *FEW)
    refused("read", made, "--prompt", "A", "--json", tmp_path / name)
    shutil.copytree(made, tmp_path / name)
    assert "surrogates" in refused("read", tmp_path / name, "--prompt", "A")


def test_figures_are_printed_where_the_report_cannot_be_written(
    cli, made, teacher_folder, text_file, tmp_path, monkeypatch
):
    def fail(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "sync_to_disk", fail)
    command = ("evaluate", made, "--teacher", teacher_folder("llama"), "--text", text_file)
    code, printed, error = cli(*command, *SHORT, "--json", tmp_path / "report.json")
    assert code == 2 and "no space" in error and "top1_agreement" in printed
    assert not (tmp_path / "report.json").exists()
    code, printed, error = cli("read", made, "--prompt", "A", "--json", tmp_path / "r.json")
    assert code == 2 and "no space" in error and "next:" in printed


def test_a_cache_that_cannot_be_written_ends_no_evaluation(
    made, teacher_folder, text_file, tmp_path
):
    """That library makes a folder for every metric, after the models have run."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "XDG_", "TRANSFORMERS_"))
    }
    unwritable = str(text_file / "cache")
    environment |= dict.fromkeys(("HF_HOME", "XDG_CACHE_HOME", "HOME"), unwritable)
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = ("evaluate", made, "--teacher", teacher_folder("llama"), "--text", text_file, *SHORT)
    done = subprocess.run(
        [sys.executable, "-m", "hf_kernel_ffn", *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "top1_agreement" in done.stdout
