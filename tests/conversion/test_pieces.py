"""Pieces: what pursuit and refinement find, and that planes see what free rows would."""

import pytest
import torch
from teachers import RECIPES
from torch import nn

from hf_kernel_ffn import InputError, KernelFFNConfig
from hf_kernel_ffn.checkpoint_code.kernels import get_kernel
from hf_kernel_ffn.conversion.pieces.fitting import fit_pieces
from hf_kernel_ffn.conversion.pieces.planes import (
    Pieces,
    compute_kernels,
    compute_scores,
    see_planes,
    typical_size,
    weigh_tokens,
)
from hf_kernel_ffn.conversion.pieces.pursuit import pursue
from hf_kernel_ffn.families.weights import FFNWeights
from hf_kernel_ffn.storage.kernel_files import import_kernel

TOKENS, SIZE, UNITS = 400, 16, 24


def make_weights(gated=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    gate = draw(UNITS, SIZE) / 4 if gated else None
    gate_bias = draw(UNITS) / 10 if gated else None
    return FFNWeights(
        up=draw(UNITS, SIZE) / 4,
        up_bias=draw(UNITS) / 10,
        gate=gate,
        gate_bias=gate_bias,
        down=draw(UNITS, SIZE),
        down_bias=None,
        activation=nn.SiLU() if gated else nn.GELU(),
    )


def make_inputs(seed=1):
    return torch.randn(TOKENS, SIZE, generator=torch.Generator().manual_seed(seed))


def settings(values, pieces=8, kernel="brownian"):
    return KernelFFNConfig(kernel=kernel, values=values, rows="tied", pieces=pieces)


def sum_pieces(weights, config, fitted, inputs):
    """What the pieces make of every unit, (tokens, units)."""
    planes = see_planes(weights, inputs)
    parameters = {name: torch.tensor(value) for name, value in fitted.parameters.items()}
    kernels = compute_kernels(get_kernel(config.kernel), planes, fitted.pieces, parameters)
    found = (kernels * fitted.scale * fitted.pieces.amount.T[..., None]).sum(1)
    return (found * planes.second if config.values == "product" else found).T


def unexplained(weights, config, fitted, inputs):
    """The share of the units' variance that the pieces leave."""
    wanted = weights.coefficients(inputs)
    error = (sum_pieces(weights, config, fitted, inputs) - wanted).square().sum()
    return (error / (wanted - wanted.mean(0)).square().sum()).item()


@pytest.mark.parametrize("gated", [True, False])
def test_planes_see_what_free_rows_would(gated):
    weights, inputs = make_weights(gated), make_inputs()
    generator = torch.Generator().manual_seed(2)
    alpha, beta, shift = (torch.randn(3, UNITS, generator=generator) for _ in range(3))
    pieces = Pieces(alpha, beta if gated else None, shift, torch.zeros_like(alpha))
    kernel = get_kernel("half-yat")
    score, distance2 = compute_scores(kernel, see_planes(weights, inputs), pieces)

    first, first_bias = (
        (weights.gate, weights.gate_bias) if gated else (weights.up, weights.up_bias)
    )
    rows = alpha[..., None] * first
    bias = shift + alpha * first_bias
    if gated:
        rows = rows + beta[..., None] * weights.up
        bias = bias + beta * weights.up_bias
    expected = torch.einsum("nd,pmd->mpn", inputs, rows) + bias.T[..., None]
    torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-4)
    apart = (inputs - rows[..., None, :]).square().sum(-1).transpose(0, 1)
    torch.testing.assert_close(distance2, apart, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("values, gated", [("product", True), ("fixed", True), ("fixed", False)])
def test_more_pieces_leave_less(values, gated):
    weights, inputs = make_weights(gated), make_inputs()
    kernel = "half-yat" if values == "fixed" and gated else "brownian"
    left = []
    for pieces in (1, 3, 8):
        config = settings(values, pieces, kernel)
        left.append(unexplained(weights, config, fit_pieces(weights, config, inputs), inputs))
    assert left[0] > left[1] > left[2]
    assert left[2] < (0.02 if kernel == "half-yat" else 0.003)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["line-gaussian", "line-imq", "line-hat"])
def test_local_kernels_stand_in_for_a_unit(name, gated, registry):
    weights, inputs = make_weights(gated), make_inputs()
    kernel = import_kernel(f"{RECIPES / 'examples' / 'kernels' / 'local.py'}:{name}")
    config = settings("product" if gated else "fixed", kernel=kernel)
    fitted = fit_pieces(weights, config, inputs)
    assert unexplained(weights, config, fitted, inputs) < 0.005

    far = 1e4 * inputs
    written = sum_pieces(weights, config, fitted, far).abs().mean()
    constant = settings(config.values)  # brownian stays at its largest beyond the knots
    beside = sum_pieces(weights, constant, fit_pieces(weights, constant, inputs), far).abs().mean()
    assert written < beside / 100


@pytest.mark.parametrize("values, gated", [("product", True), ("fixed", True), ("fixed", False)])
def test_pieces_hold_on_inputs_not_seen(values, gated):
    weights = make_weights(gated)
    kernel = "half-yat" if values == "fixed" and gated else "brownian"
    config = settings(values, 8, kernel)
    fitted = fit_pieces(weights, config, make_inputs())
    assert unexplained(weights, config, fitted, make_inputs(seed=9)) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_pieces_in_a_plane_hold_where_a_narrow_sample_never_was(seed):
    weights = make_weights(seed=seed)
    config = settings("fixed", kernel="half-yat")
    noise = make_inputs()
    narrow, wide = (
        nn.functional.normalize(inputs, dim=-1) * SIZE**0.5
        for inputs in (noise[0] + 0.2 * noise, noise)
    )
    fitted = fit_pieces(weights, config, narrow)
    assert unexplained(weights, config, fitted, narrow) < 0.002
    assert unexplained(weights, config, fitted, wide) < 0.2  # from the sample alone: about 1


def test_a_spike_is_neither_all_that_is_seen_nor_lost():
    weights, ordinary = make_weights(), make_inputs()
    spike = ordinary[0] * 6  # its output is thirty times as long, and it begins every row
    inputs = ordinary.clone()
    inputs[::50] = spike + torch.randn(8, SIZE, generator=torch.Generator().manual_seed(5)) / 10
    config = settings("product")

    def errors(sample):
        fitted = fit_pieces(weights, config, sample)
        wanted = weights.coefficients(spike[None])
        off = (sum_pieces(weights, config, fitted, spike[None]) - wanted).norm() / wanted.norm()
        return unexplained(weights, config, fitted, ordinary), off.item()

    ordinary_error, spike_error = errors(inputs)
    assert ordinary_error < 0.0005 and spike_error < 0.05
    assert errors(ordinary)[1] > 2 * spike_error  # spikes left out


def test_columns_that_make_the_target_are_found():
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(2, 10, 50, generator=generator)
    columns = columns / columns.norm(dim=-1, keepdim=True)
    chosen = torch.tensor([[1, 4, 7], [0, 3, 9]])
    amounts = torch.tensor([[2.0, -1.0, 0.5], [1.0, 1.0, -3.0]])
    target = (columns[torch.arange(2)[:, None], chosen] * amounts[..., None]).sum(1)
    gram = columns @ columns.transpose(1, 2)
    cross = (columns @ target[..., None])[..., 0]
    index, found = pursue(gram, cross, 3)
    for unit in range(2):
        order = index[unit].argsort()
        assert index[unit][order].tolist() == chosen[unit].tolist()
        torch.testing.assert_close(found[unit][order], amounts[unit], atol=1e-3, rtol=1e-3)


def test_weights_of_tokens_have_mean_one_and_bound_a_spike():
    outputs = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    outputs[3] *= 1000
    weights = weigh_tokens(outputs)
    assert weights.mean().item() == pytest.approx(1)
    squares = weights * outputs.square().mean(-1)
    assert squares[3] < 100 * squares.median()  # a million without weights


def test_a_typical_size_is_of_ordinary_values():
    values = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    values[:, 0] = 1e4
    assert ((typical_size(values) > 0.8) & (typical_size(values) < 1.2)).all()


@pytest.mark.parametrize("kernel", ["gaussian", "imq"])
def test_kernels_of_distance_alone_are_refused(kernel):
    with pytest.raises(InputError, match="expected one that reads the score"):
        fit_pieces(make_weights(), settings("product", kernel=kernel), make_inputs())
