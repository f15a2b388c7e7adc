"""Simplex maps: against entmax, against bisection, gradients, and the laws that shares obey."""

import math

import entmax
import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_kernel_ffn.checkpoint_code.simplex import SIMPLEX_MAPS, compute_shares

MAPS = ("softmax", "sparsemax", "entmax-1.5", "top-k", "threshold")
K = 3


def run(name, log_kernel, temperature=1.0, top_k=K):
    """Shares as a float64 numpy array."""
    log_kernel = torch.as_tensor(np.array(log_kernel), dtype=torch.float64)
    return compute_shares(name, log_kernel, temperature, top_k if name == "top-k" else None).numpy()


# Multiples of 1/8: differences are exact and no two scores are nearly equal. None: a unit that does
# not fire.
scores = st.lists(st.integers(-80, 80), min_size=1, max_size=12, unique=True).map(
    lambda s: [v / 8 for v in s]
)
scores_or_silent = st.lists(
    st.one_of(st.none(), st.integers(-80, 80)), min_size=1, max_size=12
).map(lambda s: [-math.inf if v is None else v / 8 for v in s])
temperatures = st.floats(0.05, 20)
each_map = pytest.mark.parametrize("name", MAPS)


def test_every_map_is_tested():
    assert set(SIMPLEX_MAPS) == set(MAPS)


@pytest.mark.parametrize(
    "name, theirs", [("sparsemax", entmax.sparsemax), ("entmax-1.5", entmax.entmax15)]
)
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_agrees_with_the_entmax_package(name, theirs, spread):
    z = spread * torch.randn(
        40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    mine, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    pi, expected = compute_shares(name, mine, 0.7), theirs(other / 0.7, -1)
    torch.testing.assert_close(pi, expected, rtol=0, atol=1e-12)
    direction = torch.randn(40, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (pi * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-10)


@each_map
@given(log_kernel=scores_or_silent, temperature=temperatures)
def test_agrees_with_bisection(name, log_kernel, temperature):
    if name == "top-k":  # which of several equal units is kept is nobody's promise
        log_kernel = list(dict.fromkeys(log_kernel))
    expected = reference.shares_of_logs(name, log_kernel, temperature, K)
    np.testing.assert_allclose(run(name, log_kernel, temperature), expected, rtol=0, atol=1e-12)


@each_map
@pytest.mark.parametrize("size", [700, 5000])
def test_float32_rows_as_wide_as_an_ffn(name, size):
    log_kernel = torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    pi = compute_shares(name, log_kernel, 0.2, K if name == "top-k" else None)
    assert pi.dtype == torch.float32
    np.testing.assert_allclose(
        pi.numpy(),
        [reference.shares_of_logs(name, r.tolist(), 0.2, K) for r in log_kernel],
        atol=1e-5,
    )


@each_map
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_gradients(name, temperature):
    z = torch.randn(
        3, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True
    )
    silent = torch.zeros(3, 7, dtype=torch.bool)
    silent[0, 1] = silent[1, :5] = silent[2] = True
    tau = torch.tensor([temperature], dtype=torch.float64, requires_grad=True)

    def function(z, tau):
        return compute_shares(
            name, z.masked_fill(silent, -math.inf), tau, K if name == "top-k" else None
        )

    assert torch.autograd.gradcheck(function, (z, tau))


@each_map
@given(log_kernel=scores_or_silent, temperature=temperatures)
def test_on_the_simplex_and_only_on_what_fires(name, log_kernel, temperature):
    pi = run(name, log_kernel, temperature)
    firing = np.isfinite(log_kernel)
    assert (pi >= 0).all()
    assert (pi[~firing] == 0).all()
    assert pi.sum() == pytest.approx(1.0 if firing.any() else 0.0, abs=1e-12)


@each_map
@given(log_kernel=scores, temperature=temperatures, data=st.data())
def test_permutation_equivariant(name, log_kernel, temperature, data):
    order = data.draw(st.permutations(range(len(log_kernel))))
    permuted = run(name, [log_kernel[i] for i in order], temperature)
    np.testing.assert_allclose(
        permuted, run(name, log_kernel, temperature)[list(order)], rtol=0, atol=1e-12
    )


@each_map
@given(log_kernel=scores_or_silent, shift=st.integers(-4000, 4000).map(lambda v: v / 8))
def test_shift_invariant(name, log_kernel, shift):
    np.testing.assert_allclose(
        run(name, [v + shift for v in log_kernel]), run(name, log_kernel), rtol=0, atol=1e-12
    )


@each_map
@given(log_kernel=scores)
def test_cold_is_one_hot_and_hot_is_uniform(name, log_kernel):
    assert run(name, log_kernel, 1e-8)[np.argmax(log_kernel)] == 1
    hot = run(name, log_kernel, 1e10)
    support = min(K, len(log_kernel)) if name == "top-k" else len(log_kernel)
    np.testing.assert_allclose(np.sort(hot)[-support:], 1 / support, rtol=1e-6)
    np.testing.assert_allclose(np.sort(hot)[:-support], 0, atol=0)


@each_map
@given(log_kernel=scores_or_silent, top_k=st.integers(1, 14))
def test_support_sizes(name, log_kernel, top_k):
    firing = int(np.isfinite(log_kernel).sum())
    support = int((run(name, log_kernel, 1.0, top_k) > 0).sum())
    if name in ("softmax", "threshold"):
        assert support == firing
    elif name == "top-k":
        assert support == min(top_k, firing)
    else:
        assert min(1, firing) <= support <= firing


@each_map
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 5, 11008, 28672])
def test_nothing_fires(name, dtype, size):
    log_kernel = torch.full((2, size), -math.inf, dtype=dtype)
    log_kernel[1, 0] = 2.0  # a neighbour that fires must not hide it
    log_kernel.requires_grad_()
    tau = torch.ones(1, dtype=dtype, requires_grad=True)
    pi = compute_shares(name, log_kernel, tau, K if name == "top-k" else None)
    assert (pi[0] == 0).all()
    assert pi[1, 0] == 1
    (pi * torch.linspace(1, 2, size, dtype=dtype)).sum().backward()
    assert (log_kernel.grad[0] == 0).all()
    assert torch.isfinite(log_kernel.grad).all()
    assert torch.isfinite(tau.grad).all()


@each_map
def test_extreme_log_kernels_give_shares(name):
    pi = run(name, [-1e30, 1e30, -math.inf, 0.0, 1e30 * (1 - 1e-6)])
    assert np.isfinite(pi).all()
    assert pi[1] == 1
