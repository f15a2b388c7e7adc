"""Loading: it asks nobody anything, says what is wrong, and runs a kernel file apart."""

import builtins
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.checkpoint_code.errors import CheckpointError
from hf_kernel_ffn.cli.app import main
from hf_kernel_ffn.storage.checkpoint import save_converted
from hf_kernel_ffn.storage.kernel_files import has_custom_kernel, import_kernel
from hf_kernel_ffn.storage.loading import (
    check_vocabularies,
    load_model,
    load_student,
    load_teacher,
    load_tokenizer,
)

KERNEL = """
from hf_kernel_ffn import Kernel, register_kernel

class Cubed(Kernel):
    def value(self, score, distance2):
        return score.relu() ** 3

register_kernel(
    Cubed("cubed", nonnegative=True, positive_definite=False, uses_bias=True, degree=3)
)
"""


def test_no_question_is_asked_at_the_terminal(teacher_folder, ids, tmp_path, monkeypatch):
    teacher = str(teacher_folder("llama"))
    student, _ = convert(
        AutoModelForCausalLM.from_pretrained(teacher),
        KernelFFNConfig(),
        calibration_ids=ids,
        calibration_tokens=256,
    )
    save_converted(student, teacher, tmp_path)
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "n")
    check_vocabularies(str(tmp_path), teacher)
    load_student(str(tmp_path))
    assert not asked
    own = load_tokenizer(str(tmp_path))
    stock = load_tokenizer(teacher)
    assert type(own) is type(stock) and own("A test.") == stock("A test.")


def test_a_students_tokenizer_loads_without_a_warning(teacher_folder, ids, tmp_path):
    teacher = str(teacher_folder("llama"))
    student, _ = convert(
        AutoModelForCausalLM.from_pretrained(teacher), calibration_ids=ids, calibration_tokens=256
    )
    save_converted(student, teacher, tmp_path)
    code = f"from hf_kernel_ffn import load_tokenizer; load_tokenizer({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_paths_and_dtypes_may_be_objects(teacher_folder, ids, tmp_path):
    folder = Path(teacher_folder("llama"))
    teacher = load_teacher(folder)
    student, _ = convert(teacher, calibration_ids=ids, calibration_tokens=256)
    save_converted(student, folder, tmp_path)
    assert load_student(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert type(load_model(tmp_path)) is type(load_student(str(tmp_path)))
    assert load_tokenizer(tmp_path)("A test.") == load_tokenizer(str(folder))("A test.")
    with pytest.raises(InputError, match="expected one of float32, bfloat16, float16"):
        load_teacher(folder, dtype=torch.int8)


def test_layers_keep_their_order_past_the_tenth(ids, tmp_path):
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=12,
        num_attention_heads=2,
    )
    student, _ = convert(
        LlamaForCausalLM(config), KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256
    )
    student.save_pretrained(tmp_path)
    expected = [f"layers.{number}.mlp" for number in range(12)]
    assert (
        list(type(student).from_pretrained(tmp_path).kernel_ffns())
        == list(student.kernel_ffns())
        == expected
    )


def test_a_kernel_file_replaces_no_module_of_its_name(tmp_path, ids, llama, registry):
    file = tmp_path / "statistics.py"
    file.write_text(KERNEL)
    assert import_kernel(f"{file}:cubed") == "cubed"
    assert sys.modules["statistics"] is statistics
    assert import_kernel(f"{file}:cubed") == "cubed"  # again, as a recipe does
    student, _ = convert(
        llama, KernelFFNConfig(kernel="cubed"), calibration_ids=ids, calibration_tokens=256
    )
    student.save_pretrained(tmp_path / "student")
    assert has_custom_kernel(str(tmp_path / "student"))
    assert "class Cubed(Kernel)" in (tmp_path / "student" / "custom_kernel.py").read_text()


def test_two_kernel_files_of_one_name_are_two_modules(tmp_path, registry):
    files = [tmp_path / "one" / "kernel.py", tmp_path / "other" / "kernel.py"]
    for file, name in zip(files, ("cubed", "cubed-too"), strict=True):
        file.parent.mkdir()
        file.write_text(KERNEL.replace('"cubed"', f'"{name}"'))
        import_kernel(f"{file}:{name}")
    modules = [sys.modules[type(registry[name]).__module__] for name in ("cubed", "cubed-too")]
    assert [module.__file__ for module in modules] == [str(file) for file in files]


def test_a_kernel_file_that_fails_leaves_no_module(tmp_path):
    file = tmp_path / "statistics.py"
    file.write_text("raise RuntimeError('no such thing')")
    before = set(sys.modules)
    with pytest.raises(InputError, match=r"failing when run \(no such thing\): repair it"):
        import_kernel(f"{file}:cubed")
    assert set(sys.modules) == before
    assert sys.modules["statistics"] is statistics


def test_what_cannot_be_loaded_is_a_checkpoint_error_that_keeps_its_cause(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="could not load .*: check that it is complete") as it:
        load_tokenizer(str(tmp_path))
    assert it.value.__cause__ is not None


@pytest.mark.parametrize("debug", ["", "1"])
def test_the_command_line_shows_the_traceback_if_asked(tmp_path, monkeypatch, capsys, debug):
    monkeypatch.setenv("HF_KERNEL_FFN_DEBUG", debug)
    monkeypatch.setattr(sys, "argv", ["hf-kernel-ffn", "verify", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert printed[-1].startswith("error: found no config.json")
    assert ("Traceback" in printed[0]) == (debug == "1")
    assert (len(printed) == 1) == (debug == "")


@pytest.mark.parametrize("start, travels", [(b"\xef\xbb\xbf", True), (b"# caf\xe9\n", False)])
def test_a_kernel_file_in_another_encoding(tmp_path, ids, llama, registry, start, travels):
    """With a mark of its byte order it travels, without the mark; as Latin-1 it does not."""
    file = tmp_path / "encoded.py"
    prefix = start if travels else b"# -*- coding: latin-1 -*-\n" + start
    file.write_bytes(prefix + KERNEL.replace("cubed", f"cubed-{travels}").encode())
    kernel = import_kernel(f"{file}:cubed-{travels}")
    student, _ = convert(
        llama, KernelFFNConfig(kernel=kernel), calibration_ids=ids, calibration_tokens=256
    )
    if not travels:
        with pytest.raises(InputError, match="UTF-8"):
            student.save_pretrained(tmp_path / "out")
        return
    student.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "custom_kernel.py").read_bytes().startswith(b"\nfrom .kernels")
    load_student(str(tmp_path / "out"), trust_remote_code=True)
