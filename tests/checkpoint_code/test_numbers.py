"""Bad numbers: wherever the answer in float64 can be represented, the working dtype is finite and
close to it, forward and backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_cases import DTYPES, EXPONENTIALS, SIZE, module, undecided

from hf_kernel_ffn.checkpoint_code.settings import INTENSITIES
from hf_kernel_ffn.checkpoint_code.simplex import SIMPLEX_MAPS

KERNELS = ("half-yat", "root-half-yat", "yat", "exponential-yat", "exponential", "gaussian", "imq")
INPUTS = ("random", "zero", "at a prototype", "nothing fires", "one token", "no token", "no row")
BACKWARD_ROOM = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far a gradient may be from float64's, as a share of the largest entry: roundings of several
products."""


def compare(ffn, exact, x):
    """Whether there was something to compare: the float64 answer, forward and backward, can be
    represented."""
    dtype, double = x.dtype, x.double().requires_grad_(True)
    x = x.clone().requires_grad_(True)
    expected = exact(double)
    coefficients = exact.coefficients(double).detach()
    limit = 0.5 * torch.finfo(dtype).max
    if not all(
        torch.isfinite(t).all() and (t.numel() == 0 or t.abs().max() < limit)
        for t in (expected, coefficients)
    ):
        return False
    found = ffn(x)
    assert found.dtype == dtype and found.shape == expected.shape
    assert torch.isfinite(found).all(), "forward is not finite"
    with torch.no_grad():
        score, distance2 = exact.scores(x.detach().double())
        log_kernel = exact.kernel.log(score, distance2, **exact.kernel_parameters())
        log_size = torch.where(log_kernel.isfinite(), log_kernel.abs(), 0.0)
    # Distances are sums that cancel near a prototype: of ‖x − w‖² + ε, at least a hundredth of what
    # is added up, this share is noise.
    unsure = (
        8 * torch.finfo(torch.float32).eps / 0.01 if x.numel() and distance2 is not None else 0.0
    )
    if (
        exact.config.settings.kernel == "exponential-yat"
    ):  # where log κ itself, not its exponential, goes with that sum
        unsure *= max(1.0, log_size.max().item()) if x.numel() else 0.0
    close = not undecided(exact, x) and unsure < 0.5
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    if close:  # within the roundings of one mixture: of what is added up, not of what is left of it
        scale = (
            coefficients.abs() @ exact.output_prototypes.weight.detach().T.abs()
            + exact.output_prototypes.bias.detach().abs()
        )
        room = 1e-3 if dtype == torch.float32 else 8 * eps
        if exact.config.settings.values == "gated":
            room = 4 * room  # u·x is one more rounded product
        room = room + 2 * unsure
        error = (found.detach().double() - expected.detach()).abs()
        assert (error <= room * scale + tiny).all(), (
            f"forward is off by {(error / (scale + tiny)).max():.2g}"
        )

    natural = steep = through_score = 0.0
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if (
        close and expected.numel()
    ):  # what is added up in a gradient with respect to the logarithm of anything
        natural = (direction.double().abs() * scale).sum().item()
        with torch.no_grad():
            written = (
                direction.double().abs()
                @ exact.output_prototypes.weight.double().abs()
                * coefficients.abs()
            )
            steep = (written * log_size).sum().item()  # where c goes with an exponential of log κ
            grows = log_size if exact.config.settings.kernel in EXPONENTIALS else 1.0
            through_score = (
                (written * grows / score.abs().clamp_min(1e-30)).sum().item()
            )  # d log s = ds / s
    expected.backward(direction.double())
    found.backward(direction)
    truth = {name: p.grad for name, p in exact.named_parameters()} | {"x": double.grad}
    gradients = {name: p.grad for name, p in ffn.named_parameters()} | {"x": x.grad}
    input_size = x.detach().abs().max().item() if x.numel() else 0.0
    row_size = exact.input_prototypes.weight.detach().abs().max().item()
    for name, gradient in truth.items():
        if gradient is None or not gradient.numel():
            continue
        largest = gradient.abs().max().item()
        if not math.isfinite(largest) or largest >= limit:
            continue
        mine = gradients[name]
        assert mine is not None and torch.isfinite(mine).all(), f"gradient of {name} is not finite"
        if close:
            of = (
                dict(exact.named_parameters()).get(name, double).detach().abs().max().item()
                if "log_ratio" not in name
                else 1.0
            )
            added = (
                natural + steep
                if exact.config.settings.kernel in EXPONENTIALS or "temperature" in name
                else natural
            )
            others = {
                "input_prototypes.bias": 1.0,
                "x": row_size,
                "input_prototypes.weight": input_size,
            }
            added = added / max(of, 1e-30) + through_score * others.get(name, 0.0)
            room = (
                (BACKWARD_ROOM[dtype] + 2 * unsure) * largest
                + (8 * eps + 2 * unsure) * added
                + 1e3 * tiny
            )
            off = (mine.double() - gradient).abs().max().item()
            assert off <= room, (
                f"gradient of {name} is off by {off:.2g} of {largest:.2g}, {added:.2g}"
            )
    return True


CASES = {"compared": 0, "not representable": 0}


EVERY = [(kernel, simplex) for kernel in KERNELS for simplex in SIMPLEX_MAPS]
ANY = given(
    intensity=st.sampled_from(INTENSITIES),
    values=st.sampled_from(["fixed", "fixed", "gated"]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(INPUTS),
    log_norm=st.floats(-6, 4),
    log_row=st.floats(-2, 1),
    seed=st.integers(0, 2**31),
)


def check(kernel, simplex, intensity, values, dtype, kind, log_norm, log_row, seed):
    ffn, exact, x = module(
        kernel, simplex, intensity, values, kind, 10**log_norm, 10**log_row, seed, dtype
    )
    CASES["compared" if compare(ffn, exact, x) else "not representable"] += 1


@pytest.mark.parametrize("kernel, simplex", EVERY)
@settings(max_examples=8)
@ANY
def test_finite_and_close_to_float64(kernel, simplex, **case):
    check(kernel, simplex, **case)


@pytest.mark.slow
@pytest.mark.parametrize("kernel, simplex", EVERY)
@settings(max_examples=100)
@ANY
def test_finite_and_close_to_float64_in_three_thousand_cases(kernel, simplex, **case):
    check(kernel, simplex, **case)


def test_most_cases_could_be_compared():
    """Runs after the others: a property that skips everything proves nothing."""
    total = sum(CASES.values())
    if not total:
        pytest.skip("the cases were not run")
    print(CASES)
    assert CASES["compared"] > 0.6 * total


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silence_is_zero_with_zero_gradients(kernel, dtype):
    """A zero input with no bias fires nothing in the kernels of a product, and the output is the
    output bias."""
    for simplex in SIMPLEX_MAPS:
        for intensity in INTENSITIES:
            ffn, _, _ = module(kernel, simplex, intensity, "fixed", "zero", 1.0, 1.0, 0, dtype)
            x = torch.zeros(1, 2, SIZE, dtype=dtype, requires_grad=True)
            y = ffn(x)
            y.float().sum().backward()
            assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()
            if kernel in ("half-yat", "root-half-yat", "yat", "exponential-yat"):
                assert torch.equal(y, ffn.output_prototypes.bias.expand_as(y))
                assert not x.grad.any()
