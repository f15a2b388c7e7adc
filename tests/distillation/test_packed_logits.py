"""Token ids and probabilities in few bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_kernel_ffn.distillation.packed_logits import (
    count_id_bytes,
    count_probability_bytes,
    pack_ids,
    pack_log_probabilities,
    unpack_ids,
    unpack_log_probabilities,
)


@st.composite
def sets_of_tokens(draw):
    vocabulary = draw(st.integers(1, 5000))
    top_k = draw(st.integers(1, min(80, vocabulary)))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(vocabulary, generator=generator)[:top_k].sort().values for _ in range(3)]
    return vocabulary, torch.stack(rows)


@given(sets_of_tokens())
def test_token_ids_come_back(case):
    vocabulary, ids = case
    packed = pack_ids(ids, vocabulary)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, count_id_bytes(ids.shape[1], vocabulary))
    assert torch.equal(unpack_ids(packed, ids.shape[1], vocabulary), ids)


@pytest.mark.parametrize("vocabulary", [64, 65, 49_152, 128_256, 262_144])
def test_the_first_and_the_last_tokens_come_back(vocabulary):
    for ids in (torch.arange(64), torch.arange(vocabulary - 64, vocabulary)):
        assert torch.equal(unpack_ids(pack_ids(ids, vocabulary), 64, vocabulary), ids)


@pytest.mark.parametrize("vocabulary", [49_152, 128_256, 262_144])
def test_64_tokens_and_the_rest_are_at_most_200_bytes(vocabulary):
    own_id = 4
    size = own_id + count_id_bytes(64, vocabulary) + count_probability_bytes(65)
    assert size <= 200
    assert size == {49_152: 178, 128_256: 190, 262_144: 198}[vocabulary]


def test_other_bytes_are_refused():
    packed = pack_ids(torch.arange(8), 100)
    packed[-3:] = 0
    with pytest.raises(ValueError, match="not 8"):
        unpack_ids(packed, 8, 100)


@given(seed=st.integers(0, 2**31), spread=st.floats(0.1, 8.0))
def test_probabilities_come_back_to_a_kl_of_little(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    exact = (torch.randn(7, 65, generator=generator).double() * spread).log_softmax(-1)
    packed = pack_log_probabilities(exact)
    assert packed.shape == (7, count_probability_bytes(65)) and packed.dtype == torch.uint8
    read = unpack_log_probabilities(packed, 65).double()
    torch.testing.assert_close(read.exp().sum(-1), torch.ones(7).double())
    divergence = (exact.exp() * (exact - read)).sum(-1)
    assert divergence.max() < 1e-5


def test_levels_are_read_in_their_middle():
    """A quarter of a level off is 4.6e-6, at the same size."""
    generator = torch.Generator().manual_seed(0)
    exact = (2 * torch.randn(4000, 65, generator=generator).double()).log_softmax(-1)
    read = unpack_log_probabilities(pack_log_probabilities(exact), 65).double()
    assert (exact.exp() * (exact - read)).sum(-1).mean() < 4e-6


def test_certainty_and_nothing_stay_finite():
    exact = torch.tensor([[0.0, -float("inf"), -200.0]])
    read = unpack_log_probabilities(pack_log_probabilities(exact), 3)
    assert read.isfinite().all()
    torch.testing.assert_close(read[0, 0].exp(), torch.tensor(1.0), atol=1e-6, rtol=0)
