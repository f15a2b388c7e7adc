"""Saving: the last save is what loads, with checksums, under the model's own names, by umask."""

import os
import stat

import pytest
import torch
from teachers import tiny_teacher
from tiny_families import FAMILIES, tiny
from transformers import AutoModelForCausalLM

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.checkpoint_code.operators import namespace
from hf_kernel_ffn.checkpoint_code.untrusted_files import read_headers
from hf_kernel_ffn.cli.app import main
from hf_kernel_ffn.families.task_classes import get_stock_heads
from hf_kernel_ffn.storage.loading import load_student, load_teacher
from hf_kernel_ffn.storage.verification import verify_folder

SMALL = {"max_shard_size": "30KB"}


def bad(folder):
    return {finding.what: finding.found for finding in verify_folder(folder) if not finding.good}


def make(seed=0):
    teacher = tiny_teacher("llama", seed=seed)
    return convert(teacher, KernelFFNConfig(), calibration_tokens=0)[0]


def assert_is(folder, student):
    loaded = load_student(str(folder))
    expected = student.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert bad(folder) == {}


@pytest.mark.parametrize("first, second", [({}, SMALL), (SMALL, {}), (SMALL, SMALL), ({}, {})])
def test_the_last_save_is_what_loads(tmp_path, first, second):
    make(seed=1).save_pretrained(tmp_path, **first)
    student = make(seed=2)
    student.save_pretrained(tmp_path, **second)
    assert_is(tmp_path, student)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(stock.lm_head.weight, student.lm_head.weight)


def test_a_save_that_fails_keeps_what_was_there(tmp_path, monkeypatch):
    student = make()
    student.save_pretrained(tmp_path)
    other = make(seed=1)
    other.generation_config.temperature = -1.0  # the stock method refuses it
    with pytest.raises(ValueError, match="temperature"):
        other.save_pretrained(tmp_path)
    assert torch.equal(load_student(str(tmp_path)).lm_head.weight, student.lm_head.weight)


def test_a_folder_of_both_kinds_is_read_as_transformers_reads_it(tmp_path):
    """Another program may have left both."""
    whole, sharded = make(seed=1), make(seed=2)
    whole.save_pretrained(tmp_path / "whole")
    sharded.save_pretrained(tmp_path / "both", **SMALL)
    os.rename(tmp_path / "whole" / "model.safetensors", tmp_path / "both" / "model.safetensors")
    loaded = load_student(str(tmp_path / "both"))
    assert torch.equal(loaded.lm_head.weight, whole.lm_head.weight)
    assert "index" in bad(tmp_path / "both")["weights"]


def test_both_ways_of_converting_read_the_same_file(teacher_folder, tmp_path, monkeypatch):
    """Of a stock model that was saved twice."""
    both = tmp_path / "both"
    tiny_teacher("llama", vocab_size=4096, seed=2).save_pretrained(both, **SMALL)
    tiny_teacher("llama", vocab_size=4096, seed=1).save_pretrained(tmp_path / "whole")
    os.rename(tmp_path / "whole" / "model.safetensors", both / "model.safetensors")
    load_teacher(str(teacher_folder("llama")))
    for file in teacher_folder("llama").glob("tokenizer*"):
        (both / file.name).write_bytes(file.read_bytes())
    for name, options in (("memory", []), ("stream", ["--stream"])):
        arguments = ["convert", both, tmp_path / name, "--calibration-tokens", 0, *options]
        monkeypatch.setattr("sys.argv", ["", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
    files = [tmp_path / name / "model.safetensors" for name in ("memory", "stream")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", ["café", "cafè", "модель 模型", "a.b-c d'e", "😀"])
def test_the_folder_may_have_any_name(tmp_path, name):
    """It becomes part of the name of a module and of torch's operators."""
    student = make()
    student.save_pretrained(tmp_path / name)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
    ids = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, student(ids).logits)


def test_operators_of_two_names_have_two_namespaces():
    names = ("a.café.operators", "a.cafè.operators", "a.caf_.operators", "a.caf_e9_.operators")
    spaces = [namespace(name) for name in names]
    assert len({*spaces}) == 4 and all(space.isascii() and space.isidentifier() for space in spaces)


@pytest.mark.parametrize("options", [{}, SMALL])
def test_weights_are_readable_by_whom_the_rest_is(tmp_path, options):
    before = os.umask(0o022)
    try:
        make().save_pretrained(tmp_path / "out", **options)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o644}


def test_what_is_pushed_while_saving_has_its_checksums(tmp_path, monkeypatch):
    """The hub is stood in for by the one call that uploads."""
    from transformers.utils import hub

    pushed = {}

    def upload(self, working_dir, repo_id, *arguments, **options):
        pushed[repo_id] = bad(working_dir)

    class Api:
        def create_repo(self, repo_id, **options):
            return type("Repo", (), {"repo_id": repo_id})

    owner = next(cls for cls in type(make()).mro() if "_upload_modified_files" in vars(cls))
    monkeypatch.setattr(owner, "_upload_modified_files", upload)
    monkeypatch.setattr(hub, "hf_api", Api)
    make().save_pretrained(tmp_path / "student", push_to_hub=True, commit_message="x")
    make().save_pretrained(tmp_path / "student", push_to_hub=True, repo_id="me/named")
    assert pushed == {"student": {}, "me/named": {}}
    assert bad(tmp_path / "student") == {}


def heads_of(family):
    """Every head of a family, once."""
    heads = get_stock_heads(family)
    return {name: auto for auto, name in reversed(heads.items()) if auto != "AutoConfig"}


ALL_HEADS = [(family, head) for family in FAMILIES for head in heads_of(family)]
RENAMED = [(family, head) for family, head in ALL_HEADS if family == "vit"]
"""Those of which transformers writes files under other names than the model's."""


def save_and_load(family, head, folder):
    teacher = tiny(family, heads_of(family)[head])
    teacher.save_pretrained(folder / "teacher")
    stock = load_teacher(str(folder / "teacher"))
    student, _ = convert(stock, calibration_tokens=0)
    student.save_pretrained(folder / "student")
    assert_is(folder / "student", student)
    assert set(read_headers(folder / "student")) <= set(student.state_dict())


@pytest.mark.parametrize("family, head", RENAMED, ids=lambda value: value)
def test_heads_are_saved_under_the_models_own_names(family, head, tmp_path):
    save_and_load(family, head, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family, head", ALL_HEADS, ids=lambda value: value)
def test_every_head_of_every_family_is_saved_loaded_and_verified(family, head, tmp_path):
    save_and_load(family, head, tmp_path)
