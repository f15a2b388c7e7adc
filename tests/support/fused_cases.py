"""The fused readout against float64, run by test_fused.py: on a GPU where there is one, otherwise
by Triton's interpreter.

Every tolerance is a first-order bound on what rounding does, worked out in float64 for the case at
hand (``Bound``): scores and distances are summed in float32, and coefficients and gradients of
scores are rounded once to the working dtype.
"""

import math
from types import SimpleNamespace

import ffn_timing as benchmark
import pytest
import torch
import triton
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from layers import inputs, make_layer
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from hf_kernel_ffn import InputError
from hf_kernel_ffn.checkpoint_code import operators
from hf_kernel_ffn.checkpoint_code.plan import Form, choose_form
from hf_kernel_ffn.gpu import dense_backward, dense_mixture, fused, optional_triton, trial
from hf_kernel_ffn.gpu.dense_mixture import fused_mixture
from hf_kernel_ffn.gpu.fused import FEW, Fused, fuse
from hf_kernel_ffn.gpu.sparse_mixture import active, gather

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if CUDA:  # one shape, not six, is compiled for every size that a property draws
    for kernel in (dense_mixture.forward_tuned, dense_backward.backward_tuned):
        kernel.configs = kernel.configs[-1:]
else:
    assert optional_triton.INTERPRETED
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        """The interpreter keeps bfloat16 as bits, and would multiply those as integers (triton
        3.6)."""
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
DEVIATIONS = 6
"""Standard deviations that no entry of any comparison may be off by."""
variants = pytest.mark.parametrize("convex", [False, True], ids=["conic", "convex"])
gating = pytest.mark.parametrize("gated", [False, True], ids=["fixed", "gated"])


def strided(tensor, how):
    """The same numbers, laid out otherwise."""
    if how == "transposed":
        return tensor.T.contiguous().T
    if how == "sliced":
        return torch.stack([tensor, torch.full_like(tensor, math.nan)], -1).flatten(-2)[..., ::2]
    return tensor


def case(
    tokens,
    size,
    prototypes,
    convex,
    gated,
    dtype=torch.float32,
    norm=4.0,
    row=1.0,
    tau=0.8,
    seed=0,
    layout="",
):
    """The eight tensors of a mixture, on the device, loud enough to matter: rows of length ``norm``
    and ``row``, ε a hundredth of the mean squared distance, as a conversion sets it."""
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape):
        matrix = torch.randn(*shape, generator=generator)
        return matrix / matrix.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    x, rows, bias = (
        norm * unit(tokens, size),
        row * unit(prototypes, size),
        0.1 * norm * row * unit(1, prototypes)[0],
    )
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
            log = (
                self.score.where(fires, torch.ones_like(self.score)).square() / self.distance
            ).log()
            power = (
                log / factor
                - (log / factor)
                .detach()
                .where(fires, -torch.inf * log.detach().abs().clamp_min(1))
                .amax(1, keepdim=True)
                .nan_to_num(neginf=0)
            ).exp() * fires
            mass = power.sum(1, keepdim=True)
            self.value, self.log = (
                power / mass.where(mass > 0, torch.ones_like(mass)),
                log.detach() * fires,
            )
        else:
            self.value = self.score.square() / self.distance * factor
        self.ups = torch.ones_like(self.value) if up is None else x @ up.T + up_bias
        self.coefficients = self.value * self.ups
        self.y = self.coefficients @ v.T
        found = torch.autograd.grad(
            self.y, [t for t in given if t is not None], direction.double(), allow_unused=True
        )
        self.gradients = dict(zip((n for n, t in zip(NAMES, given) if t is not None), found))


class Bound:
    """How far rounding moves the output and every gradient, as standard deviations: each number
    that is rounded errs by about its unit roundoff, independently of the others, so errors of a sum
    add up as squares (Higham and Mary 2019, doi:10.1137/18M1226312). Scores and distances are
    summed in float32 (``u``); coefficients, their gradients and those of scores are rounded to the
    working dtype (``m``, and ``least`` at its lower end). What is common to a row is added up as it
    is."""

    def __init__(self, reference, direction, mix):
        x, w, b, v, _, factor, up, up_bias = (
            None if t is None else t.detach().abs() for t in reference.given
        )
        dy, y, gated = direction.double().abs(), reference.y.detach().abs(), up is not None
        u, m, half = 2.0**-23, torch.finfo(mix).eps, mix == torch.float16
        least = 2.0**-24 if half else 2.0**-126
        cross, D, ups = sums(x, w.T), reference.distance.detach(), reference.ups.detach().abs()
        terms = x.shape[1] ** 0.5
        s = reference.score.detach().abs()
        e_s = u * (terms * cross + s + b)
        e_D = u * (2 * terms * cross + 4 * (x.square().sum(1, keepdim=True) + w.square().sum(1)))
        e_u = u * (terms * sums(x, up.T) + ups + up_bias) if gated else 0 * D
        s = s + e_s
        change, e_change = (
            (direction.double() @ reference.given[3].detach()).abs(),
            m * sums(dy, v) + least,
        )
        own, e_own = change * ups, e_change * ups + change * e_u
        if reference.convex:
            log = reference.log.abs()
            e_t = (2 * e_s / s + e_D / D + 4 * u * (1 + log)) / factor
            value = reference.value.detach() * e_t.exp()
            e_value = value * (e_t + (value * e_t).sum(1, keepdim=True))
            e_c = e_value * ups + value * e_u + m * value * ups + least
            mean = (direction.double() * reference.y.detach()).sum(1, keepdim=True)
            e_mean = (
                m * (dy * y).square().sum(1, keepdim=True).sqrt()
                + sums(e_c[:, None], change[:, :, None])[:, 0]
            ) / factor
            both = (
                direction.double() @ reference.given[3].detach() * reference.ups.detach() - mean
            ).abs()
            q, e_q = value * both / factor, (e_value * both + value * e_own) / factor
            direct, e_direct = q / s, e_q / s + q * e_s / s.square()
            far, e_far = q / D, e_q / D + q / D * e_D / D
            each, e_each = q * log / factor, (e_q * log + q * e_t * factor) / factor
            common = value * e_mean
            common_direct, common_far, common_each = common / s, common / D, common * log / factor
        else:
            share, e_share = s / D, e_s / D + s / D * e_D / D
            value, e_value = s * share * factor, (s * e_share + share * e_s) * factor
            e_c = e_value * ups + value * e_u + m * value * ups + least
            direct, e_direct = own * factor * share, (e_own * share + own * e_share) * factor
            far, e_far = direct * share, e_direct * share + direct * e_share
            each, e_each = direct * s / factor, (e_direct * s + direct * e_s) / factor
            common_direct = common_far = common_each = 0 * D
        lengths = (
            x.norm(dim=1)[:, None].clamp_min(1e-30) if half else 1
        )  # float16 holds gradients times them
        e_ds = (
            2 * (e_direct + e_far)
            + 2 * m * (direct + far)
            + least / (lengths * w.norm(dim=1).clamp_min(1e-30) if half else 1)
        )
        common_ds, e_du = (
            2 * (common_direct + common_far),
            change * e_value + value * e_change + m * change * value,
        )
        self.deviations = {
            "y": sums(e_c, v.T) + m * y,
            "x": sums(e_ds, w)
            + common_ds @ w
            + 2 * x * (norm(e_far, 1)[:, None] + common_far.sum(1, keepdim=True)),
            "rows": sums(e_ds.T, x)
            + norm(common_ds[:, :, None] * x[:, None], 0)
            + 2 * w * (norm(e_far, 0) + norm(common_far, 0))[:, None],
            "bias": 2 * (norm(e_direct, 0) + norm(common_direct, 0)),
            "dictionary": sums(dy.T, e_c),
            "epsilon": norm(e_far, (0, 1)).reshape(1)
            + norm(common_far.sum(1), 0)
            + u * norm(far, (0, 1)),
            "factor": norm(e_each, (0, 1)).reshape(1)
            + norm(common_each.sum(1), 0)
            + u * norm(each, (0, 1)),
        }
        if gated:
            e_du = e_du + least / (lengths * up.norm(dim=1).clamp_min(1e-30) if half else 1)
            self.deviations["x"] += sums(e_du, up)
            self.deviations |= {"up": sums(e_du.T, x), "up_bias": norm(e_du, 0)}


def sums(left, right):
    """Deviations of sums of products from those of the products."""
    return (left.square() @ right.square()).sqrt()


def norm(errors, dims):
    return errors.square().sum(dims).sqrt()


def compare(tensors, one_sided, convex, mix, limit=WHOLE):
    """Output and gradients within their bounds, wherever float64's are finite in the working dtype;
    how many of them were."""
    written = fused_mixture(*tensors, one_sided, mix, limit, convex)
    direction = torch.randn(written.shape, generator=torch.Generator().manual_seed(1)).to(
        DEVICE, mix
    )
    reference = Reference(tensors, one_sided, convex, direction)
    assert written.shape == reference.y.shape and written.dtype == mix
    deviations, compared = Bound(reference, direction, mix).deviations, 0
    given = [t for t in tensors if t is not None]
    found = dict(
        zip(reference.gradients, torch.autograd.grad(written, given, direction)), y=written.detach()
    )
    for name, expected in {**reference.gradients, "y": reference.y.detach()}.items():
        if expected is None:
            continue
        largest = expected.abs().max().item() if expected.numel() else 0.0
        if not largest < 0.5 * torch.finfo(found[name].dtype).max:
            continue
        rounding = torch.finfo(found[name].dtype)
        room = DEVIATIONS * (deviations[name] + rounding.eps * expected.abs() + rounding.tiny)
        off = (found[name].double() - expected).abs() / room
        assert torch.isfinite(found[name]).all(), name
        assert (off <= 1).all(), (
            f"{name} is off by {off.max():.3g} of its bound, largest {largest:.3g}"
        )
        compared += 1
    return compared


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(dense_mixture, "TOKENS", 32)
    monkeypatch.setattr(dense_mixture, "PROTOTYPES", 16)


@settings(max_examples=40, phases=[Phase.generate])
@given(
    tokens=st.integers(1, 70),
    size=st.integers(3, 100),
    prototypes=st.integers(1, 130),
    one_sided=st.booleans(),
    convex=st.booleans(),
    gated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["", "transposed", "sliced"]),
    log_norm=st.floats(-4, 4),
    log_row=st.floats(-2, 1),
    tau=st.floats(0.05, 1.5),
    seed=st.integers(0, 2**31),
    tiles=st.sampled_from([(128, 128), (32, 16)]),
    limit=st.sampled_from([WHOLE, 20_000, 1]),
)
def test_any_shape_layout_dtype_and_norm(
    tokens,
    size,
    prototypes,
    one_sided,
    convex,
    gated,
    dtype,
    layout,
    log_norm,
    log_row,
    tau,
    seed,
    tiles,
    limit,
):
    before = dense_mixture.TOKENS, dense_mixture.PROTOTYPES
    if limit == 1:
        tokens = min(tokens, 5)  # one at a time
    try:
        dense_mixture.TOKENS, dense_mixture.PROTOTYPES = tiles
        tensors = case(
            tokens,
            size,
            prototypes,
            convex,
            gated,
            dtype,
            10**log_norm,
            10**log_row,
            tau,
            seed,
            layout,
        )
        assert compare(tensors, one_sided, convex, dtype, limit) >= 1
    finally:
        dense_mixture.TOKENS, dense_mixture.PROTOTYPES = before


@variants
@gating
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_and_chunks_of_any_number(convex, gated, dtype, small_tiles):
    """Several groups of tiles (more than 8 of tokens), and chunks that end within one."""
    for limit in (WHOLE, 30_000):
        tensors = case(300, 20, 40, convex, gated, dtype)
        assert (
            compare(tensors, True, convex, dtype, limit)
            == len([t for t in tensors if t is not None]) + 1
        )


@variants
@gating
def test_nothing_fires_nothing_is_given_and_nothing_is_asked(convex, gated):
    tensors = case(4, 10, 20, convex, gated)
    with torch.no_grad():
        tensors[0].zero_()
        tensors[2].zero_()
    written = fused_mixture(*tensors, True, torch.float32, WHOLE, convex)
    assert not written.any()
    assert not any(
        g.any() for g in torch.autograd.grad(written.sum(), [t for t in tensors if t is not None])
    )
    empty = case(0, 10, 20, convex, gated)
    written = fused_mixture(*empty, True, torch.float32, WHOLE, convex)
    assert written.shape == (0, 10)
    given = [t for t in empty if t is not None]
    found = torch.autograd.grad(written.sum(), given)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(found, given))
    frozen = case(4, 10, 20, convex, gated)
    for tensor in frozen[1:]:
        if tensor is not None:
            tensor.requires_grad_(False)
    fused_mixture(*frozen, True, torch.float32, WHOLE, convex).sum().backward()
    everything = case(4, 10, 20, convex, gated)
    fused_mixture(*everything, True, torch.float32, WHOLE, convex).sum().backward()
    torch.testing.assert_close(frozen[0].grad, everything[0].grad, rtol=0, atol=0)


@variants
def test_inputs_that_are_prototypes(convex):
    """There ‖x − w‖² is what rounding leaves of large numbers, so that only what ε outweighs is
    certain: ε is 1e-2 of ‖x‖² here, the noise 2e-6 of it, and quotients err by some 1e-4 of the
    largest."""
    tensors = case(8, 30, 40, convex, False, norm=100.0, row=100.0)
    with torch.no_grad():
        tensors[1][:8] = tensors[0]
    direction = torch.randn(8, 30, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    reference = Reference(tensors, False, convex, direction)
    written = fused_mixture(*tensors, False, torch.float32, WHOLE, convex)
    assert (written - reference.y).abs().max() <= 1e-3 * reference.y.abs().max()
    for found, expected in zip(
        torch.autograd.grad(written, tensors[:6], direction), reference.gradients.values()
    ):
        assert (
            torch.isfinite(found).all()
            and (found - expected).abs().max() <= 1e-3 * expected.abs().max()
        )


@variants
def test_a_bad_number_is_not_hidden(convex):
    tensors = case(5, 10, 20, convex, False)
    with torch.no_grad():
        tensors[0][2, 3] = math.nan
        written = fused_mixture(*tensors, True, torch.float32, WHOLE, convex)
    assert written[2].isnan().all() and torch.isfinite(written[[0, 1, 3, 4]]).all()


def test_no_temperature_over_or_underflows():
    """κ^(1/τ) spans 10^±4000 here; shares are as exact as log κ / τ is: 500 times float32's
    1e-7."""
    for norm, dtype in ((1e-4, torch.float32), (1e4, torch.float32), (1.0, torch.float16)):
        tensors = case(6, 10, 200, True, False, dtype, norm=norm, tau=0.002)
        written = fused_mixture(*tensors, False, dtype, WHOLE, True)
        reference = Reference(tensors, False, True, torch.ones_like(written))
        room = 500 * 30 * torch.finfo(torch.float32).eps + 4 * torch.finfo(dtype).eps
        assert (written - reference.y).abs().max() <= room * tensors[3].abs().max()


@variants
@gating
def test_twice_differentiable_by_the_plain_form(convex, gated):
    tensors = case(4, 5, 6, convex, gated)
    given = [t for t in tensors if t is not None]

    def second(function, *last):
        first = torch.autograd.grad(
            function(*tensors, True, torch.float32, *last).sin().sum(), given, create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    for found, expected in zip(
        second(fused_mixture, WHOLE, convex), second(operators.plain, WHOLE, convex)
    ):
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
        )


@variants
@gating
def test_no_matrix_of_scores_is_held_in_float32(convex, gated, monkeypatch):
    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
            return output

    def product(left, right):  # as CUDA has it
        return torch.ones(left.shape[0], right.shape[1], device=DEVICE)

    for module in (dense_mixture, dense_backward):
        monkeypatch.setattr(module, "multiply_in_float32", product)
    tensors = case(128, 8, 256, convex, gated, torch.bfloat16)
    with Watch() as watch:
        fused_mixture(*tensors, True, torch.bfloat16, WHOLE, convex).sum().backward()
    assert 0 < watch.largest < 128 * 256 / 4


@variants
@gating
def test_operators_are_registered_as_torch_expects(convex, gated):
    tensors = case(5, 6, 7, convex, gated)
    library.opcheck(dense_mixture._mixture, (*tensors, True, torch.float32, WHOLE, convex))


LAYERS = [
    dict(kernel=kernel, values=values, simplex="softmax", intensity=intensity)
    for kernel in ("yat", "half-yat")
    for values in ("fixed", "gated")
    for intensity in ("mass", "none", "gate")
]
layers = pytest.mark.parametrize("settings", LAYERS, ids=lambda s: "-".join(s.values()))


def gradients(ffn, x):
    """Output and gradients, by name."""
    x = x.clone().requires_grad_()
    names, parameters = zip(*ffn.named_parameters())
    y = ffn(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return dict(zip(("x", *names), torch.autograd.grad(y, (x, *parameters), direction)), y=y)


@layers
def test_a_layer_is_what_it_is_in_float64(settings):
    """float32, at sizes of which a few sums lose at most 100 of its roundings: of the largest
    entry, or, where all tokens and features are added up in one number, of what is added up."""
    ffn, x = (
        make_layer(torch.float32, 12, 20, **settings).to(DEVICE),
        inputs(24, 12).reshape(2, 12, 12).to(DEVICE),
    )
    ffn.fused = Fused(required=True)
    found = gradients(ffn, x.float())
    expected = gradients(
        make_layer(torch.float32, 12, 20, **settings).double().to(DEVICE), x.float().double()
    )
    for name, value in expected.items():
        off = (found[name].double() - value).abs().max()
        size = expected["y"].abs().sum() if value.numel() == 1 else value.abs().max()
        assert off <= 100 * torch.finfo(torch.float32).eps * size, f"{name}: {off} of {size}"


@layers
def test_half_precision_and_autocast_keep_to_the_plain_form(settings):
    """The same dtypes and, to a tenth of the largest entry as for the plain form itself, the same
    gradients. Those of a log-ratio are differences of sums, of which bfloat16 may leave nothing."""
    for own, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        ffn, x = make_layer(own, 12, 20, **settings).to(DEVICE), inputs(30, 12).to(DEVICE, own)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            ffn.fused = Fused(required=True)
            found = gradients(ffn, x)
            ffn.fused = None
            expected = gradients(ffn, x)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype, name
            room = 8 * torch.finfo(torch.bfloat16).eps if name == "y" else 0.1
            off = (found[name] - value).abs().max()
            assert "log_ratio" in name or off <= room * value.abs().max(), (
                f"{name}: {off / value.abs().max()}"
            )


@pytest.mark.parametrize("settings", [LAYERS[3], LAYERS[10]], ids=lambda s: "-".join(s.values()))
def test_compiled_in_one_graph_without_recompiling_for_new_lengths(settings):
    ffn = make_layer(torch.float32, size=8, count=32, **settings).to(DEVICE)
    ffn.fused = Fused(required=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ffn, fullgraph=True, backend=counter)
    for count, length in enumerate((5, 9, 12, 33, 7)):
        x = inputs(length, 8, seed=length).float().to(DEVICE)
        expected, found = gradients(ffn, x), gradients(compiled, x)
        for name, value in expected.items():  # the same operators
            torch.testing.assert_close(
                found[name.removeprefix("_orig_mod.")]
                if name in found
                else found[f"_orig_mod.{name}"],
                value,
            )
        if count == 1:
            settled = counter.frame_count  # the second length makes the first one a variable
    assert counter.frame_count == settled <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["", "transposed", "sliced"])
def test_gather_sums_in_float32_what_is_active(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    for tokens, prototypes, size, share in (
        (1, 500, 70, 0.1),
        (5, 130, 200, 0.5),
        (3, 40, 3, 1.0),
        (2, 9, 5, 0.0),
    ):
        coefficients = torch.randn(tokens, prototypes, generator=generator).to(DEVICE, dtype)
        coefficients *= (torch.rand(tokens, prototypes, generator=generator) < share).to(DEVICE)
        dictionary = strided(
            torch.randn(size, prototypes, generator=generator).to(DEVICE, dtype), layout
        )
        expected = coefficients.double() @ dictionary.double().T
        with torch.no_grad():
            dictionary[:, (coefficients == 0).all(0)] = math.nan  # never read
        indices, counts = active(coefficients)
        assert torch.equal(counts, (coefficients != 0).sum(1))
        found = gather(coefficients.gather(1, indices.clamp_min(0)), indices, counts, dictionary)
        assert found.dtype == dtype
        # One rounding of the result, and as many in float32 as are added up.
        of = coefficients.double().abs() @ dictionary.double().abs().nan_to_num().T
        room = (
            torch.finfo(dtype).eps * expected.abs()
            + prototypes * torch.finfo(torch.float32).eps * of
        )
        assert ((found - expected).abs() <= room).all()


def test_gather_skips_padding_and_what_does_not_exist():
    dictionary = torch.randn(6, 10, device=DEVICE)
    indices = torch.tensor([[3, -1, 10, 4], [9, 9, 0, 0]], device=DEVICE)
    coefficients = torch.tensor([[1.0, 5.0, 5.0, 2.0], [1.0, 1.0, 5.0, 5.0]], device=DEVICE)
    found = gather(coefficients, indices, torch.tensor([4, 2], device=DEVICE), dictionary)
    expected = torch.stack([dictionary[:, 3] + 2 * dictionary[:, 4], 2 * dictionary[:, 9]])
    torch.testing.assert_close(found, expected)
    assert gather(
        coefficients[:0], indices[:0], torch.tensor([], device=DEVICE), dictionary
    ).shape == (0, 6)
    library.opcheck(
        gather, (coefficients, indices, torch.tensor([4, 2], device=DEVICE), dictionary)
    )


@pytest.mark.parametrize("simplex", ["top-k", "threshold", "sparsemax", "entmax-1.5"])
@pytest.mark.parametrize("intensity", ["mass", "none"])
def test_few_tokens_of_a_sparse_layer(simplex, intensity):
    """float32 sums of a few numbers: 20 roundings of the largest."""
    ffn = (
        make_layer(
            torch.float32,
            12,
            64,
            kernel="half-yat",
            simplex=simplex,
            intensity=intensity,
            values="gated",
        )
        .eval()
        .to(DEVICE)
    )
    x = inputs(FEW, 12).float().to(DEVICE)
    with torch.no_grad():
        ffn.fused = None
        expected = ffn(torch.cat([x, x]))[:FEW]
        ffn.fused = Fused(required=True)
        for found, like in ((ffn(x[:, None])[:, 0], expected), (ffn(x[:1]), expected[:1])):
            assert (found - like).abs().max() <= 20 * torch.finfo(
                torch.float32
            ).eps * expected.abs().max()
        assert ffn.output_prototypes.weight.T.is_contiguous()
        compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), ffn(x))
    torch._dynamo.reset()


def test_where_it_cannot_run_it_steps_aside_or_says_why(monkeypatch):
    x = inputs(6, 4).float().to(DEVICE)

    def refused(message, x=x, dtype=torch.float32, change=lambda ffn: None, **settings):
        settings = dict(kernel="half-yat", simplex="softmax", intensity="mass") | settings
        ffn = make_layer(dtype, **settings).to(DEVICE)
        change(ffn)
        ffn.fused = Fused(required=True)
        with pytest.raises(InputError, match=message):
            ffn(x)
        ffn.fused = Fused()
        assert torch.isfinite(ffn(x)).all()

    refused(
        "found kernel 'gaussian', expected 'yat' or 'half-yat'.*: call it so, or fuse without required",
        kernel="gaussian",
    )
    refused("found intensity 'mass' at temperature 0.6, expected temperature 1", temperature=0.6)
    refused(
        "found simplex 'top-k' with 6 tokens, expected 'softmax', or up to 8 tokens without gradients",
        simplex="top-k",
    )
    refused(
        "found float64, expected one of float32, bfloat16 and float16", x.double(), torch.float64
    )
    refused(
        "found an adapter, .* hook",
        change=lambda f: f.input_prototypes.register_forward_hook(lambda *_: None),
    )
    monkeypatch.setattr(fused, "_runs", lambda *_: False)
    refused(f"found device {DEVICE}.*, expected a CUDA GPU of compute capability 8.0 or newer")
    monkeypatch.setattr(fused, "triton", None)
    refused("found no Triton, expected triton 3.6 or newer")


def test_left_alone_it_is_for_gpus():
    ffn, x = (
        make_layer(torch.float32, kernel="half-yat", simplex="softmax", intensity="mass").to(
            DEVICE
        ),
        inputs(6).float().to(DEVICE),
    )
    assert ffn.fused is None and choose_form(ffn, x).form is Form.ONE_PASS
    ffn.fused = Fused()
    assert (ffn.fused.reason_against_readout(ffn, x) is None) is CUDA
    assert "fused" not in ffn.state_dict() and "fused" not in ffn.config.to_dict()


def test_a_model_is_fused_as_a_whole():
    ffns = {"a": make_layer(torch.float32, kernel="half-yat", simplex="softmax", intensity="mass")}
    fuse(SimpleNamespace(kernel_ffns=lambda: ffns), required=True)
    assert ffns["a"].fused == Fused(required=True)


def small_model(dtype=torch.float32, **settings):
    """Two readouts of one kind, called as a converted model is asked for them."""
    ffns = {f"layers.{i}.mlp": make_layer(dtype, **settings).to(DEVICE) for i in range(2)}
    return SimpleNamespace(kernel_ffns=lambda: ffns), list(ffns.values())


def quick(monkeypatch, plain=1.0, fused=0.5):
    """A clock by which the kernels take ``fused`` seconds: how long the interpreter takes says
    nothing."""
    times = {"plain": {"median": plain}, "fused": {"median": fused}}
    monkeypatch.setattr(
        trial,
        "interleaved",
        lambda work, repeats, device: [once() for once in work.values()] and times,
    )


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("intensity", ["mass", "gate"])
def test_a_trial_lets_the_kernels_in_where_they_are_right_and_quick(
    monkeypatch, intensity, trained
):
    model, ffns = small_model(kernel="half-yat", simplex="softmax", intensity=intensity)
    for ffn in ffns:
        ffn.requires_grad_(trained)
    quick(monkeypatch)
    assert trial.fuse_where_it_pays(model, tokens=24) == {}
    assert all(
        ffn.fused == Fused() and all(p.grad is None for p in ffn.parameters()) for ffn in ffns
    )
    quick(monkeypatch, fused=1.5)
    refused = trial.fuse_where_it_pays(model, tokens=24)
    assert list(refused) == list(model.kernel_ffns()) and all(
        "slower than the plain form" in r for r in refused.values()
    )
    assert all(ffn.fused is None for ffn in ffns)


def test_a_trial_lets_the_gather_in(monkeypatch):
    model, ffns = small_model(kernel="half-yat", simplex="top-k", intensity="mass")
    quick(monkeypatch)
    assert trial.fuse_where_it_pays(model) == {} and ffns[0].fused == Fused()


@pytest.mark.parametrize("wrong", ["output", "gradient", "nan"])
def test_a_trial_finds_wrong_kernels(monkeypatch, wrong):
    model, ffns = small_model(kernel="yat", simplex="softmax", intensity="mass")
    right = fused.fused_readout

    class Fading(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 0.999

    class Broken(Fading):
        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.nan

    change = {"output": lambda y: y * 1.001, "gradient": Fading.apply, "nan": Broken.apply}[wrong]
    monkeypatch.setattr(fused, "fused_readout", lambda ffn, x: change(right(ffn, x)))
    quick(monkeypatch)
    assert "further from float64" in trial.fuse_where_it_pays(model, tokens=24)["layers.1.mlp"]
    assert ffns[1].fused is None


def test_a_trial_survives_kernels_that_do_not_compile(monkeypatch):
    model, ffns = small_model(kernel="yat", simplex="softmax", intensity="mass")

    def fail(*_):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(fused, "fused_readout", fail)
    assert (
        "RuntimeError: no such instruction"
        in trial.fuse_where_it_pays(model, tokens=24)["layers.0.mlp"]
    )
    x = torch.randn(1, 3, ffns[0].config.hidden_size, device=DEVICE)
    assert torch.isfinite(ffns[0](x)).all()


def test_what_cannot_be_fused_is_named_without_a_trial(monkeypatch):
    model, _ = small_model(kernel="gaussian", simplex="softmax", intensity="none")
    monkeypatch.setattr(trial, "interleaved", None)
    assert (
        "kernel 'gaussian', expected 'yat' or 'half-yat'"
        in trial.fuse_where_it_pays(model)["layers.0.mlp"]
    )


def test_the_benchmark_times_what_is_fused(monkeypatch):
    monkeypatch.setattr(benchmark.interleaved, "__defaults__", ("wall", 0.0))
    shapes = {"tiny": benchmark.Shape(32, 48)}
    found = benchmark.benchmark(
        shapes, tokens=4, repeats=1, active=4, modes=("fused",), device=DEVICE
    )
    names = {row["variant"] for row in found["rows"]}
    assert {"stock", "single", "single, convex", "gated", "yat single", "single, top-k 4"} <= names
    assert all(row["mode"] == "fused" and row["ratio"]["median"] > 0 for row in found["rows"])
