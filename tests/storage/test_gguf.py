"""A model in a GGUF file is one like any other, and a file that is none is refused in one line."""

import json
import struct

import pytest
import torch
from gguf_files import make_llama, round_as, write_gguf
from safetensors.torch import load_file
from teachers import tiny_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kernel_ffn import InputError, convert, load_student, load_teacher, load_tokenizer
from hf_kernel_ffn.checkpoint_code.errors import CheckpointError, MissingPackage
from hf_kernel_ffn.storage import gguf_header
from hf_kernel_ffn.storage.checkpoint import save_converted
from hf_kernel_ffn.storage.gguf_header import read_gguf_header
from hf_kernel_ffn.storage.loading import load_empty_teacher, load_stock_on_meta
from hf_kernel_ffn.storage.model_files import read_config

pytest.importorskip("gguf")

KINDS = ("F32", "F16", "Q8_0")
TEXT = "The old man, looked at\n\n 123 the sea's — ünïcode"


@pytest.fixture(scope="module")
def llama():
    return make_llama()


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def file(llama, tokenizer, kind, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / f"{kind}.gguf", llama, tokenizer, kind)


@pytest.fixture
def whole(llama, tokenizer, tmp_path):
    """A file to be broken."""
    return write_gguf(tmp_path / "model.gguf", llama, tokenizer)


def refusal(file, error=InputError):
    with pytest.raises(error) as caught:
        load_teacher(str(file))
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(file) in message
    return message


def test_a_teacher_predicts_what_the_same_safetensors_do(file, llama, kind, ids):
    teacher = load_teacher(str(file))
    assert type(teacher) is type(llama) and not teacher.training
    with torch.no_grad():
        assert torch.equal(teacher(ids).logits, round_as(llama, kind)(ids).logits)
    assert teacher.config.eos_token_id == teacher.generation_config.eos_token_id == 0


def test_a_teacher_is_one_like_any_other(file, llama, tmp_path, ids):
    teacher = load_teacher(str(file), "bfloat16")
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    teacher.float().save_pretrained(tmp_path / "saved")
    assert "quantization" not in (tmp_path / "saved" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, teacher(ids).logits)


def test_the_tokenizer_is_that_of_the_file_whatever_lies_beside_it(whole, tokenizer):
    beside = {"tokenizer_class": "BertTokenizer", "mask_token": "[MASK]"}
    (whole.parent / "tokenizer_config.json").write_text(json.dumps(beside))
    found = load_tokenizer(str(whole))
    assert found(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert found.mask_token is None and len(found) == len(tokenizer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_student_is_saved_in_the_dtype_it_has(file, tokenizer, dtype, tmp_path, ids):
    student, _ = convert(load_teacher(str(file), dtype), calibration_tokens=0)
    out = tmp_path / "student"
    out.mkdir()
    save_converted(student, str(file), out)
    dtypes = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
    assert dtypes == {getattr(torch, dtype)}

    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    with torch.no_grad():
        expected = load_student(str(out), dtype)(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
    saved = AutoTokenizer.from_pretrained(out)
    assert saved(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert all("/tmp" not in found.read_text() for found in out.glob("*token*.json"))


def test_a_config_and_an_empty_model_are_read_without_weights(file, llama):
    assert read_config(str(file))["architectures"] == ["LlamaForCausalLM"]
    empty = load_empty_teacher(str(file))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.config.intermediate_size == llama.config.intermediate_size


def test_a_streamed_conversion_refuses_it_by_name(whole):
    with pytest.raises(InputError, match=r"GGUF file .*model\.gguf for a streamed conversion"):
        load_stock_on_meta(str(whole))


def test_no_file_and_no_gguf_file(tmp_path):
    assert "found no file" in refusal(tmp_path / "absent.gguf")
    other = tmp_path / "model.gguf"
    other.write_bytes(b"PK\x03\x04 and so on")
    assert "it is no GGUF file" in refusal(other)
    other.write_bytes(b"")
    assert "found b''" in refusal(other)


def test_every_cut_is_told(whole):
    content = whole.read_bytes()
    for end in (4, 10, 23, 24, 100, 5_000, 60_000, len(content) // 2, len(content) - 1):
        whole.write_bytes(content[:end])
        assert "damaged or cut off" in refusal(whole, CheckpointError)


def test_damage_in_the_header_is_one_line(whole):
    content = whole.read_bytes()
    generator = torch.Generator().manual_seed(0)
    start = read_header_end(content)
    for place in torch.randint(8, start, (60,), generator=generator).tolist():
        damaged = bytearray(content)
        damaged[place : place + 8] = b"\xff" * 8
        whole.write_bytes(damaged)
        try:
            read_gguf_header(str(whole))
        except InputError as error:
            assert len(str(error).splitlines()) == 1


def read_header_end(content):
    return content.index(b"blk.0")


def test_another_version_and_an_odd_type(whole):
    content = whole.read_bytes()
    whole.write_bytes(content[:4] + struct.pack("<I", 1) + content[8:])
    assert "found version 1 of the format" in refusal(whole)


def test_an_unknown_architecture_is_named(llama, tokenizer, tmp_path):
    file = write_gguf(tmp_path / "odd.gguf", llama, tokenizer, architecture="rwkv7")
    message = refusal(file)
    assert "architecture 'rwkv7'" in message and "safetensors" in message


def test_a_file_without_a_tensor_is_refused(tokenizer, tmp_path, llama):
    short = tiny_teacher("llama", **{**llama.config.to_diff_dict(), "num_hidden_layers": 2})
    file = write_gguf(tmp_path / "short.gguf", short, tokenizer, claims={"block_count": 3})
    assert "tensors missing" in refusal(file)


def test_a_tensor_that_transformers_leaves_out_is_refused(llama, tokenizer, tmp_path):
    file = write_gguf(
        tmp_path / "more.gguf", llama, tokenizer, more={"rope_freqs.weight": torch.ones(4)}
    )
    assert "'rope_freqs.weight'" in refusal(file)


def test_the_missing_package_is_named(whole, monkeypatch):
    monkeypatch.setattr(gguf_header, "is_gguf_available", lambda: False)
    assert "pip install 'hf-kernel-ffn[gguf]'" in refusal(whole, MissingPackage)
