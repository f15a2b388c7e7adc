"""Step sizes in proportion to what is trained."""

import pytest
import torch

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.distillation.optimizers import make_optimizers
from hf_kernel_ffn.distillation.recipe import Stage


@pytest.fixture
def student(make_teacher, ids):
    settings = KernelFFNConfig(rows="tied", simplex="threshold", top_k=6, skip=True)
    return convert(make_teacher("llama"), settings, calibration_ids=ids)[0]


def read_peaks(student, rate=0.01):
    stage = Stage(name="logits", tokens=1, learning_rate=rate, optimizer="adamw")
    parameters = [p for ffn in student.kernel_ffns().values() for p in ffn.parameters()]
    (optimizer,) = make_optimizers(student, parameters, stage)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return {names[id(group["params"][0])]: group["peak"] for group in optimizer.param_groups}


def test_a_far_knot_does_not_lengthen_the_steps_of_the_others(student):
    name, knots = next(
        (name, parameter)
        for name, parameter in student.named_parameters()
        if name.endswith("pieces.knot")
    )
    before = read_peaks(student)[name]
    assert before == pytest.approx(0.01 * knots.abs().median().item())
    with torch.no_grad():
        knots[0, 0] = 1e6
    assert read_peaks(student)[name] == pytest.approx(before, rel=0.05)


def test_a_matrix_steps_by_its_root_mean_square(student):
    peaks = read_peaks(student)
    for name, parameter in student.named_parameters():
        if name.endswith(("input_prototypes.weight", "skip.weight")):
            size = parameter.square().mean().sqrt().item()
            assert peaks[name] == pytest.approx(0.01 * size)


def test_a_step_is_that_of_torchs_loop(student):
    stage = Stage(name="logits", tokens=1, learning_rate=0.01, optimizer="adamw")
    parameters = [p for ffn in student.kernel_ffns().values() for p in ffn.parameters()]
    start = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator) for p in parameters]

    def step(fused):
        for parameter, value, gradient in zip(parameters, start, gradients, strict=True):
            parameter.data.copy_(value)
            parameter.grad = gradient.clone()
        (optimizer,) = make_optimizers(student, parameters, stage)
        assert optimizer.defaults["fused"]
        for group in optimizer.param_groups:
            group.update(fused=fused, lr=group["peak"])
        for _ in range(3):
            optimizer.step()
        return [parameter.detach().clone() for parameter in parameters]

    torch.testing.assert_close(step(True), step(None), rtol=1e-5, atol=1e-7)
