"""Kernels: their formulas, and the properties that each declares."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from hf_kernel_ffn import KernelFFNConfig, register_kernel
from hf_kernel_ffn.checkpoint_code.kernels import KERNELS, Kernel, get_kernel

BUILT_IN = ("exponential", "gaussian", "imq", "yat", "exponential-yat", "half-yat")
NONNEGATIVE = [name for name in BUILT_IN if get_kernel(name).nonnegative]
POSITIVE_DEFINITE = [name for name in BUILT_IN if get_kernel(name).positive_definite]


class Linear(Kernel):
    def value(self, score, distance2=None):
        return score


@dataclass(frozen=True)
class Boxcar(Kernel):
    h: float = 1.0

    def value(self, score, distance2):
        return (distance2 <= self.h**2).to(score.dtype)


LINEAR = Linear("linear", nonnegative=False, positive_definite=True)
BOXCAR = Boxcar("boxcar", nonnegative=True, positive_definite=False, uses_distance=True)


def gram(kernel, points, b=None, **parameters):
    """Gram matrix over augmented points (w, b) in float64."""
    points = torch.as_tensor(points, dtype=torch.float64)
    b = (
        torch.zeros(len(points), dtype=torch.float64)
        if b is None
        else torch.as_tensor(b, dtype=torch.float64)
    )
    score = points @ points.T + b[:, None] * b * kernel.uses_bias
    distance2 = (points[:, None] - points).square().sum(-1)
    parameters = {
        name: torch.tensor(value, dtype=torch.float64) for name, value in parameters.items()
    }
    return kernel.value(score, distance2 if kernel.uses_distance else None, **parameters)


def points_and_biases(size=2.0):
    return st.tuples(st.integers(2, 8), st.integers(1, 3)).flatmap(
        lambda shape: st.tuples(
            npst.arrays(np.float64, shape, elements=st.floats(-size, size)),
            npst.arrays(np.float64, shape[0], elements=st.floats(-size, size)),
        )
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_value_and_log_are_the_formula(name):
    kernel, generator = KERNELS[name], torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    w = torch.cat(
        [torch.randn(5, 4, generator=generator, dtype=torch.float64), x[:1]]
    )  # one prototype on an input
    b = torch.randn(6, generator=generator, dtype=torch.float64) * kernel.uses_bias
    parameters = {key: torch.tensor([0.3], dtype=torch.float64) for key in kernel.parameters}
    score, distance2 = x @ w.T + b, (x[:, None] - w).square().sum(-1)
    plain = dict.fromkeys(parameters, 0.3)
    expected = [
        [
            reference.KERNELS[name](x_.numpy(), w_.numpy(), b_.item(), **plain)
            for w_, b_ in zip(w, b)
        ]
        for x_ in x
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        kernel.value(score, distance2, **parameters), expected, rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(
        kernel.log(score, distance2, **parameters).exp(), expected, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("name", ["yat", "exponential-yat", "half-yat"])
def test_log_is_minus_infinity_without_gradient_where_nothing_fires(name):
    score = torch.tensor(
        [0.0, -2.0 if name == "half-yat" else 0.0], dtype=torch.float64, requires_grad=True
    )
    parameters = dict.fromkeys(KERNELS[name].parameters, torch.tensor(1.0))
    log = KERNELS[name].log(score, torch.ones(2, dtype=torch.float64), **parameters)
    assert (log == -math.inf).all()
    log.where(log > -math.inf, torch.zeros_like(log)).sum().backward()
    assert (score.grad == 0).all()


def test_log_does_not_underflow_where_the_kernel_does():
    far = torch.tensor([1e4])
    log = KERNELS["gaussian"].log(None, far, bandwidth=torch.tensor(1.0))
    assert KERNELS["gaussian"].value(None, far, bandwidth=torch.tensor(1.0)) == 0
    assert log.item() == -5e3


def test_yat_does_not_vanish_far_away():
    w, direction = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 4.0]).double() / 5
    x = 1e6 * direction
    value = KERNELS["yat"].value(x @ w, (x - w).square().sum(), epsilon=torch.tensor(1.0))
    assert value.item() == pytest.approx((w @ direction).item() ** 2, rel=1e-4)  # ‖w‖² cos²θ


@pytest.mark.parametrize("name", NONNEGATIVE)
@given(data=points_and_biases(5.0), parameter=st.floats(1e-3, 10))
def test_declared_nonnegative(name, data, parameter):
    kernel = KERNELS[name]
    values = gram(kernel, *data, **dict.fromkeys(kernel.parameters, parameter))
    assert (values >= 0).all()


@pytest.mark.parametrize("name", POSITIVE_DEFINITE)
@given(data=points_and_biases(), parameter=st.floats(1e-2, 10))
def test_declared_positive_definite(name, data, parameter):
    kernel = KERNELS[name]
    matrix = gram(kernel, *data, **dict.fromkeys(kernel.parameters, parameter))
    assert torch.linalg.eigvalsh(matrix)[0] >= -1e-10 * matrix.trace()


def test_what_is_declared():
    assert set(NONNEGATIVE) == set(BUILT_IN)
    assert set(POSITIVE_DEFINITE) == set(BUILT_IN) - {"half-yat"}


def test_half_yat_is_not_positive_definite():
    angles = torch.arange(10) * 2 * math.pi / 10
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    smallest = torch.linalg.eigvalsh(gram(KERNELS["half-yat"], circle, epsilon=10.0))[0].item()
    assert smallest == pytest.approx(-0.009, abs=5e-4)
    assert torch.linalg.eigvalsh(gram(KERNELS["yat"], circle, epsilon=10.0))[0] >= -1e-12


def test_linear_is_positive_definite_but_negative_and_refused(registry):
    register_kernel(LINEAR)
    matrix = gram(LINEAR, np.random.default_rng(0).normal(size=(6, 3)))
    assert torch.linalg.eigvalsh(matrix)[0] >= -1e-12
    assert (matrix < 0).any()
    with pytest.raises(ValueError, match="'linear' can be negative"):
        KernelFFNConfig(kernel="linear")


def test_boxcar_is_nonnegative_but_not_positive_definite(registry):
    register_kernel(BOXCAR)
    matrix = gram(BOXCAR, [[0.0], [1.0], [2.0]])
    assert torch.linalg.eigvalsh(matrix)[0].item() == pytest.approx(1 - math.sqrt(2))
    assert (matrix >= 0).all()
    assert KernelFFNConfig(kernel="boxcar").kernel == "boxcar"


def test_registration_refuses_what_it_cannot_use(registry):
    with pytest.raises(TypeError, match="not the class"):
        register_kernel(Linear)
    with pytest.raises(ValueError, match="'yat' is already registered"):
        register_kernel(Linear("yat", nonnegative=True, positive_definite=True))
    assert type(registry["yat"]).__name__ == "Yat"
    with pytest.raises(
        ValueError, match="'cosine'.*exponential, gaussian, imq, yat, exponential-yat, half-yat"
    ):
        get_kernel("cosine")
    with pytest.raises(NotImplementedError, match="'empty'"):
        Kernel("empty", nonnegative=True, positive_definite=True).value(torch.ones(1), None)


def test_registering_again_after_a_reload_is_no_error(registry):
    register_kernel(LINEAR)
    again = Linear("linear", nonnegative=False, positive_definite=True)
    assert register_kernel(again) is again is get_kernel("linear")


def test_a_namesake_class_does_not_replace_a_built_in(registry):
    namesake = type("Yat", (Linear,), {"__qualname__": "Yat"})
    with pytest.raises(ValueError, match="'yat' is already registered"):
        register_kernel(namesake("yat", nonnegative=True, positive_definite=True))
