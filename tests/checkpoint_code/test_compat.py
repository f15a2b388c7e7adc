"""Private facts of torch and peft: what is asked of them now, and what is answered without them."""

import types

import pytest
import torch
from layers import inputs, make_layer
from torch import nn

from hf_kernel_ffn.checkpoint_code import compat
from hf_kernel_ffn.checkpoint_code.linears import get_effective_weight, is_plain
from hf_kernel_ffn.checkpoint_code.plan import Form, choose_form


def test_transforms_of_torch_func_are_noticed():
    seen = []
    torch.func.grad(lambda x: seen.append(compat.are_function_transforms_active()) or x)(
        torch.tensor(1.0)
    )
    assert seen == [True] and not compat.are_function_transforms_active()


def test_a_torch_that_does_not_tell_of_transforms(monkeypatch):
    monkeypatch.setattr(compat, "torch", types.SimpleNamespace(_C=types.SimpleNamespace()))
    assert compat.are_function_transforms_active() is False
    ffn, x = make_layer(kernel="half-yat", simplex="softmax", intensity="mass"), inputs()
    assert choose_form(ffn, x).form is Form.ONE_PASS
    assert ffn(x).shape == x.shape


def test_the_version_of_a_tensor_counts_changes_in_place():
    tensor = torch.zeros(2)
    before = compat.get_tensor_version(tensor)
    tensor.add_(1)
    assert compat.get_tensor_version(tensor) == before + 1
    assert compat.get_tensor_version(types.SimpleNamespace()) is None


def test_without_versions_no_norm_is_kept(monkeypatch):
    monkeypatch.setattr(
        "hf_kernel_ffn.checkpoint_code.decode.get_tensor_version", lambda tensor: None
    )
    ffn, x = make_layer(kernel="gaussian", simplex="softmax", intensity="mass"), inputs(1)
    ffn.keep_norms = True
    with torch.no_grad():
        ffn(x)
        assert ffn._row_norms.squares is None
        ffn.input_prototypes.weight.mul_(2)
        torch.testing.assert_close(ffn(x), ffn(torch.cat([x, x]))[:1])


@pytest.mark.parametrize(
    "register",
    [
        lambda linear: linear.register_forward_hook(lambda *_: None),
        lambda linear: linear.register_forward_pre_hook(lambda *_: None),
        lambda linear: linear.register_full_backward_hook(lambda *_: None),
        lambda linear: linear.register_full_backward_pre_hook(lambda *_: None),
    ],
    ids=["forward", "before forward", "backward", "before backward"],
)
def test_hooks_are_noticed(register):
    linear = nn.Linear(2, 2)
    assert not compat.has_hooks(linear) and is_plain(linear)
    handle = register(linear)
    assert compat.has_hooks(linear) and not is_plain(linear)
    handle.remove()
    assert is_plain(linear)


def test_a_registry_of_hooks_that_is_gone_holds_none(monkeypatch):
    monkeypatch.setattr(compat, "HOOK_REGISTRIES", ("_hooks_of_a_later_torch", "_forward_hooks"))
    linear = nn.Linear(2, 2)
    assert not compat.has_hooks(linear)
    linear.register_forward_hook(lambda *_: None)
    assert compat.has_hooks(linear)


def test_a_forward_of_the_instances_own_is_noticed():
    linear = nn.Linear(2, 2)
    assert not compat.has_own_forward(linear)
    linear.forward = linear.forward
    assert compat.has_own_forward(linear)


def adapt(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)
    return peft.get_peft_model(nn.Sequential(nn.Linear(3, 4)), config).base_model.model[0]


@pytest.mark.parametrize(
    "options, alone", [({}, True), ({"use_dora": True}, False), ({"lora_bias": True}, False)]
)
def test_what_an_adapter_adds_beside_its_delta_is_noticed(options, alone):
    layer = adapt(**options)
    assert compat.is_lora_layer(layer) and not compat.is_lora_layer(nn.Linear(2, 2))
    assert compat.adds_its_delta_alone(layer, "default") is alone


@pytest.mark.parametrize("fact", ["lora_variant", "lora_bias"])
def test_a_peft_that_does_not_say_is_asked_by_its_outputs(fact):
    layer = adapt()
    x = torch.eye(3)
    expected = get_effective_weight(layer, x)
    delattr(layer, fact)
    assert not compat.adds_its_delta_alone(layer, "default")
    with pytest.raises(AttributeError):
        getattr(layer, fact)
    layer.forward = types.MethodType(
        lambda self, x: nn.functional.linear(x, *expected), layer
    )  # peft's own forward would miss the attribute too
    found = get_effective_weight(layer, x)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
