"""Settings: what they are where they are not given, and that a config.json has to give them."""

import pytest

from hf_kernel_ffn import InputError, KernelFFNConfig
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig
from hf_kernel_ffn.checkpoint_code.settings import (
    DEFAULT_SETTINGS,
    make_settings,
    resolve_defaults,
)


@pytest.mark.parametrize(
    "given, gated, expected",
    [
        ({}, True, ("free", "half-yat", "fixed", "polarised", None, 2.0)),
        ({}, False, ("free", "half-yat", "fixed", "single", None, 1.0)),
        ({"kernel": "gaussian", "intensity": "none"}, True,
         ("free", "gaussian", "fixed", "data-scale", None, 2.0)),
        ({"rows": "tied"}, True, ("tied", "brownian", "product", "pieces", 8, None)),
        ({"rows": "tied"}, False, ("tied", "brownian", "fixed", "pieces", 7, None)),
        ({"rows": "tied", "kernel": "yat", "values": "fixed", "pieces": 3}, True,
         ("tied", "yat", "fixed", "pieces", 3, None)),
    ],
)  # fmt: skip
def test_what_is_not_given_is_chosen(given, gated, expected):
    settings = resolve_defaults(KernelFFNConfig(**given), gated)
    names = ("rows", "kernel", "values", "init", "pieces", "expansion")
    assert tuple(getattr(settings, name) for name in names) == expected
    assert resolve_defaults(settings, gated) == settings


def test_command_line_and_recipe_take_the_same_without_fields():
    assert make_settings({}) == DEFAULT_SETTINGS == KernelFFNConfig(rows="tied")
    assert make_settings({"pieces": 4}) == KernelFFNConfig(rows="tied", pieces=4)
    assert make_settings({"values": "product"}) == KernelFFNConfig(rows="tied", values="product")
    assert make_settings({"simplex": "sparsemax"}) == KernelFFNConfig(simplex="sparsemax")
    with pytest.raises(InputError, match="rows 'free', expected rows 'tied'"):
        make_settings({"rows": "free", "pieces": 4})


def test_without_a_gate_values_are_no_product():
    with pytest.raises(InputError, match="'product' for an FFN without a gate"):
        resolve_defaults(KernelFFNConfig(rows="tied", values="product"), gated_teacher=False)


@pytest.mark.parametrize("name", ["kernel", "values"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_config_json_leaves_nothing_open(name, value):
    settings = resolve_defaults(DEFAULT_SETTINGS, gated_teacher=True)
    reference = {"scale": 1.0, "far": 2.0}
    entry = LayerConfig(settings, 4, 6, reference, gated=True).to_dict()
    assert LayerConfig.from_dict(entry).settings == settings
    entry["settings"][name] = value
    with pytest.raises(InputError, match=f"found {name}={value!r} in the kernel_ffn settings"):
        LayerConfig.from_dict(entry)
