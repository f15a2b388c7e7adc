"""The divergence that is made in parts equals the one that is not, and so do gradients."""

import pytest
import torch

from hf_kernel_ffn.distillation import divergence
from hf_kernel_ffn.distillation.divergence import kl, kl_of_logits, soften


@pytest.mark.parametrize("shape", [(2, 5), (7,), (), (0, 3)])
@pytest.mark.parametrize("at_once", [1, 33, 10_000])
def test_kl_in_parts_is_kl(shape, at_once, monkeypatch):
    monkeypatch.setitem(divergence.NUMBERS_AT_ONCE, "cpu", at_once)
    generator = torch.Generator().manual_seed(0)
    target = 3 * torch.randn(*shape, 11, generator=generator, dtype=torch.float64)
    ours = torch.randn(*shape, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)

    expected = kl(ours.log_softmax(-1), target.log_softmax(-1))
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), ours)
    found = kl_of_logits(ours, target)
    (gradient,) = torch.autograd.grad((weights * found).sum(), ours)

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_logits_of_few_bits_are_compared_in_float32():
    generator = torch.Generator().manual_seed(0)
    ours, target = torch.randn(2, 4, 300, generator=generator).bfloat16()
    ours.requires_grad_()
    found = kl_of_logits(ours, target)
    found.sum().backward()

    expected = kl(ours.float().log_softmax(-1), target.float().log_softmax(-1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert ours.grad.dtype == torch.bfloat16


def test_a_temperature_of_one_leaves_logits_as_they_are():
    logits = torch.randn(2, 3).bfloat16()
    assert soften(logits, 1.0) is logits
    torch.testing.assert_close(soften(logits, 2.0), logits.float() / 2)
