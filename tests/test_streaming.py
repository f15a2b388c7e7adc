"""A streamed conversion writes what one in memory writes, byte for byte, and holds little."""

import pytest
import torch

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.loading import load_teacher
from hf_kernel_ffn.streaming import convert_streamed
from hf_kernel_ffn.surgery import save_converted

IDS = torch.randint(3, 4096, (12, 32), generator=torch.Generator().manual_seed(0))


def folder_bytes(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize(
    "settings, layers",
    [({}, None), ({"simplex": "threshold", "top_k": 5, "intensity": "gate"}, "0,2"), ({"simplex": "entmax-1.5"}, "1")],
    ids=["all", "0,2", "1"],
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_same_bytes_as_in_memory(teacher_folder, family, settings, layers, calibrated, tmp_path):
    source, config = str(teacher_folder(family)), KernelFFNConfig(**settings)
    options = dict(calibration_ids=IDS, calibration_tokens=384) if calibrated else dict(calibration_tokens=0)
    student, report = convert(load_teacher(source), config, layers, **options)
    save_converted(student, source, tmp_path / "whole", conversion=report.to_dict())
    (tmp_path / "streamed").mkdir()
    convert_streamed(source, tmp_path / "streamed", config, layers, **options)
    found, expected = folder_bytes(tmp_path / "streamed"), folder_bytes(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name


def test_what_cannot_be_streamed_is_said(teacher_folder, tmp_path):
    source = str(teacher_folder("llama"))
    with pytest.raises(InputError, match="calibration text, or 0"):
        convert_streamed(source, tmp_path)
