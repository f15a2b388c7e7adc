"""Tiny random teachers and switches shared by all tests."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(
    prefix="hf_modules_"
)  # code of checkpoints; read when transformers is imported

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from teachers import FAMILIES, RECIPES, tiny_teacher
from transformers import AutoTokenizer

torch.set_num_threads(1)
settings.register_profile("tests", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def make_teacher():
    return tiny_teacher


@pytest.fixture(scope="session")
def llama():
    """GQA, tied embeddings."""
    return tiny_teacher("llama")


@pytest.fixture(scope="session")
def gpt2():
    """Conv1D, biases, learned positions."""
    return tiny_teacher("gpt2")


@pytest.fixture(scope="session")
def mistral():
    """Sliding window, untied embeddings."""
    return tiny_teacher("mistral")


@pytest.fixture(scope="session", params=FAMILIES)
def teacher(request):
    """Each of the three."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def ids():
    """(8, 32) token ids."""
    return torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tokenizer():
    """The shipped teachers' own: 4096 tokens, lossless, 0 ends a document."""
    return AutoTokenizer.from_pretrained(RECIPES / "teachers" / "llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """20 kB of English, about 6,000 tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(
        (RECIPES / "text" / "books-test.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8"
    )
    return file


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, tokenizer):
    """Saves a tiny random teacher with the shipped tokenizer; the same arguments give the same
    folder."""
    made = {}

    def save(family, **changes):
        key = (family, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("teachers") / family
            vocabulary = {
                "vocab_size": 4096,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": None,
            }
            tiny_teacher(family, **{**vocabulary, **changes}).save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return save


def _run_elsewhere(jobs, ids, scratch):
    """Outputs and errors by job name, from an interpreter without the package."""
    save_file({"ids": ids.contiguous()}, scratch / "ids.safetensors")
    (scratch / "jobs.json").write_text(
        json.dumps({"ids": str(scratch / "ids.safetensors"), "jobs": jobs})
    )
    script, results = (
        Path(__file__).parent / "support" / "other_interpreter.py",
        scratch / "results",
    )
    environment = dict(os.environ, HF_MODULES_CACHE=str(scratch / "modules"))
    command = [sys.executable, "-I", script, scratch / "jobs.json", results]
    done = subprocess.run(
        command,
        cwd=scratch,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return load_file(results), json.loads(Path(f"{results}.errors.json").read_text())


@pytest.fixture(scope="session")
def run_elsewhere():
    """Run jobs of other_interpreter.py."""
    return _run_elsewhere


@pytest.fixture
def registry(monkeypatch):
    """The kernel registry, put back as it was after the test."""
    from hf_kernel_ffn.checkpoint_code.kernels import KERNELS

    for name, kernel in list(KERNELS.items()):
        monkeypatch.setitem(KERNELS, name, kernel)
    before = set(KERNELS)
    yield KERNELS
    for name in set(KERNELS) - before:
        del KERNELS[name]


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line in this process: exit code, stdout, stderr."""
    from hf_kernel_ffn.cli.app import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-kernel-ffn", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return run
