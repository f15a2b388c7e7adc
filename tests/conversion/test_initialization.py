"""What a conversion starts from: the pieces that stand in for a unit, signs and lengths."""

from collections import Counter

import pytest
import torch
from teachers import RECIPES

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.checkpoint_code.kernels import get_kernel
from hf_kernel_ffn.checkpoint_code.settings import INITIALISERS as SETTINGS_NAMES
from hf_kernel_ffn.checkpoint_code.settings import resolve_defaults
from hf_kernel_ffn.conversion.initialization import initialise_prototypes
from hf_kernel_ffn.conversion.initialization.prototypes import INITIALISERS
from hf_kernel_ffn.conversion.sampling import read_ffn_inputs
from hf_kernel_ffn.families.lookup import find_ffn_paths
from hf_kernel_ffn.families.registry import get_architecture_of_model
from hf_kernel_ffn.families.weights import read_ffn_weights
from hf_kernel_ffn.storage.kernel_files import import_kernel


@pytest.fixture
def layer(request, ids):
    """Weights of the middle FFN of a teacher by its fixture's name, and the inputs it gets."""

    def get(family):
        teacher = request.getfixturevalue(family)
        architecture = get_architecture_of_model(teacher)
        path = find_ffn_paths(teacher, architecture)[1]
        weights = read_ffn_weights(
            teacher.base_model.get_submodule(path), architecture, teacher.config, path
        )
        return weights, torch.cat(list(read_ffn_inputs(teacher, path, ids)))

    return get


def start(weights, inputs, **settings):
    """Starting prototypes, and their kernel at the inputs."""
    settings = resolve_defaults(KernelFFNConfig(**settings), weights.gate is not None)
    found, kernel = initialise_prototypes(weights, settings, inputs), get_kernel(settings.kernel)
    parameters = {name: torch.tensor(value) for name, value in found.parameters.items()}
    return found, kernel.value(
        inputs @ found.rows.T + found.bias, torch.cdist(inputs, found.rows) ** 2, **parameters
    )


def unexplained(weights, inputs, **settings):
    """(units,) share of what a unit writes along its own column that its prototypes miss.

    The mean write is free if the values are fixed.
    """
    found, kernel = start(weights, inputs, **settings)
    unit = found.units.abs().long() - 1
    column = weights.down[unit]
    amount = found.scale * (found.dictionary * column).sum(-1) / column.square().sum(-1)
    if settings.get("values") == "gated":
        kernel = kernel * weights.pre_activations(inputs)[0][:, unit]
    target = weights.coefficients(inputs)
    error = target - torch.zeros_like(target).index_add(1, unit, kernel * amount)
    if settings.get("values") == "gated":
        return error.square().mean(0) / target.square().mean(0)
    return error.var(0) / target.var(0)


@pytest.fixture
def relu2(registry):
    """A kernel without distance: longer rows and shorter columns are then the same function."""
    return import_kernel(f"{RECIPES / 'examples' / 'kernels' / 'controls.py'}:relu2")


@pytest.mark.parametrize("family, first", [("llama", 2), ("gpt2", 1)])
@pytest.mark.parametrize("kernel, init", [("relu2", None), ("half-yat", "data-scale")])
def test_more_pieces_never_fit_a_unit_worse(layer, relu2, family, first, kernel, init):
    errors = [
        unexplained(*layer(family), kernel=kernel, init=init, expansion=first * n)
        for n in (1, 2, 3, 4)
    ]
    for fewer, more in zip(errors, errors[1:]):
        assert (more <= fewer + 1e-3).all()  # the fit is damped a little
    assert errors[0].mean() < 0.5 and errors[1].mean() < 0.7 * errors[0].mean()


def test_more_pieces_never_fit_a_gated_unit_worse(layer, relu2):
    errors = [
        unexplained(*layer("llama"), kernel="relu2", values="gated", expansion=n) for n in (1, 2, 3)
    ]
    for fewer, more in zip(errors, errors[1:]):
        assert (more <= fewer + 1e-3).all()
    assert errors[0].mean() < 0.5 and errors[1].mean() < 0.85 * errors[0].mean()


def test_only_a_piece_beside_another_may_fire_late(layer):
    weights, inputs = layer(
        "llama"
    )  # without biases of its own: those of the prototypes are the shifts
    alone, _ = start(weights, inputs, init="single", expansion=1)
    several, _ = start(weights, inputs, init="single", expansion=4)
    assert (alone.bias >= 0).all()
    assert (several.bias[:48] >= 0).all() and (several.bias[48:] < 0).any()


@pytest.mark.parametrize("family, few, more", [("llama", 2, 4), ("mistral", 2, 4), ("gpt2", 1, 2)])
def test_twice_the_prototypes_are_a_closer_conversion(request, family, few, more):
    teacher, many = (
        request.getfixturevalue(family),
        torch.randint(3, 300, (64, 32), generator=torch.Generator().manual_seed(1)),
    )
    reports = [
        convert(teacher, KernelFFNConfig(expansion=n), calibration_ids=many)[1] for n in (few, more)
    ]
    for one, other in zip(*(report.layers.values() for report in reports)):
        assert other["prototypes"] == more * 48 == one["prototypes"] * more // few
        assert other["fvu"] < one["fvu"]


def test_two_pairs_per_unit_have_both_signs_twice(llama, ids):
    student, _ = convert(
        llama, KernelFFNConfig(expansion=4), "1", calibration_ids=ids, calibration_tokens=256
    )
    [ffn] = student.kernel_ffns().values()
    assert Counter(ffn.readout(torch.randn(1, 32)).names) == {
        f"{unit}{sign}{piece}": 1 for unit in range(48) for sign in "+-" for piece in ("", ".2")
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kernel", ["half-yat", "yat", "relu2"])
def test_output_prototypes_start_with_one_length(layer, relu2, family, kernel):
    found, _ = start(*layer(family), kernel=kernel)
    length = found.dictionary.norm(dim=-1)
    torch.testing.assert_close(length, length.mean().expand_as(length))
    assert (
        found.rows.norm(dim=-1).std() > 0.05 * found.rows.norm(dim=-1).mean()
    )  # their rows tell the loud ones


def test_lengths_are_the_columns_where_a_kernel_would_not_grow(layer):
    for settings in ({"kernel": "exponential"}, {"init": "data-scale"}):
        length = start(*layer("llama"), **settings)[0].dictionary.norm(dim=-1)
        assert length.std() > 0.05 * length.mean()


def test_a_fraction_keeps_the_loudest(layer):
    weights, inputs = layer("llama")
    (all_of_them, kernel), (some, _) = (start(weights, inputs, expansion=e) for e in (2, 1.5))
    loudness = kernel.square().mean(0).sqrt() * all_of_them.dictionary.norm(dim=-1)
    kept = loudness.topk(72).indices.sort().values
    assert torch.equal(some.rows, all_of_them.rows[kept]) and torch.equal(
        some.units, all_of_them.units[kept]
    )


def test_every_initialiser_that_settings_know_is_registered():
    assert {*INITIALISERS, "pieces"} == {*SETTINGS_NAMES}  # pieces are of tied rows
