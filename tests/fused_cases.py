"""The fused readout against float64, run by test_fused.py: on a GPU where there is one, otherwise by Triton's interpreter.

Every tolerance is a first-order bound on what rounding does, worked out in float64 for the case at hand (``Bound``): scores and
distances are summed in float32, and coefficients and gradients of scores are rounded once to the working dtype.
"""

import math

import pytest
import torch
import triton
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_readout import inputs, make_layer
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from hf_kernel_ffn import InputError, fused, one_pass
from hf_kernel_ffn.fused import FEW, active, fused_mixture, gather

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if CUDA:  # one shape, not six, is compiled for every size that a property draws
    for kernel in (fused.forward_tuned, fused.backward_tuned):
        kernel.configs = kernel.configs[-1:]
else:
    assert fused.INTERPRETED
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        """The interpreter keeps bfloat16 as bits, and would multiply those as integers (triton 3.6)."""
        a, b = (
            TensorHandle((t.data.astype("uint32") << 16).view("float32"), triton.language.float32)
            if t.dtype.scalar == triton.language.bfloat16 and t.data.dtype == "uint16"
            else t
            for t in (a, b)
        )
        return multiply(self, a, b, *rest)

    InterpreterBuilder.create_dot = widened

NAMES = ("x", "rows", "bias", "dictionary", "epsilon", "factor", "up", "up_bias")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHOLE = 2**28
variants = pytest.mark.parametrize("convex", [False, True], ids=["conic", "convex"])
gating = pytest.mark.parametrize("gated", [False, True], ids=["fixed", "gated"])


def strided(tensor, how):
    """The same numbers, laid out otherwise."""
    if how == "transposed":
        return tensor.T.contiguous().T
    if how == "sliced":
        return torch.stack([tensor, torch.full_like(tensor, math.nan)], -1).flatten(-2)[..., ::2]
    return tensor


def case(tokens, size, prototypes, convex, gated, dtype=torch.float32, norm=4.0, row=1.0, tau=0.8, seed=0, layout=""):
    """The eight tensors of a mixture, on the device, loud enough to matter: rows of length ``norm`` and ``row``, ε a hundredth of the
    mean squared distance, as a conversion sets it."""
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape):
        matrix = torch.randn(*shape, generator=generator)
        return matrix / matrix.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    x, rows, bias = norm * unit(tokens, size), row * unit(prototypes, size), 0.1 * norm * row * unit(1, prototypes)[0]
    epsilon = torch.tensor([0.01 * (norm**2 + row**2)])
    tensors = [x, rows, bias, unit(size, prototypes), epsilon, torch.tensor([tau])]
    tensors += [unit(prototypes, size) / norm, unit(1, prototypes)[0]] if gated else [None, None]
    tensors = [t if t is None or i in (4, 5) else t.to(dtype) for i, t in enumerate(tensors)]
    if not convex:
        kappa = (x @ rows.T + bias).square() / (torch.cdist(x, rows).square() + epsilon)
        tensors[5] = 1 / kappa.max().clamp_min(1e-30).reshape(1) if tokens else torch.ones(1)
    laid = [t if t is None or t.ndim < 2 else strided(t, layout) for t in tensors]
    return [None if t is None else t.to(DEVICE).requires_grad_() for t in laid]


class Reference:
    """The mixture in float64, by its formula and autograd; ‖x − w‖² from differences."""

    def __init__(self, tensors, one_sided, convex, direction):
        given = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
        x, w, b, v, epsilon, factor, up, up_bias = given
        self.one_sided, self.convex, self.given = one_sided, convex, given
        self.score = x @ w.T + b
        if one_sided:
            self.score = self.score.relu()
        self.distance = (x[:, None] - w).square().sum(-1) + epsilon
        if convex:
            fires = self.score != 0
            log = (self.score.where(fires, torch.ones_like(self.score)).square() / self.distance).log()
            power = (log / factor - (log / factor).detach().where(fires, -torch.inf * log.detach().abs().clamp_min(1)).amax(
                1, keepdim=True).nan_to_num(neginf=0)).exp() * fires  # fmt: skip
            mass = power.sum(1, keepdim=True)
            self.value, self.log = power / mass.where(mass > 0, torch.ones_like(mass)), log.detach() * fires
        else:
            self.value = self.score.square() / self.distance * factor
        self.ups = torch.ones_like(self.value) if up is None else x @ up.T + up_bias
        self.coefficients = self.value * self.ups
        self.y = self.coefficients @ v.T
        found = torch.autograd.grad(self.y, [t for t in given if t is not None], direction.double(), allow_unused=True)
        self.gradients = dict(zip((n for n, t in zip(NAMES, given) if t is not None), found))


class Bound:
    """How far rounding may move the output and every gradient: ``m`` bounds the few roundings to the working dtype that a term goes
    through, ``gamma`` those of a sum in float32, ``least`` what float16 loses at its lower end."""

    def __init__(self, reference, direction, mix):
        x, w, b, v, _, factor, up, up_bias = (None if t is None else t.detach().abs() for t in reference.given)
        dy, gated = direction.double().abs(), up is not None
        m = 4 * torch.finfo(mix).eps
        gamma = (x.shape[1] + 16) * 2.0**-24
        total = 4 * (len(x) + len(w)) * 2.0**-24  # of sums over a batch
        least = 2.0**-24 if mix == torch.float16 else 1e-37
        cross, D, ups = x @ w.T, reference.distance.detach(), reference.ups.detach().abs()
        e_s = gamma * (cross + b)
        e_D = gamma * (x.square().sum(1, keepdim=True) + w.square().sum(1) + 2 * cross)
        e_u = gamma * (x @ up.T + up_bias) if gated else torch.zeros_like(D)
        s, change = reference.score.detach().abs() + e_s, dy @ v + least / m
        if reference.convex:
            e_t = ((2 * e_s / s + e_D / D) + 8 * 2.0**-24 * (1 + reference.log.abs())) / factor
            value = reference.value.detach() * e_t.exp()
            e_value = value * (e_t + (value * e_t).sum(1, keepdim=True)) * e_t.exp()
            own = change * ups
            both = own + (value * own).sum(1, keepdim=True)
            e_own = change * e_u + m * both
            e_mean = (e_value * own + value * e_own).sum(1, keepdim=True)
            q, e_q = value * both / factor, (e_value * both + value * (e_own + e_mean)) / factor
            direct, e_direct = q / s, e_q / s + q * e_s / s.square()
            far, e_far = q / D, e_q / D + q / D * e_D / D
            log = reference.log.abs()
            e_factor = (e_q * log + q * (2 * e_s / s + e_D / D)) / factor
        else:
            share = s / D
            e_share = e_s / D + share * e_D / D
            value, e_value = s * share * factor, (s * e_share + share * e_s) * factor
            direct = change * ups * factor * share
            e_direct = change * factor * (ups * e_share + share * e_u) + m * direct
            far, e_far = direct * share, e_direct * share + direct * e_share
            e_factor = (e_direct * s + direct * e_s) / factor
        e_c = e_value * ups + value * e_u + m * value * ups + least
        lengths = x.norm(dim=1)[:, None].clamp_min(1e-30) * w.norm(dim=1).clamp_min(1e-30)
        ds = 2 * (direct + far)
        e_ds = 2 * (e_direct + e_far) + m * ds + 4 * least / lengths
        du = change * value
        e_du = change * e_value + m * du
        if gated:
            e_du = e_du + 4 * least / (x.norm(dim=1)[:, None].clamp_min(1e-30) * up.norm(dim=1).clamp_min(1e-30))
        c = value * ups
        self.bounds = {
            "y": e_c @ v.T + m * (c @ v.T),
            "x": (e_ds + m * ds) @ w + 2 * x * (e_far + m * far).sum(1, keepdim=True),
            "rows": (e_ds + m * ds).T @ x + 2 * w * (e_far + m * far).sum(0)[:, None],
            "bias": 2 * (e_direct + m * direct).sum(0),
            "dictionary": dy.T @ (e_c + m * c),
            "epsilon": (e_far + total * far).sum().reshape(1),
            "factor": (e_factor + total * (q * log if reference.convex else direct * s) / factor).sum().reshape(1),
        }
        if gated:
            self.bounds["x"] += (e_du + m * du) @ up
            self.bounds |= {"up": (e_du + m * du).T @ x, "up_bias": (e_du + m * du).sum(0)}


def compare(tensors, one_sided, convex, mix, limit=WHOLE):
    """Output and gradients within their bounds, wherever float64's are finite in the working dtype; how many of them were."""
    written = fused_mixture(*tensors, one_sided, mix, limit, convex)
    direction = torch.randn(written.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, mix)
    reference = Reference(tensors, one_sided, convex, direction)
    assert written.shape == reference.y.shape and written.dtype == mix
    bounds, compared = Bound(reference, direction, mix).bounds, 0
    given = [t for t in tensors if t is not None]
    found = dict(zip(reference.gradients, torch.autograd.grad(written, given, direction)), y=written.detach())
    for name, expected in {**reference.gradients, "y": reference.y.detach()}.items():
        if expected is None:
            continue
        largest = expected.abs().max().item() if expected.numel() else 0.0
        if not largest < 0.5 * torch.finfo(found[name].dtype).max:
            continue
        rounding = torch.finfo(found[name].dtype)
        room = bounds[name] + rounding.eps * expected.abs() + rounding.tiny
        off = (found[name].double() - expected).abs() / room
        assert torch.isfinite(found[name]).all(), name
        assert (off <= 1).all(), f"{name} is off by {off.max():.3g} of its bound, largest {largest:.3g}"
        compared += 1
    return compared


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(fused, "TOKENS", 32)
    monkeypatch.setattr(fused, "PROTOTYPES", 16)


@settings(max_examples=100, phases=[Phase.generate])
@given(
    tokens=st.integers(1, 70), size=st.integers(3, 100), prototypes=st.integers(1, 130), one_sided=st.booleans(),
    convex=st.booleans(), gated=st.booleans(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(["", "transposed", "sliced"]),
    log_norm=st.floats(-4, 4), log_row=st.floats(-2, 1), tau=st.floats(0.05, 1.5), seed=st.integers(0, 2**31),
    tiles=st.sampled_from([(128, 128), (32, 16)]), limit=st.sampled_from([WHOLE, 20_000, 1]),
)  # fmt: skip
def test_any_shape_layout_dtype_and_norm(
    tokens, size, prototypes, one_sided, convex, gated, dtype, layout, log_norm, log_row, tau, seed, tiles, limit
):
    before = fused.TOKENS, fused.PROTOTYPES
    if limit == 1:
        tokens = min(tokens, 5)  # one at a time
    try:
        fused.TOKENS, fused.PROTOTYPES = tiles
        tensors = case(
            tokens, size, prototypes, convex, gated, dtype, 10**log_norm, 10**log_row, tau, seed, layout
        )
        assert compare(tensors, one_sided, convex, dtype, limit) >= 1
    finally:
        fused.TOKENS, fused.PROTOTYPES = before
