"""Checkpoints that version 0.1 wrote, one of each kind: they load by this package, and by their own
code without it.

Every checkpoint under tests/fixtures/checkpoints_0_1 has its family's file beside its weights; the
rest of the code that version 0.1 saved is the same for all of them and lies in ``code``, byte for
byte as it was written.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_kernel_ffn.checkpoint_code import custom_kernel
from hf_kernel_ffn.storage.loading import load_student

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints_0_1"
EXPECTED = load_file(FIXTURES / "expected.safetensors")
"""``ids`` (2, 16) and, by kind, the logits (2, 16, 64) that version 0.1 computed."""
KINDS = sorted(EXPECTED.keys() - {"ids"})
CUSTOM_KERNEL = "llama-custom-kernel"
ELSEWHERE = {"llama-polarised": "AutoModelForCausalLM", CUSTOM_KERNEL: "AutoModelForCausalLM"}
"""Kinds that are loaded without the package, and by which Auto class."""


def copy_with_code(kind, parent):
    """The whole checkpoint as version 0.1 saved it: ``code`` without what the checkpoint has
    itself."""
    folder = parent / kind
    shutil.copytree(FIXTURES / "code", folder)
    shutil.copytree(FIXTURES / kind, folder, dirs_exist_ok=True)
    return folder


def test_every_kind_has_expected_logits():
    folders = {path.name for path in FIXTURES.iterdir() if (path / "config.json").is_file()}
    assert folders == set(KINDS) and len(KINDS) == 10


def test_the_empty_file_for_a_kernel_is_what_it_was():
    """By its bytes a checkpoint without a kernel of its author's is told from one that has it."""
    before = (FIXTURES / "code" / "custom_kernel.py").read_bytes()
    assert Path(custom_kernel.__file__).read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_by_the_package(kind, tmp_path):
    folder = copy_with_code(kind, tmp_path)
    student = load_student(str(folder), trust_remote_code=kind == CUSTOM_KERNEL)
    with torch.no_grad():
        logits = student(EXPECTED["ids"]).logits
    torch.testing.assert_close(logits, EXPECTED[kind], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def elsewhere(run_elsewhere, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("elsewhere_0_1")
    jobs = [
        {"name": kind, "auto": auto, "folder": str(copy_with_code(kind, scratch))}
        for kind, auto in ELSEWHERE.items()
    ]
    return run_elsewhere(jobs, EXPECTED["ids"], scratch)


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_it_loads_by_its_own_code_without_the_package(elsewhere, kind):
    logits, errors = elsewhere
    assert kind not in errors, errors[kind]
    torch.testing.assert_close(logits[kind], EXPECTED[kind], rtol=1e-5, atol=1e-5)
