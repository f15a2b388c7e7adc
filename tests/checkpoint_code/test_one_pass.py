"""What makes readouts fast computes what the plain form computes."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import numbers_cases
import pytest
import torch
from layers import D, P, inputs, make_layer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.checkpoint_code import yat_terms
from hf_kernel_ffn.checkpoint_code.linears import is_plain
from hf_kernel_ffn.checkpoint_code.one_pass import yat_mixture
from hf_kernel_ffn.checkpoint_code.plan import Form, choose_form
from hf_kernel_ffn.storage.exporting import apply_surgery, export_surgery

dense = pytest.mark.parametrize(
    "settings",
    [
        dict(kernel=k, values=v, simplex="softmax", intensity=i)
        for k in ("yat", "half-yat")
        for v in ("fixed", "gated")
        for i in ("mass", "none", "gate")
    ],
    ids=lambda s: f"{s['kernel']}-{s['values']}-{s['intensity']}",
)
SPARSE = ("top-k", "threshold", "sparsemax", "entmax-1.5")


def serves_one_pass(ffn, x):
    return choose_form(ffn, x).form is Form.ONE_PASS


def plainly(ffn, x):
    """The layer by its coefficients, the plain form."""
    return ffn.output_prototypes(ffn.coefficients(x).to(x.dtype))


def gradients(ffn, function, x, loss=torch.sin):
    x = x.clone().requires_grad_()
    names, parameters = zip(*ffn.named_parameters())
    y = function(x)
    found = torch.autograd.grad(loss(y).sum(), (x, *parameters))
    return dict(zip(("x", *names), found), y=y)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(yat_terms, "BLOCK", 7 * P)


@dense
@pytest.mark.parametrize(
    "limit", [2**28, 40 * P * 8, 1], ids=["kept", "in chunks", "token by token"]
)
def test_one_pass_is_the_plain_form_with_its_gradients(settings, limit, small_blocks):
    for seed in range(3):
        ffn, x = make_layer(**settings), inputs(50, seed=seed).reshape(2, 25, D)
        ffn.activation_bytes = limit
        assert serves_one_pass(ffn, x)
        found, expected = gradients(ffn, ffn, x), gradients(ffn, partial(plainly, ffn), x)
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
            )
        with torch.no_grad():
            torch.testing.assert_close(ffn(x), expected["y"], rtol=1e-9, atol=1e-11)


@dense
def test_no_tokens(settings):
    ffn = make_layer(**settings)
    x = torch.empty(2, 0, D, dtype=torch.float64, requires_grad=True)
    ffn(x).sum().backward()
    assert x.grad.shape == x.shape and all((p.grad == 0).all() for p in ffn.parameters())
    with torch.no_grad():
        assert ffn(x).shape == x.shape


@dense
def test_one_pass_without_reading_numbers_as_on_a_device(settings, monkeypatch):
    monkeypatch.setattr(yat_terms, "numbers_at_hand", lambda tensor: False)
    test_one_pass_is_the_plain_form_with_its_gradients(settings, 40 * P * 8, None)


@dense
def test_gradients_of_the_one_pass_and_of_its_gradients(settings):
    ffn, x = make_layer(**settings, size=3, count=4), inputs(2, 3, seed=3)
    up = (ffn.value_proj.weight, ffn.value_proj.bias) if settings["values"] == "gated" else ()
    convex = settings["intensity"] != "mass"
    tensors = [
        x,
        *ffn.input_prototypes.parameters(),
        ffn.output_prototypes.weight,
        ffn.positive("epsilon"),
        ffn.positive("temperature" if convex else "scale"),
        *up,
    ]
    tensors = [t.detach().clone().requires_grad_() for t in tensors]

    def function(*given):
        given = given if up else (*given, None, None)
        return yat_mixture(*given, settings["kernel"] == "half-yat", torch.float64, 2**20, convex)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@dense
def test_one_pass_where_inputs_are_prototypes(settings):
    """Distances that rounding makes negative are cut off; of them ε alone has a gradient, and
    once."""
    ffn = make_layer(torch.float32, **settings, epsilon=100.0)
    x = ffn.input_prototypes.weight.detach().clone() * 50
    with torch.no_grad():
        ffn.input_prototypes.weight.copy_(x)
    found = gradients(ffn, ffn, x, torch.positive)  # outputs are too large for a sine
    expected = gradients(ffn.double(), lambda x: plainly(ffn, x), x.double(), torch.positive)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    # The gradient of ε is a sum that nearly cancels: the plain form in float32 is off by 1e-3 too.
    for name, most in (("y", 1e-3), ("log_ratio.epsilon", 1e-2)):
        assert (found[name] - expected[name]).abs().max() <= most * expected[name].abs().max(), name


def test_frozen_parts_get_no_gradient():
    ffn, x = make_layer(kernel="half-yat", simplex="softmax", intensity="mass"), inputs(20)
    ffn.requires_grad_(False)
    found = x.clone().requires_grad_()
    ffn(found).sum().backward()
    expected = x.clone().requires_grad_()
    plainly(ffn, expected).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
    assert all(p.grad is None for p in ffn.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_keep_to_the_plain_form(dtype):
    settings = dict(kernel="half-yat", simplex="softmax", intensity="mass")
    for own, autocast in ((dtype, False), (torch.float32, True)):
        ffn, x = make_layer(own, **settings), inputs(30).to(own)
        with torch.autocast("cpu", dtype, enabled=autocast):
            assert serves_one_pass(ffn, x)
            found, expected = gradients(ffn, ffn, x), gradients(ffn, partial(plainly, ffn), x)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype, name
            assert (found[name] - value).abs().max() <= 0.05 * value.abs().max(), name


def test_peak_memory_is_bounded_by_the_setting():
    measuring = pytest.importorskip("hf_kernel_ffn.gpu.measuring")
    ffn = make_layer(
        torch.float32, size=16, count=512, kernel="half-yat", simplex="softmax", intensity="mass"
    )
    x = torch.randn(2048, 16)  # 4 MiB of scores

    def step():
        ffn(x).sum().backward()
        ffn.zero_grad(set_to_none=True)

    ffn.activation_bytes = 2**18
    assert measuring.peak_memory(step, x.device) < 2**20
    ffn.activation_bytes = 2**28
    assert measuring.peak_memory(step, x.device) > 2**23


def test_hooks_and_adapters_see_the_plain_form():
    ffn, x, seen = make_layer(kernel="half-yat", simplex="softmax", intensity="mass"), inputs(), []
    ffn.output_prototypes.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    ffn(x)
    torch.testing.assert_close(seen[0], ffn.coefficients(x))


@pytest.mark.parametrize(
    "kernel, values",
    [("half-yat", "fixed"), ("half-yat", "gated"), ("yat", "fixed"), ("gaussian", "fixed")],
)
@pytest.mark.parametrize("simplex", SPARSE)
@pytest.mark.parametrize("intensity", ["mass", "none"])
def test_sparse_decode_reads_the_active_prototypes_alone(kernel, simplex, values, intensity):
    ffn = make_layer(
        kernel=kernel, simplex=simplex, intensity=intensity, values=values, count=64
    ).eval()
    x = inputs(8)
    with torch.no_grad():
        expected = ffn(x)
        for row, y in zip(x, expected):
            torch.testing.assert_close(ffn(row[None, None])[0, 0], y, rtol=1e-9, atol=1e-11)
        spread = ffn.coefficients(x[:1])[0] == 0
        if spread.sum() > 48:
            assert ffn.output_prototypes.weight.T.is_contiguous()
            ffn.output_prototypes.weight[:, spread] = torch.nan  # never read
            assert torch.isfinite(ffn(x[:1])).all()


def test_a_model_that_has_decoded_is_saved_as_before(llama, ids, tmp_path):
    student, _ = convert(
        llama, KernelFFNConfig(simplex="top-k", top_k=5), calibration_tokens=0, copy=True
    )
    student.save_pretrained(tmp_path / "before")
    student.generate(ids[:1, :4], max_new_tokens=4, do_sample=False)
    assert all(
        ffn.output_prototypes.weight.T.is_contiguous() for ffn in student.kernel_ffns().values()
    )
    student.save_pretrained(tmp_path / "after")
    export_surgery(student, tmp_path / "after.safetensors")
    assert (tmp_path / "before" / "model.safetensors").read_bytes() == (
        tmp_path / "after" / "model.safetensors"
    ).read_bytes()
    again = apply_surgery(tmp_path / "after.safetensors", llama)
    assert all(torch.equal(p, student.state_dict()[name]) for name, p in again.state_dict().items())


def test_the_layout_for_decoding_changes_nothing_else():
    ffn, x = (
        make_layer(kernel="half-yat", simplex="top-k", intensity="mass", count=64).eval(),
        inputs(8),
    )
    before, weight = (
        {n: p.clone() for n, p in ffn.state_dict().items()},
        ffn.output_prototypes.weight,
    )
    with torch.inference_mode():
        ffn(x[:1])
    assert ffn.output_prototypes.weight is weight and weight.T.is_contiguous()
    assert all(torch.equal(p, before[n]) for n, p in ffn.state_dict().items())
    ffn.train()(x).sum().backward()
    assert weight.grad.abs().sum() > 0


def assign(ffn):
    ffn.load_state_dict(
        {name: 2 * tensor for name, tensor in ffn.state_dict().items()}, assign=True
    )


def one_row(row):
    def change(ffn):
        ffn.input_prototypes.weight.data[row] *= 3

    return change


def merge_an_adapter(ffn):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        ffn, peft.LoraConfig(target_modules=["input_prototypes"], init_lora_weights=False)
    )
    adapted.merge_and_unload()


CHANGES = {
    "nothing": lambda ffn: None,
    "in place": lambda ffn: ffn.input_prototypes.weight.mul_(1.5),
    "through data": lambda ffn: ffn.input_prototypes.weight.data.mul_(1.5),
    **{f"row {row} through data": one_row(row) for row in range(P)},
    "loaded": lambda ffn: ffn.load_state_dict(
        {name: 2 * tensor for name, tensor in ffn.state_dict().items()}
    ),
    "assigned": assign,
    "a merged adapter": merge_an_adapter,
    "another layout": lambda ffn: setattr(
        ffn.input_prototypes.weight, "data", ffn.input_prototypes.weight.T.contiguous().T * 2
    ),
    "a step": lambda ffn: torch.optim.SGD(
        [p for p in ffn.parameters() if p.grad is not None], 0.1
    ).step(),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_one_token_sees_every_change_of_the_rows(change, keep):
    ffn, x = make_layer(kernel="gaussian", simplex="softmax", intensity="mass"), inputs(1)
    ffn.keep_norms = keep
    plainly(ffn, inputs()).sum().backward()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(ffn(x), ffn(torch.cat([x, x]))[:1])
            CHANGES[change](ffn)
        torch.testing.assert_close(ffn(x), ffn(torch.cat([x, x]))[:1])


def test_kept_norms_are_kept_and_not_copied():
    ffn, x = make_layer(kernel="gaussian", simplex="softmax", intensity="mass"), inputs(1)
    ffn.keep_norms = True
    with torch.no_grad():
        ffn(x)
        squares = ffn._row_norms.squares
        ffn(x)
        assert squares is not None and ffn._row_norms.squares is squares
        copy = deepcopy(ffn)
        assert copy._row_norms.squares is None and copy.keep_norms
        torch.testing.assert_close(copy(x), ffn(x))


def test_hidden_dropout_is_not_passed_over():
    ffn, x = make_layer(kernel="half-yat", simplex="softmax", intensity="mass"), inputs()
    ffn.config = replace(ffn.config, hidden_dropout=1.0)
    assert not serves_one_pass(ffn, x)
    torch.testing.assert_close(ffn(x), ffn.output_prototypes.bias.expand_as(x))
    assert serves_one_pass(ffn.eval(), x)


SETTINGS = [
    dict(simplex="softmax", values="gated"),
    dict(simplex="softmax"),
    dict(simplex="top-k", top_k=3),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_compiled_in_one_graph_without_recompiling_for_new_lengths(settings, llama):
    student, _ = convert(llama, KernelFFNConfig(**settings), layers="1", calibration_tokens=0)
    ffn = student.kernel_ffns()["layers.1.mlp"]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ffn, fullgraph=True, backend=counter)
    lengths = (5, 9, 12, 33, 7)
    for count, length in enumerate(lengths):
        x = inputs(length, 32, seed=length).float()[None]
        torch.testing.assert_close(compiled(x), ffn(x), rtol=1e-4, atol=1e-5)
        if count == 1:
            settled = counter.frame_count  # the second length makes the first one a variable
    assert counter.frame_count == settled <= 2
    with torch.no_grad():
        one = inputs(1, 32).float()[None]
        torch.testing.assert_close(compiled(one), ffn(one), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@dense
def test_compiled_gradients_run_in_one_pass_too(settings):
    """Scores are bounded by the setting under a compiler as well, which sees one operator, and is
    called once for all lengths."""
    ffn = make_layer(torch.float32, **settings)
    ffn.activation_bytes = 64 * P * 4
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ffn, fullgraph=True, backend=counter)
    for length in (11, 13, 200, 17, 190):  # kept for the backward pass, or computed again there
        x = inputs(length, seed=length).float()[None]
        found, expected = gradients(ffn, compiled, x), gradients(ffn, ffn, x)
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert any(
        "mixture" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes
    )
    assert counter.frame_count <= 3
    torch._dynamo.reset()


def test_sparse_gated_values_are_computed_once():
    ffn, calls = (
        make_layer(kernel="half-yat", simplex="top-k", intensity="mass", values="gated"),
        [],
    )
    ffn.value_proj.register_forward_hook(lambda *_: calls.append(1))
    ffn(inputs())
    assert len(calls) == 1


def test_only_linear_modules_are_plain():
    linear = nn.Linear(3, 3)
    assert is_plain(linear)
    linear.forward = linear.forward  # as accelerate wraps it
    assert not is_plain(linear)
    assert not is_plain(nn.Linear(3, 3, device="meta"))


@pytest.mark.parametrize("kernel", ["half-yat", "yat"])
@pytest.mark.parametrize("dtype", numbers_cases.DTYPES, ids=str)
@pytest.mark.parametrize("norm", [1e-6, 1.0, 1e4])
def test_one_token_of_any_length_is_close_to_float64(kernel, dtype, norm):
    compared = 0
    for kind in ("random", "zero", "at a prototype", "nothing fires"):
        for simplex, values in (
            ("softmax", "fixed"),
            ("top-k", "fixed"),
            ("top-k", "gated"),
            ("threshold", "fixed"),
        ):
            ffn, exact, x = numbers_cases.module(
                kernel, simplex, "mass", values, kind, norm, 1.0, 0, dtype
            )
            x = x[:1, :1]
            for keep in (False, True):
                ffn.eval().keep_norms = keep
                with torch.no_grad():
                    found, expected, coefficients = (
                        ffn(x),
                        exact.eval()(x.double()),
                        exact.coefficients(x.double()),
                    )
                assert torch.isfinite(found).all() and found.dtype == dtype
                if (
                    not numbers_cases.undecided(exact, x)
                    and coefficients.max() < torch.finfo(dtype).max / 2
                ):
                    room = 1e-3 if dtype == torch.float32 else 32 * torch.finfo(dtype).eps
                    among = (
                        coefficients.abs() @ exact.output_prototypes.weight.T.abs()
                        + exact.output_prototypes.bias.abs()
                    )
                    assert (
                        (found.double() - expected).abs() <= room * among + torch.finfo(dtype).tiny
                    ).all(), (kind, simplex)
                    compared += 1
    assert compared >= 16
