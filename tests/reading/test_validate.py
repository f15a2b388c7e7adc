"""What a family's entry says by names is true by numbers, and a wrong entry is found out."""

import sys
from dataclasses import replace

import pytest
from tiny_families import tiny

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.cli.app import main
from hf_kernel_ffn.families.registry import ARCHITECTURES
from hf_kernel_ffn.reading.validate import check_family

SPLIT = ("llama", "gpt2", "gemma", "nemotron", "olmo", "qwen3")
"""Families whose entries describe all that can be."""


@pytest.mark.parametrize("family", SPLIT)
def test_every_claim_holds(family):
    checks = check_family(tiny(family, "AutoModelForCausalLM"))
    assert len(checks) == 6 and all(check.ok for check in checks), checks
    assert max(check.error for check in checks) < 1e-5


@pytest.mark.parametrize(
    "family, head, described",
    [
        ("gemma2", "AutoModelForCausalLM", 3),
        ("olmo2", "AutoModelForCausalLM", 3),
        ("phi", "AutoModelForCausalLM", 2),
        ("mixtral", "AutoModelForCausalLM", 1),
        ("bert", "AutoModelForMaskedLM", 1),
        ("vit", "AutoModel", 1),
        ("t5", "AutoModelForSeq2SeqLM", 1),
        ("llama", "AutoModel", 2),
    ],
)
def test_what_is_not_described_is_said_to_be(family, head, described):
    checks = check_family(tiny(family, head))
    assert [check.ok for check in checks].count(True) == described, checks
    for check in checks:
        assert check.ok or (check.ok is None and check.error is None and check.reason)


def test_a_wrong_entry_is_found_out(monkeypatch):
    model = tiny("llama", "AutoModelForCausalLM")
    entry = ARCHITECTURES["llama"]
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(entry, ffn_norm="input_layernorm"))
    wrong = [check for check in check_family(model) if check.ok is False]
    assert [check.claim for check in wrong] == ["the FFNs read what their norm writes"]
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(entry, gate="up_proj", up="gate_proj"))
    wrong = [check for check in check_family(model) if check.ok is False]
    assert len(wrong) == 3 and "FFNs sum to what these write" in wrong[0].claim


def test_a_converted_model_is_refused(llama, ids):
    student, _ = convert(llama, KernelFFNConfig(), calibration_ids=ids, copy=True)
    with pytest.raises(InputError, match="converted already"):
        check_family(student)


def test_the_command(teacher_folder, monkeypatch, capsys):
    folder = teacher_folder("llama")
    monkeypatch.setattr(sys, "argv", ["hf-kernel-ffn", "families", "--check", str(folder)])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and printed.count("ok") == 6
    entry = ARCHITECTURES["llama"]
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(entry, ffn_norm="input_layernorm"))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "found 1 claim" in capsys.readouterr().err
