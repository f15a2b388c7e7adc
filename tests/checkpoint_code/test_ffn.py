"""KernelFFN: its forward, its gradients, its record, the laws of its regime, and its numerical
edges."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from layers import TOP_K, D, P, inputs, make_layer
from torch import nn

from hf_kernel_ffn import InputError, KernelFFN, register_kernel
from hf_kernel_ffn.checkpoint_code.kernels import Kernel
from hf_kernel_ffn.checkpoint_code.record import ReadableFFN

SIMPLEX, INTENSITY = (
    ("softmax", "sparsemax", "entmax-1.5", "top-k", "threshold"),
    ("none", "mass", "gate"),
)
COMBINATIONS = [
    {"kernel": kernel, "simplex": simplex, "intensity": intensity, "values": values}
    for kernel, simplex, intensity, values in itertools.product(
        ("exponential", "gaussian", "imq", "yat", "exponential-yat", "half-yat"),
        SIMPLEX,
        INTENSITY,
        ("fixed", "gated"),
    )
]
# Mass at τ ≠ 1, where coefficients are not the kernel itself.
COMBINATIONS += [
    {"kernel": "half-yat", "simplex": s, "intensity": "mass", "values": "fixed", "temperature": 0.6}
    for s in SIMPLEX
]
combination = pytest.mark.parametrize(
    "settings", COMBINATIONS, ids=lambda s: "-".join(map(str, s.values()))
)
regime = pytest.mark.parametrize(
    "settings", COMBINATIONS[-35:], ids=lambda s: "-".join(map(str, s.values()))
)  # half-yat


def silence(ffn):
    """No unit of a half-yat layer fires any more."""
    with torch.no_grad():
        ffn.input_prototypes.bias.fill_(-1e3)


@combination
def test_forward_is_the_formula(settings):
    ffn, x = make_layer(**settings), inputs()
    expected = [reference.layer(ffn, row) for row in x.numpy()]
    with torch.no_grad():
        np.testing.assert_allclose(
            ffn.coefficients(x), [c for c, _ in expected], rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(ffn(x), [y for _, y in expected], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ffn(x.reshape(2, 3, D)), ffn(x).reshape(2, 3, D))


@combination
def test_gradients_with_respect_to_input_and_every_parameter(settings):
    ffn = make_layer(**settings, size=3, count=4)
    names = [name for name, _ in ffn.named_parameters()]
    x = inputs(2, 3, seed=3).requires_grad_()

    def function(x, *parameters):
        return torch.func.functional_call(ffn, dict(zip(names, parameters)), (x,))

    parameters = [p.detach().requires_grad_() for p in ffn.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters), rtol=1e-4, atol=1e-6)
    if not (
        settings["kernel"] == "half-yat"
        or settings["simplex"] in ("sparsemax", "entmax-1.5", "top-k", "threshold")
    ):
        gradients = torch.autograd.grad(function(x, *parameters).square().sum(), parameters)
        assert all(g.abs().sum() > 0 for g in gradients)  # every parameter takes part


@combination
def test_record_sums_to_the_output_and_obeys_its_regime(settings):
    ffn, x = make_layer(**settings), inputs(60).reshape(2, 30, D)
    with torch.no_grad():
        record, y = ffn.readout(x), ffn(x)
    torch.testing.assert_close(record.output(), y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(record.coefficients, ffn.coefficients(x), rtol=1e-10, atol=1e-12)
    assert record.coefficients.shape == record.shares.shape == (2, 30, P)
    assert record.intensity.shape == (2, 30)
    assert record.names == ("0+", "1-", "2+", "3-", "4+")
    fires = record.shares.sum(-1)
    torch.testing.assert_close(fires, (fires > 0.5).double())
    assert (record.shares >= 0).all() and (record.intensity >= 0).all()
    mixture = record.intensity[..., None] * record.shares
    if settings["values"] == "gated":
        torch.testing.assert_close(record.coefficients, mixture * ffn.value_proj(x))
        assert ffn.config.settings.regime == "linear"
        assert (record.coefficients < 0).any()
    else:
        torch.testing.assert_close(record.coefficients, mixture)
        assert (record.coefficients >= 0).all()
        assert ffn.config.settings.regime == (
            "convex" if settings["intensity"] == "none" else "conic"
        )
    if settings["intensity"] == "none":
        torch.testing.assert_close(record.intensity, fires)
    if settings["simplex"] == "top-k":
        assert ((record.shares > 0).sum(-1) <= TOP_K).all()


@regime
def test_no_unit_fires(settings):
    ffn, x = make_layer(**settings), inputs().requires_grad_()
    silence(ffn)
    y = ffn(x)
    assert torch.equal(y, ffn.output_prototypes.bias.expand_as(y))
    record = ffn.readout(x)
    assert (record.shares == 0).all() and (record.coefficients == 0).all()
    y.square().sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, *ffn.parameters()) if t.grad is not None)
    assert ffn.output_prototypes.bias.grad.abs().sum() > 0


class Boxcar(Kernel):
    def value(self, score, distance2):
        return (distance2 <= 1).to(score.dtype)


@pytest.mark.parametrize("simplex", SIMPLEX)
def test_boxcar_layer_writes_the_mean_of_what_is_near_or_nothing(registry, simplex):
    register_kernel(Boxcar("boxcar", nonnegative=True, positive_definite=False, uses_distance=True))
    ffn = make_layer(kernel="boxcar", simplex=simplex, intensity="none")
    with torch.no_grad():
        ffn.input_prototypes.weight.copy_(
            torch.tensor([[1.0, 0, 0, 0], [0.9, 0, 0, 0], [9, 0, 0, 0], [8, 0, 0, 0], [7, 0, 0, 0]])
        )
        near = ffn(torch.tensor([[1.0, 0.1, 0, 0], [-50, 0, 0, 0]]).double())
    bias, dictionary = ffn.output_prototypes.bias, ffn.output_prototypes.weight.T
    torch.testing.assert_close(near, torch.stack([dictionary[:2].mean(0) + bias, bias]))


@regime
def test_constraints_survive_wild_steps(settings):
    ffn, x = make_layer(torch.float32, **settings), inputs().float()
    for learning_rate, sign in ((1e2, 1), (1e4, -1), (1e6, 1)):
        ffn.load_state_dict(make_layer(torch.float32, **settings).state_dict())
        optimiser = torch.optim.SGD(ffn.log_ratio.parameters(), lr=learning_rate)
        (sign * ffn(x).square().sum()).backward()
        optimiser.step()
        optimiser.zero_grad()
        for name in ffn.log_ratio:
            assert 0 < ffn.positive(name).item() < math.inf, name
        record = ffn.readout(x)
        assert (record.intensity >= 0).all() and (record.shares >= 0).all()
        assert torch.isfinite(ffn(x)).all()


@pytest.mark.parametrize("push", [-1e4, 1e4])
def test_positive_parameters_never_reach_zero_or_infinity(push):
    ffn = make_layer(torch.float32, kernel="yat", simplex="entmax-1.5", intensity="mass")
    nn.init.constant_(ffn.log_ratio["epsilon"], push)
    nn.init.constant_(ffn.log_ratio["temperature"], push)
    assert 0 < ffn.positive("epsilon").item() < math.inf
    assert 0 < ffn.positive("temperature").item() < math.inf
    x = torch.cat(
        [inputs().float(), ffn.input_prototypes.weight.detach()]
    )  # where ε keeps x = w from 1/0
    assert torch.isfinite(ffn(x)).all()


@pytest.mark.parametrize(
    "kernel", ["gaussian", "imq", "yat", "half-yat", "exponential", "exponential-yat"]
)
@pytest.mark.parametrize(
    "simplex, intensity", [("softmax", "mass"), ("entmax-1.5", "mass"), ("sparsemax", "none")]
)
def test_zero_input_and_zero_rows(kernel, simplex, intensity):
    ffn = make_layer(torch.float32, kernel=kernel, simplex=simplex, intensity=intensity)
    with torch.no_grad():
        ffn.input_prototypes.weight[0].zero_()
        x = torch.stack([torch.zeros(D), ffn.input_prototypes.weight[1]]).requires_grad_()
    y = ffn(x)
    np.testing.assert_allclose(
        y.detach(),
        [reference.layer(ffn, r)[1] for r in x.detach().double().numpy()],
        rtol=1e-4,
        atol=1e-5,
    )
    y.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, *ffn.parameters()))


@pytest.mark.parametrize("norm", [1e-6, 1e-3, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("kernel", ["imq", "yat", "half-yat"])
@pytest.mark.parametrize(
    "simplex, intensity", [("softmax", "mass"), ("softmax", "none"), ("entmax-1.5", "gate")]
)
def test_every_norm_on_prototypes_and_between_them(kernel, norm, simplex, intensity):
    """ε is relative to ‖x‖², as a conversion sets it; float32 then keeps three digits of the
    float64 answer."""
    ffn = make_layer(
        torch.float32, kernel=kernel, simplex=simplex, intensity=intensity, epsilon=0.02 * norm**2
    )
    with torch.no_grad():
        weight = ffn.input_prototypes.weight
        weight.mul_(norm / weight.norm(dim=-1, keepdim=True))
        if ffn.input_prototypes.bias is not None:
            ffn.input_prototypes.bias.zero_()
        if intensity == "gate":
            ffn.gate.weight.zero_()
        x = torch.cat([weight, inputs().float() * norm / 2])
        assert (ffn.scores(x)[1] >= 0).all()
        y = ffn(x).double().numpy()
    assert np.isfinite(y).all()
    expected = np.array([reference.layer(ffn, row)[1] for row in x.double().numpy()])
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings", COMBINATIONS[::2], ids=lambda s: "-".join(map(str, s.values()))
)
def test_half_precision_is_finite_and_keeps_its_dtype(dtype, settings):
    ffn = make_layer(dtype, **settings)
    x = torch.cat(
        [inputs().to(dtype), ffn.input_prototypes.weight.detach(), torch.zeros(1, D, dtype=dtype)]
    ).requires_grad_()
    y = ffn(x)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    y.float().sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, *ffn.parameters()))
    expected = np.array([reference.layer(ffn, row)[1] for row in x.detach().double().numpy()])
    assert np.abs(y.detach().double().numpy() - expected).max() <= 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    "dtype, autocast", [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]
)
def test_half_precision_distances_do_not_cancel(dtype, autocast):
    """Inputs near a prototype of norm 12: the distance is small against ‖x‖², and what a rounded
    x·w leaves of it is noise."""
    ffn = make_layer(dtype, kernel="gaussian", simplex="softmax", intensity="none", size=64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        weight = ffn.input_prototypes.weight
        weight.mul_(12 / weight.float().norm(dim=-1, keepdim=True).to(dtype))
        x = (weight.double() + 0.05 * inputs(P, 64)).to(dtype)
        found = ffn.scores(x)[1].double()
    exact = (x.double()[:, None] - weight.double()).square().sum(-1)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("norm", [1e-6, 1e-3, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kernel", ["exponential", "gaussian", "imq", "yat", "exponential-yat", "half-yat"]
)
def test_convex_readouts_are_finite_at_every_norm(kernel, dtype, norm):
    """A mixture of the dictionary is representable whatever the kernel is, x·w beyond float16
    included."""
    ffn = make_layer(
        dtype, kernel=kernel, simplex="softmax", intensity="none", epsilon=0.02 * norm**2
    )
    with torch.no_grad():
        weight = ffn.input_prototypes.weight
        weight.copy_(weight.float() * (norm / weight.float().norm(dim=-1, keepdim=True)))
        x = torch.cat([weight, (inputs().float() * norm / 2).to(dtype)])
        y = ffn(x)
        assert torch.isfinite(y).all()
        largest = (
            ffn.output_prototypes.weight.abs().amax() + ffn.output_prototypes.bias.abs().amax()
        )
        assert (y.abs() <= 1.01 * largest).all()


def test_temperature_limits():
    settings = {"kernel": "yat", "simplex": "softmax", "intensity": "none"}
    ffn, x = make_layer(**settings), inputs()
    with torch.no_grad():
        kernel = ffn.kernel.value(*ffn.scores(x), **ffn.kernel_parameters())
        ffn.set_reference("temperature", 1e-6)
        nearest = ffn.output_prototypes.weight.T[kernel.argmax(-1)] + ffn.output_prototypes.bias
        torch.testing.assert_close(ffn(x), nearest)
        ffn.set_reference("temperature", 1e9)
        centroid = ffn.output_prototypes.weight.mean(-1) + ffn.output_prototypes.bias
        torch.testing.assert_close(ffn(x), centroid.expand(6, D), rtol=1e-6, atol=1e-6)


class Block(nn.Module):
    def __init__(self, ffn):
        super().__init__()
        self.ffn = ffn

    def forward(self, x):
        return self.ffn(x)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str
)
def test_adapters_change_the_norms_too(options):
    """An adapted layer computes what it computes once the adapter is merged into the weights."""
    peft = pytest.importorskip("peft")
    block = Block(make_layer(kernel="half-yat", simplex="softmax", intensity="mass", size=8))
    x = inputs(6, 8)
    before = block(x).detach()
    config = peft.LoraConfig(
        r=2, target_modules=["input_prototypes", "output_prototypes"], **options
    )
    adapted = peft.get_peft_model(block, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
        y, record = adapted(x), adapted.base_model.model.ffn.readout(x)
        assert (y - before).abs().max() > 0.1
        torch.testing.assert_close(record.output(), y)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(x), before)
            torch.testing.assert_close(adapted.base_model.model.ffn.readout(x).output(), before)
        merged = adapted.merge_and_unload()
        assert type(merged.ffn.input_prototypes) is nn.Linear
        torch.testing.assert_close(merged(x), y)


def test_adapters_train_through_the_norms():
    peft = pytest.importorskip("peft")
    block = Block(make_layer(kernel="gaussian", simplex="softmax", intensity="mass"))
    adapted = peft.get_peft_model(
        block, peft.LoraConfig(r=2, target_modules=["input_prototypes"])
    ).eval()
    weights = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for parameter in weights.values():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    x = inputs()
    exact = torch.autograd.grad(adapted(x).square().sum(), list(weights.values()))
    for (name, parameter), gradient in zip(weights.items(), exact):
        direction = torch.ones_like(parameter)
        steps = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(step * direction)
                steps.append(adapted(x).square().sum())
                parameter.sub_(step * direction)
        assert ((steps[0] - steps[1]) / 2e-5).item() == pytest.approx(
            (gradient * direction).sum().item(), rel=1e-5
        ), name


def test_frozen_norms_would_be_stale():
    """The same input after a step on the rows sees the new rows' norms."""
    ffn, x = make_layer(kernel="gaussian", simplex="softmax", intensity="mass"), inputs()
    ffn(x)
    with torch.no_grad():
        ffn.input_prototypes.weight.mul_(3)
    np.testing.assert_allclose(
        ffn(x).detach(), [reference.layer(ffn, row)[1] for row in x.numpy()], rtol=1e-9
    )


def test_top_k_keeps_the_nearest_where_the_kernel_underflows():
    ffn = make_layer(torch.float32, kernel="gaussian", simplex="top-k", intensity="none")
    x = 200 * inputs().float()  # κ = e^−20000 and less
    with torch.no_grad():
        _, distance2 = ffn.scores(x)
        kept = ffn.readout(x).shares.argmax(-1)
    assert torch.equal(kept, distance2.argmin(-1))


@pytest.mark.parametrize("kernel, scale", [("gaussian", 200.0), ("exponential", 200.0)])
def test_thresholds_are_fitted_where_the_kernel_under_or_overflows(kernel, scale):
    ffn = make_layer(torch.float32, kernel=kernel, simplex="threshold", intensity="none")
    x = scale * inputs(40).float()
    with torch.no_grad():
        ffn.fit_threshold(x)
        assert torch.isfinite(ffn.log_threshold()).all()
        kept = (ffn.readout(x).shares > 0).sum().item()
    assert 1 <= kept <= TOP_K * len(x)
    assert (
        ffn.kernel.log(*ffn.scores(x), **ffn.kernel_parameters()) >= ffn.log_threshold()
    ).sum() == TOP_K * len(x)


@pytest.mark.parametrize("values", ["fixed", "gated"])
@pytest.mark.parametrize("intensity", ["mass", "gate", "none"])
def test_a_layer_made_from_prototypes_is_that_layer(values, intensity):
    simplex = "threshold" if intensity == "gate" else "softmax"
    ffn = make_layer(
        torch.float32, kernel="half-yat", simplex=simplex, intensity=intensity, values=values
    )
    with torch.no_grad():
        for log_ratio in ffn.log_ratio.values():
            log_ratio.zero_()
        if simplex == "threshold":
            ffn.threshold_log_ratio.zero_()
        if intensity == "gate":
            ffn.gate.weight.zero_()
            ffn.gate.bias.fill_(0.5)
    up = {}
    if values == "gated":
        up = {"up_rows": ffn.value_proj.weight, "up_bias": ffn.value_proj.bias}
    made = KernelFFN.from_prototypes(
        ffn.config,
        rows=ffn.input_prototypes.weight.detach().clone(),
        bias=ffn.input_prototypes.bias,
        dictionary=ffn.output_prototypes.weight.T,
        output_bias=ffn.output_prototypes.bias,
        units=ffn.units,
        gate_bias=0.5,
        **up,
    )
    assert type(made) is KernelFFN and not made.training
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in made.parameters())
    for name, tensor in ffn.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor), name


def test_prototypes_of_another_shape_are_refused():
    ffn = make_layer(kernel="yat", simplex="softmax", intensity="mass", values="gated")
    rows = ffn.input_prototypes.weight
    start = {"rows": rows, "dictionary": rows, "units": ffn.units}
    with pytest.raises(InputError, match=r"up_rows of shape \(0, 4\), expected \(5, 4\)"):
        KernelFFN.from_prototypes(ffn.config, **start)
    with pytest.raises(InputError, match=r"dictionary of shape \(4, 5\), expected \(5, 4\)"):
        KernelFFN.from_prototypes(ffn.config, **{**start, "dictionary": rows.T}, up_rows=rows)


def test_reference_values_and_top_k_stand_in_the_config_alone():
    ffn = make_layer(kernel="yat", simplex="top-k", intensity="none")
    other = KernelFFN(ffn.config)
    ffn.set_reference("temperature", 0.25)
    ffn.set_top_k(2)
    assert ffn.config.to_dict()["reference"]["temperature"] == 0.25
    assert ffn.config.settings.top_k == 2
    assert ((ffn.coefficients(inputs()) != 0).sum(-1) == 2).all()
    assert other.config.reference["temperature"] == 0.8 and other.config.settings.top_k == TOP_K
    with pytest.raises(InputError, match="top_k=0"):
        ffn.set_top_k(0)


def test_a_kernel_readout_is_readable_and_a_stock_ffn_is_not():
    ffn = make_layer(kernel="yat", simplex="softmax", intensity="none")
    assert isinstance(ffn, ReadableFFN)
    assert not isinstance(nn.Linear(2, 2), ReadableFFN)
