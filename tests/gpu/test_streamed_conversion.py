"""A streamed conversion on another device than the CPU."""

import pytest
import tiny_families
import torch
from safetensors.torch import load_file

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.conversion.streamed_model import StreamedModel
from hf_kernel_ffn.conversion.streaming import convert_streamed
from hf_kernel_ffn.conversion.tensor_reader import Reader
from hf_kernel_ffn.storage.checkpoint import save_converted
from hf_kernel_ffn.storage.loading import load_stock_on_meta, load_teacher

IDS = torch.randint(3, 300, (12, 32), generator=torch.Generator().manual_seed(0))
FAMILIES = {"llama": "AutoModelForCausalLM", "gpt2": "AutoModelForCausalLM"}


@pytest.fixture(params=FAMILIES)
def source(request, tokenizer, tmp_path):
    folder = tmp_path / request.param
    model = tiny_families.tiny(request.param, FAMILIES[request.param])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_all_that_has_weights_is_on_the_device(source):
    """By the meta device: what is anywhere else would not go through a block with it."""
    teacher = load_stock_on_meta(source)
    reader = Reader(source, teacher)
    streamed = StreamedModel(teacher, reader, "meta")
    for name in streamed.get_block_names(0):
        streamed.place(name.removeprefix(streamed.prefix), reader.read(name))
    tensors = [*teacher.parameters(), *teacher.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    streamed.stop_reading_embedding()
    assert streamed.embedding(IDS).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("rows", ["tied", "free"])
def test_a_gpu_makes_what_it_makes_in_memory(source, rows, tmp_path):
    settings = KernelFFNConfig(rows=rows)
    teacher = load_teacher(source, device="cuda")
    student, report = convert(teacher, settings, calibration_ids=IDS)
    save_converted(student, source, tmp_path / "whole", conversion=report.to_dict())
    convert_streamed(source, tmp_path / "out", settings, calibration_ids=IDS, device="cuda")
    whole, streamed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")
    )
    assert whole.keys() == streamed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(streamed[name], tensor, atol=1e-4, rtol=1e-3)
