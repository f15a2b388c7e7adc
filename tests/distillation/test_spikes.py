"""What a spike is in the outputs of an FFN, and what it is shortened to."""

import pytest
import torch

from hf_kernel_ffn.conversion.figures import shrink_spikes
from hf_kernel_ffn.distillation.spikes import measure_longest_ordinary


def test_tokens_that_write_nothing_do_not_count():
    output = torch.zeros(10, 4)
    output[:3] = torch.eye(3, 4)
    assert measure_longest_ordinary(output).item() == pytest.approx(10)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_is_a_spike_where_nothing_is_written(tokens):
    output = torch.zeros(tokens, 4)
    longest = measure_longest_ordinary(output)
    assert longest == torch.inf
    assert torch.equal(shrink_spikes(output, longest), torch.ones(tokens, 1))


def test_spikes_become_as_long_as_an_ordinary_token_may_be():
    output = torch.ones(9, 1) * torch.tensor([[1.0, 0.0]])
    output[4] = torch.tensor([0.0, -500.0])
    shrink = shrink_spikes(output, measure_longest_ordinary(output))
    expected = torch.ones(9, 1)
    expected[4] = 10 / 500
    torch.testing.assert_close(shrink, expected)
