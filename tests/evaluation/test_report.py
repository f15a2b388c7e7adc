"""The report against computations of its own: fidelity, readability, and what must not move it."""

import copy
import math
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import reference
import torch
from teachers import RECIPES, tiny_teacher
from tiny_families import tiny
from transformers import AutoModelForCausalLM

from hf_kernel_ffn import (
    InputError,
    Kernel,
    KernelFFNConfig,
    Readout,
    convert,
    evaluate_student,
    register_kernel,
    restore,
)
from hf_kernel_ffn.evaluation import accumulators
from hf_kernel_ffn.evaluation.accumulators import OutputErrors
from hf_kernel_ffn.evaluation.fidelity import Fidelity
from hf_kernel_ffn.evaluation.readability import Readability, readability
from hf_kernel_ffn.families.lookup import find_stock_ffn
from hf_kernel_ffn.families.registry import get_architecture_of_model
from hf_kernel_ffn.families.weights import read_ffn_weights, read_teacher_readout
from hf_kernel_ffn.reading import trace
from hf_kernel_ffn.reading.report import report_data
from hf_kernel_ffn.text.packing import read_token_ids
from hf_kernel_ffn.text.prediction import make_inputs_for_prediction

FIDELITY = {
    "tokens",
    "teacher",
    "student",
    "ablated",
    "delta_cross_entropy",
    "kl",
    "top1_agreement",
    "loss_recovered",
}
SPIKES = {
    f"{name}{inputs}"
    for name in ("fvu_spikes", "spike_tokens", "spike_positions")
    for inputs in ("", "_student_inputs")
}
LAYER = {
    "fvu",
    "fvu_student_inputs",
    "active_prototypes",
    "effective_prototypes",
    "coherence",
    "orthogonal_coherence",
    "opposed_share",
    "write_mass_ratio",
    "dead_prototypes",
}
READABLE = LAYER - {"fvu", "fvu_student_inputs", "dead_prototypes"}
SETTINGS = {
    "polarised": KernelFFNConfig(),
    "convex": KernelFFNConfig(
        kernel="imq", simplex="entmax-1.5", intensity="none", temperature=0.05
    ),
    "gate": KernelFFNConfig(kernel="yat", simplex="top-k", top_k=7, intensity="gate"),
    "gated values": KernelFFNConfig(values="gated"),
}


@pytest.fixture(scope="module")
def student_of(ids):
    """A student of ``teacher`` with settings by name; its own to change."""
    return lambda teacher, name: convert(
        teacher, SETTINGS[name], calibration_ids=ids, calibration_tokens=256, copy=True
    )[0]


@pytest.fixture(
    scope="module",
    params=[("llama", name) for name in SETTINGS] + [("gpt2", "gate"), ("mistral", "polarised")],
)
def case(request, make_teacher, student_of, ids):
    """A teacher, a student, and the report on them."""
    family, name = request.param
    teacher = make_teacher(family)
    student = student_of(teacher, name)
    return teacher, student, evaluate_student(student, teacher, ids)


@contextmanager
def hooked(modules, hook):
    hooks = [module.register_forward_hook(hook) for module in modules]
    yield
    for handle in hooks:
        handle.remove()


def stock_ffns(teacher, student):
    return {path: teacher.base_model.get_submodule(path) for path in student.kernel_ffns()}


def inputs_of(model, ffns, ids):
    """What each FFN reads, (tokens, hidden_size), by path."""
    seen = {}
    with (
        torch.no_grad(),
        hooked(
            ffns.values(), lambda module, args, output: seen.update({module: args[0].flatten(0, 1)})
        ),
    ):
        model(ids)
    return {path: seen[ffn] for path, ffn in ffns.items()}


def cross_entropy(model, ids):
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


def fvu(estimate, truth):
    estimate, truth = estimate.double(), truth.double()
    return ((estimate - truth).square().sum() / (truth - truth.mean(0)).square().sum()).item()


# the report


def test_the_report_has_every_key(case):
    _, student, report = case
    assert set(report) == FIDELITY | {"layers"}
    assert set(report["teacher"]) == set(report["student"]) == {"cross_entropy"}
    assert [layer["path"] for layer in report["layers"]] == list(student.kernel_ffns())
    for layer in report["layers"]:
        own = {"path", "teacher", "active_prototypes_student_inputs"}
        assert set(layer) == LAYER | SPIKES | own | {"spike_units"}
        assert set(layer["teacher"]) == LAYER | {"spike_units"}
        assert layer["fvu_spikes"] is layer["fvu_spikes_student_inputs"] is None
        assert layer["spike_tokens"] == layer["spike_tokens_student_inputs"] == 0
        assert layer["spike_positions"] == layer["spike_positions_student_inputs"] == []
        settings = student.kernel_ffns()[layer["path"]].config.settings
        if settings.top_k:
            assert layer["active_prototypes_student_inputs"] == settings.top_k
        for figures in (layer, layer["teacher"]):
            assert all(math.isfinite(figures[name]) for name in LAYER)
            assert all(
                0 <= figures[name] <= 1
                for name in ("coherence", "opposed_share", "orthogonal_coherence")
            )
            assert 1 <= figures["effective_prototypes"] <= figures["active_prototypes"]


def test_cross_entropies_are_the_models_own_losses(case, ids):
    teacher, student, report = case
    assert report["tokens"] == ids.numel() - len(ids)
    assert report["teacher"]["cross_entropy"] == pytest.approx(
        cross_entropy(teacher, ids), abs=1e-5
    )
    assert report["student"]["cross_entropy"] == pytest.approx(
        cross_entropy(student, ids), abs=1e-5
    )
    delta = cross_entropy(student, ids) - cross_entropy(teacher, ids)
    assert report["delta_cross_entropy"] == pytest.approx(delta, abs=1e-5)


def test_divergence_and_agreement_against_float64(case, ids):
    teacher, student, report = case
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in (teacher, student))
    assert report["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert report["top1_agreement"] == pytest.approx(
        (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    )
    assert report["kl"] > 0 and 0 < report["top1_agreement"] < 1


def test_loss_recovered_compares_with_every_ffn_silenced_to_its_mean(case, ids):
    teacher, student, report = case
    ffns, means = stock_ffns(teacher, student), {}
    for path, x in inputs_of(teacher, ffns, ids).items():
        with torch.no_grad():
            means[ffns[path]] = ffns[path](x).mean(0)
    with hooked(means, lambda module, args, output: means[module].expand_as(output)):
        ablated = cross_entropy(teacher, ids)
    own, delta = cross_entropy(teacher, ids), report["delta_cross_entropy"]
    assert report["ablated"]["cross_entropy"] == pytest.approx(ablated, abs=1e-5)
    assert report["loss_recovered"] == pytest.approx(1 - delta / (ablated - own), abs=1e-4)
    assert abs(ablated - own) > 0.01  # the FFNs matter


def test_unexplained_variance_on_both_inputs(case, ids):
    teacher, student, report = case
    stock, kernels = stock_ffns(teacher, student), student.kernel_ffns()
    on_teacher, on_student = inputs_of(teacher, stock, ids), inputs_of(student, kernels, ids)
    for layer in report["layers"]:
        path = layer["path"]
        for name, x in (("fvu", on_teacher[path]), ("fvu_student_inputs", on_student[path])):
            with torch.no_grad():
                assert layer[name] == pytest.approx(
                    fvu(kernels[path](x), stock[path](x)), rel=1e-4
                ), name
            assert layer["teacher"][name] == 0
    assert all(layer["fvu"] > 0.001 for layer in report["layers"])


def test_readability_against_plain_loops(case, ids):
    teacher, student, report = case
    path, layer = list(student.kernel_ffns())[1], report["layers"][1]
    x = inputs_of(teacher, stock_ffns(teacher, student), ids)[path]
    weights = read_ffn_weights(
        teacher.base_model.get_submodule(path),
        get_architecture_of_model(teacher),
        teacher.config,
        path,
    )
    with torch.no_grad():
        records = {
            "student": student.kernel_ffns()[path].readout(x),
            "teacher": read_teacher_readout(weights, x),
        }
    masses = {}
    for who, figures in (("student", layer), ("teacher", layer["teacher"])):
        c, v = (tensor.detach().double().numpy() for tensor in records[who][:2])
        tokens = [reference.readability(row, v, (c @ v).mean(0)) for row in c]
        for name in READABLE - {"write_mass_ratio"}:
            assert figures[name] == pytest.approx(
                sum(t[name] for t in tokens) / len(tokens), rel=1e-4
            ), (who, name)
        masses[who] = sum(t["write_mass"] for t in tokens)
    assert layer["write_mass_ratio"] == pytest.approx(
        masses["student"] / masses["teacher"], rel=1e-4
    )
    assert layer["teacher"]["write_mass_ratio"] == 1


def test_the_batch_size_is_no_part_of_the_result(case, ids):
    teacher, student, report = case
    again = evaluate_student(student, teacher, ids, batch_tokens=1)
    assert again["tokens"] == report["tokens"]
    for name in ("kl", "loss_recovered", "delta_cross_entropy"):
        assert again[name] == pytest.approx(report[name], abs=1e-4)
    for one, other in zip(again["layers"], report["layers"]):
        assert {n: one[n] for n in LAYER} == pytest.approx({n: other[n] for n in LAYER}, rel=1e-3)


def test_parts_of_a_batch_are_no_part_of_the_result(case, ids, monkeypatch):
    teacher, student, _ = case
    monkeypatch.setattr(accumulators, "COEFFICIENT_BYTES", 1)  # a token at a time
    again = evaluate_student(student, teacher, ids[:2])
    monkeypatch.undo()
    expected = evaluate_student(student, teacher, ids[:2])
    for one, other in zip(again["layers"], expected["layers"], strict=True):
        assert {n: one[n] for n in LAYER} == pytest.approx({n: other[n] for n in LAYER}, rel=1e-4)


def test_nothing_is_left_behind(case, ids):
    teacher, student, _ = case
    for model in (teacher, student):
        assert not any(module._forward_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


class MaskTokenizer:
    """Knows a mask token, and puts nothing around a text."""

    mask_token_id = 4

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [5]}


def test_an_ffn_that_layers_share_is_measured_in_all_of_them():
    teacher = tiny("albert", "AutoModelForMaskedLM", num_hidden_layers=3)
    ids = torch.randint(5, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    tokenizer = MaskTokenizer()
    asked = make_inputs_for_prediction(teacher, tokenizer, ids)
    settings = KernelFFNConfig(simplex="threshold", top_k=7)
    student, _ = convert(teacher, settings, calibration_ids=asked, calibration_tokens=64, copy=True)
    [(path, ffn)] = student.kernel_ffns().items()
    read, written = [], []

    def see(module, args, output):
        read.append(args[0].flatten(0, 1))
        written.append(output.flatten(0, 1))

    with torch.no_grad(), hooked([ffn], see):
        student(input_ids=asked["input_ids"])
    assert len(read) == 3
    with torch.no_grad():
        truth = find_stock_ffn(teacher, path)(torch.cat(read))
        active = (ffn.readout(torch.cat(read)).coefficients != 0).sum(-1).double().mean().item()
    for batch_tokens in (2048, 16):
        report = evaluate_student(
            student, teacher, ids, tokenizer=tokenizer, batch_tokens=batch_tokens
        )
        [layer] = report["layers"]
        assert layer["fvu_student_inputs"] == pytest.approx(
            fvu(torch.cat(written), truth), rel=1e-4
        )
        assert layer["active_prototypes_student_inputs"] == pytest.approx(active)
    last = fvu(written[-1], truth[-len(written[-1]) :])
    assert layer["fvu_student_inputs"] != pytest.approx(last, rel=1e-3)


def test_only_converted_layers_are_reported(llama, ids):
    student, _ = convert(
        llama, KernelFFNConfig(), layers="0,2", calibration_ids=ids, calibration_tokens=256
    )
    report = evaluate_student(student, llama, ids)
    assert [layer["path"] for layer in report["layers"]] == ["layers.0.mlp", "layers.2.mlp"]


def test_half_precision(llama, student_of, ids):
    teacher, student = copy.deepcopy(llama), student_of(llama, "gate")
    exact = evaluate_student(student, teacher, ids)
    half = evaluate_student(student.bfloat16(), teacher.bfloat16(), ids)
    assert half["teacher"]["cross_entropy"] == pytest.approx(
        exact["teacher"]["cross_entropy"], abs=0.05
    )
    for layer, other in zip(half["layers"], exact["layers"]):
        assert layer["active_prototypes"] == pytest.approx(7)
        assert layer["coherence"] == pytest.approx(other["coherence"], rel=0.1)


def test_the_pair_has_to_belong_together(llama, gpt2, student_of, ids):
    student = student_of(llama, "polarised")
    for one, other, reason in (
        (llama, llama, "not converted"),
        (student, student, "expected a stock 'llama'"),
        (student, gpt2, "'gpt2'"),
        (student, tiny_teacher("llama", vocab_size=301), "vocab_size 300 in the student and 301"),
        (student, tiny_teacher("llama", num_hidden_layers=4), "num_hidden_layers"),
    ):
        with pytest.raises(InputError, match=reason):
            evaluate_student(one, other, ids)
    with pytest.raises(InputError, match="not converted"):
        evaluate_student(restore(student, llama), llama, ids)


# spikes


@pytest.fixture(scope="module")
def spiked(ids):
    """A GPT-2 whose second FFN writes a hundred times as much at the first token of every row, one
    and the same, and where token 7 follows it; ids of which the second two rows have that."""
    ids = ids.clone()
    ids[:, 0] = 1
    ids[2:, 1] = ids[2:, 1].clamp_min(8)
    ids[:2, 1] = 7
    teacher = tiny_teacher("gpt2")
    path = "h.1.mlp"
    ffn = teacher.base_model.get_submodule(path)
    x = inputs_of(teacher, {path: ffn}, ids)[path].unflatten(0, ids.shape)
    for unit, direction in ((0, x[0, 0]), (1, x[0, 1])):
        direction = direction / direction.norm()
        others = x.flatten(0, 1) @ direction
        high = others.max()
        low = others[others < high - 1e-3].max()
        with torch.no_grad():  # a unit that is silent below the middle between high and low
            ffn.c_fc.weight[:, unit] = 20 / (high - low) * direction
            ffn.c_fc.bias[unit] = -20 / (high - low) * (high + low) / 2
            ffn.c_proj.weight[unit] *= 200 / ffn.c_proj.weight[unit].norm()
    return teacher, ids


def fvu_of_spikes(estimate, truth, spikes):
    """The error over the squared distance from the mean of the other tokens."""
    estimate, truth = estimate.double(), truth.double()
    error = (estimate - truth)[spikes].square().sum()
    return (error / (truth[spikes] - truth[~spikes].mean(0)).square().sum()).item()


@pytest.mark.parametrize("batch_tokens", [2048, 64])
def test_spikes_are_reported_apart(spiked, batch_tokens):
    teacher, ids = spiked
    student, _ = convert(teacher, calibration_ids=ids, calibration_tokens=256, copy=True)
    report = evaluate_student(student, teacher, ids, batch_tokens=batch_tokens)
    stock, kernels = stock_ffns(teacher, student), student.kernel_ffns()
    assert [layer["spike_tokens"] for layer in report["layers"]] == [0, 10, 0]
    layer = report["layers"][1]
    path = layer["path"]
    assert layer["spike_positions"] == layer["spike_positions_student_inputs"] == [[0, 8], [1, 2]]
    for suffix, model, ffns in (("", teacher, stock), ("_student_inputs", student, kernels)):
        x = inputs_of(model, ffns, ids)[path]
        with torch.no_grad():
            estimate, truth = kernels[path](x), stock[path](x)
        length = truth.norm(dim=-1)
        spikes = length > 10 * length.median()
        assert layer[f"spike_tokens{suffix}"] == spikes.sum() == 10
        ordinary = fvu(estimate[~spikes], truth[~spikes])
        assert layer[f"fvu{suffix}"] == pytest.approx(ordinary, rel=1e-4)
        expected = fvu_of_spikes(estimate, truth, spikes)
        assert layer[f"fvu_spikes{suffix}"] == pytest.approx(expected, rel=1e-4)


def test_the_units_that_write_spikes_are_named(spiked):
    """By a loop over units; tied and free rows name the teacher's own."""
    teacher, ids = spiked
    for settings in (None, KernelFFNConfig()):
        student, _ = convert(
            teacher, settings, calibration_ids=ids, calibration_tokens=256, copy=True
        )
        layers = evaluate_student(student, teacher, ids, batch_tokens=64)["layers"]
        assert [layer["spike_units"] for layer in (layers[0], layers[2])] == [[], []]
        path = layers[1]["path"]
        stock = stock_ffns(teacher, student)[path]
        x = inputs_of(teacher, {path: stock}, ids)[path]
        with torch.no_grad():
            y = stock(x)
            spikes = y.norm(dim=-1) > 10 * y.norm(dim=-1).median()
            hidden = stock.act(stock.c_fc(x[spikes]))
        expected = {}
        for unit in range(hidden.shape[1]):
            written = hidden[:, unit, None] * stock.c_proj.weight[unit]
            expected[str(unit)] = ((written * y[spikes]).sum() / y[spikes].square().sum()).item()
        assert set(dict(layers[1]["teacher"]["spike_units"])) >= {"0", "1"}
        for unit, share in layers[1]["teacher"]["spike_units"]:
            assert share == pytest.approx(expected[unit], abs=1e-3)
        of_student = dict(layers[1]["spike_units"])
        assert {"0", "1"} <= set(of_student)
        assert of_student["0"] == pytest.approx(expected["0"], abs=0.2)


def test_the_page_of_a_prompt_names_them_too(spiked, tokenizer):
    teacher, ids = spiked
    passed = trace(teacher, tokenizer, ids[0])
    cells = report_data(passed)["student"]["layers"][1]["cells"]
    assert [place for place, cell in enumerate(cells) if "spike" in cell] == [0, 1]
    assert cells[0]["spike"][0][0] == "0" and cells[1]["spike"][0][0] == "1"


def test_a_spike_does_not_hide_an_error_elsewhere(spiked):
    """A student that is right at spikes alone, and one that is right but for spikes."""
    teacher, ids = spiked
    student, _ = convert(
        teacher, layers="1", calibration_ids=ids, calibration_tokens=256, copy=True
    )
    [(path, ffn)] = student.kernel_ffns().items()
    own = teacher.base_model.get_submodule(path)
    x = inputs_of(teacher, {path: own}, ids)[path]
    with torch.no_grad():
        mean = own(x).median(0).values

    def right_at(spikes):
        def forward(x):
            written = own(x)
            loud = written.norm(dim=-1, keepdim=True) > 50
            return torch.where(loud == spikes, written, mean.expand_as(written))

        return forward

    ffn.forward = right_at(spikes=True)
    [layer] = evaluate_student(student, teacher, ids)["layers"]
    assert fvu(ffn(x), own(x)) < 0.01  # over all tokens there seems to be no error
    assert layer["fvu"] > 0.9 and layer["fvu_spikes"] == 0
    ffn.forward = right_at(spikes=False)
    [layer] = evaluate_student(student, teacher, ids)["layers"]
    assert layer["fvu"] == 0 and layer["fvu_spikes"] == pytest.approx(1, abs=0.1)


def test_positions_are_the_commonest_and_none_for_experts(ids):
    errors = OutputErrors()
    truth = torch.ones(20 * 20, 3)
    truth.view(20, 20, 3)[:, 4] = 100.0
    for position in range(5, 15):
        truth.view(20, 20, 3)[: position - 4, position] = 100.0
    for chunk in truth.split(140):
        errors.add(chunk, chunk)
    assert errors.spike_tokens() == 20 + sum(range(1, 11))
    expected = [[4, 20]] + [[position, position - 4] for position in range(14, 7, -1)]
    assert errors.spike_positions(20) == expected

    teacher = tiny("mixtral", "AutoModelForCausalLM")
    student, _ = convert(teacher, calibration_ids=ids, calibration_tokens=256, copy=True)
    for layer in evaluate_student(student, teacher, ids)["layers"]:
        assert layer["spike_positions"] is None


# students whose figures are known beforehand


def test_a_student_that_computes_the_same_is_perfect(teacher, student_of, ids):
    student = student_of(teacher, "polarised" if teacher.config.model_type != "gpt2" else "convex")
    for path, ffn in student.kernel_ffns().items():
        ffn.forward = teacher.base_model.get_submodule(path).forward
    report = evaluate_student(student, teacher, ids)
    assert report["kl"] == report["delta_cross_entropy"] == 0
    assert report["top1_agreement"] == report["loss_recovered"] == 1
    assert all(layer["fvu"] == layer["fvu_student_inputs"] == 0 for layer in report["layers"])


class Relu2(Kernel):
    """The square of the score's positive part: exact for a plain ReLU² FFN."""

    def value(self, score, distance2):
        return score.relu().square()


def test_an_exact_readout_of_the_same_units_has_the_teachers_own_figures(registry, ids):
    register_kernel(Relu2("relu2", nonnegative=True, positive_definite=False, uses_bias=True))
    teacher = tiny_teacher("gpt2", activation_function="relu2")
    student, _ = convert(
        teacher,
        KernelFFNConfig(kernel="relu2"),
        calibration_ids=ids,
        calibration_tokens=256,
        copy=True,
    )
    with torch.no_grad():
        for path, ffn in student.kernel_ffns().items():
            stock = teacher.base_model.get_submodule(path)
            ffn.set_reference("scale", 1.0)
            ffn.input_prototypes.weight.copy_(stock.c_fc.weight.T)
            ffn.input_prototypes.bias.copy_(stock.c_fc.bias)
            ffn.output_prototypes.weight.copy_(stock.c_proj.weight.T)
            ffn.output_prototypes.bias.copy_(stock.c_proj.bias)
    report = evaluate_student(student, teacher, ids)
    assert report["loss_recovered"] == pytest.approx(1, abs=1e-5)
    assert report["kl"] == pytest.approx(0, abs=1e-6)
    for layer in report["layers"]:
        assert layer["fvu"] < 1e-9
        for name in READABLE:
            assert layer[name] == pytest.approx(layer["teacher"][name], rel=1e-4), name


def test_a_student_of_mean_outputs_recovers_nothing(teacher, student_of, ids):
    student = student_of(teacher, "gate" if teacher.config.model_type == "gpt2" else "polarised")
    stock = stock_ffns(teacher, student)
    with torch.no_grad():
        for path, x in inputs_of(teacher, stock, ids).items():
            prototypes = student.kernel_ffns()[path].output_prototypes
            prototypes.weight.zero_()
            prototypes.bias.copy_(stock[path](x).mean(0))
    report = evaluate_student(student, teacher, ids)
    assert report["loss_recovered"] == pytest.approx(0, abs=1e-4)
    assert report["student"]["cross_entropy"] == pytest.approx(
        report["ablated"]["cross_entropy"], abs=1e-5
    )
    assert [layer["fvu"] for layer in report["layers"]] == pytest.approx([1, 1, 1], abs=1e-4)
    for layer in report["layers"]:  # nothing is written by prototypes
        assert layer["coherence"] == layer["opposed_share"] == layer["write_mass_ratio"] == 0


# readability(): definition and laws


def record(coefficients, dictionary):
    return Readout(
        coefficients, dictionary, None, None, None, tuple(map(str, range(len(dictionary))))
    )


@pytest.fixture(params=["nonnegative", "signed", "sparse"])
def sample(request):
    """Coefficients (6, 9), dictionary (9, 5)."""
    generator = torch.Generator().manual_seed(0)
    c, v = torch.randn(6, 9, generator=generator), torch.randn(9, 5, generator=generator)
    if request.param == "sparse":
        c[:, ::2] = 0
        c[2] = 0  # nothing fires
    return c.abs() if request.param == "nonnegative" else c, v


def figures_of(c, v):
    return readability(record(c, v), (c @ v).mean(0))


def test_readability_is_its_definition(sample):
    c, v = sample
    found = figures_of(c, v)
    mean = (c.double() @ v.double()).mean(0).numpy()
    for token, row in enumerate(c.double().numpy()):
        expected = reference.readability(row, v.double().numpy(), mean)
        assert {name: values[token].item() for name, values in found.items()} == pytest.approx(
            expected, rel=1e-4, abs=1e-6
        )


def test_known_readings():
    v = torch.eye(4)
    nothing_removed = torch.zeros(4)
    one, four, pair = (
        readability(record(torch.tensor([c]), d), nothing_removed)
        for c, d in (
            ([0.0, 0, 3, 0], v),
            ([1.0] * 4, v),
            ([3.0, 1], torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0]])),
        )
    )
    assert [one[n].item() for n in one] == pytest.approx([1, 1, 1, 1, 0, 3])
    assert [four[n].item() for n in four] == pytest.approx([4, 4, 0.5, 0.5, 0, 4])
    assert pair["coherence"].item() == pytest.approx(0.5)  # 3 − 1 of 3 + 1
    assert pair["opposed_share"].item() == pytest.approx(0.25)


def test_a_write_that_never_varies_has_no_coherence():
    c = torch.full((6, 3), 1 / 3)
    found = figures_of(c, torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    assert found["coherence"].max() < 1e-5


@pytest.mark.parametrize("size", [3.0, 3000.0])
def test_a_common_shift_of_the_dictionary_changes_nothing(sample, size):
    c, v = sample
    c[1] = torch.eye(9)[1]  # one prototype takes all
    c = c.abs()
    c = c / c.sum(-1, keepdim=True).clamp_min(1e-9)
    fires, shift = c.sum(-1) > 0, torch.full((5,), size)
    c = c[fires]
    before, after = figures_of(c, v), figures_of(c, v + shift)
    for name in ("coherence", "opposed_share", "active_prototypes"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-2, atol=1e-3)
    raw = [(c @ d).norm(dim=-1) / (c * d.norm(dim=-1)).sum(-1) for d in (v, v + shift)]
    assert (raw[1] - raw[0]).mean() > 0.1  # the raw ratio is gamed


def test_louder_rows_under_a_lower_intensity_change_nothing(sample):
    c, v = sample
    before, after = figures_of(c, v), figures_of(c / 8, v * 8)
    for name, values in before.items():
        torch.testing.assert_close(after[name], values, msg=name)


# the same laws through a whole report


def test_the_report_is_blind_to_a_shift_between_rows_and_bias(llama, student_of, ids):
    student = student_of(llama, "convex")
    before = evaluate_student(student, llama, ids)
    with torch.no_grad():
        for ffn in student.kernel_ffns().values():
            shift = 5 * ffn.output_prototypes.weight.norm(dim=0).mean() * torch.ones(32) / 32**0.5
            ffn.output_prototypes.weight.add_(shift[:, None])
            ffn.output_prototypes.bias.sub_(shift)
    after = evaluate_student(student, llama, ids)
    assert after["student"]["cross_entropy"] == pytest.approx(
        before["student"]["cross_entropy"], abs=1e-3
    )
    for one, other in zip(after["layers"], before["layers"]):
        for name in ("fvu", "coherence", "opposed_share", "active_prototypes"):
            assert one[name] == pytest.approx(other[name], rel=1e-2), name
        assert one["write_mass_ratio"] > 2 * other["write_mass_ratio"]  # this one shows it


@pytest.mark.parametrize("name", ["polarised", "gate", "gated values"])
def test_the_report_is_blind_to_a_factor_between_rows_and_intensity(llama, student_of, ids, name):
    student = student_of(llama, name)
    before = evaluate_student(student, llama, ids)
    with torch.no_grad():
        for ffn in student.kernel_ffns().values():
            ffn.output_prototypes.weight.mul_(8)
            ffn.set_reference("scale", ffn.config.reference["scale"] / 8)
    after = evaluate_student(student, llama, ids)
    for one, other in zip(after["layers"], before["layers"]):
        assert {n: one[n] for n in LAYER} == pytest.approx({n: other[n] for n in LAYER}, rel=1e-4)


# the metrics


def test_metrics_are_evaluate_metrics():
    import evaluate

    fidelity, readable = Fidelity(keep_in_memory=True), Readability(keep_in_memory=True)
    assert isinstance(fidelity, evaluate.Metric) and isinstance(readable, evaluate.Metric)
    for nll in (1.0, 2.0):  # token by token, as evaluate allows
        fidelity.add(
            teacher_nll=nll, student_nll=nll + 0.5, ablated_nll=nll + 2, kl=nll / 10, agrees=nll < 2
        )
    found = fidelity.compute()
    assert found["tokens"] == 2
    assert found["teacher"]["cross_entropy"] == 1.5 and found["student"]["cross_entropy"] == 2
    assert found["delta_cross_entropy"] == 0.5 and found["loss_recovered"] == 0.75
    assert found["kl"] == pytest.approx(0.15) and found["top1_agreement"] == 0.5
    columns = {name: [1.0, 3.0] for name in Readability.FIGURES}
    means = readable.compute(**columns, teacher_write_mass=[1.0, 7.0])
    assert means == {
        **{name: 2.0 for name in Readability.FIGURES if name != "write_mass"},
        "write_mass_ratio": 0.5,
    }


OFFLINE = """
import socket

def refuse(*arguments, **more):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.getaddrinfo = refuse
from hf_kernel_ffn.text.packing import read_token_ids
from hf_kernel_ffn.evaluation.fidelity import Fidelity
from hf_kernel_ffn.evaluation.readability import Readability

fidelity = Fidelity().compute(
    teacher_nll=[1.0], student_nll=[2.0], ablated_nll=[3.0], kl=[0.5], agrees=[True]
)
assert fidelity["loss_recovered"] == 0.5, fidelity
readable = Readability().compute(**{name: [2.0] for name in Readability.FIGURES}, teacher_write_mass=[4.0])
assert readable["write_mass_ratio"] == 0.5, readable
"""


def test_metrics_need_no_network_and_no_cache(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment.update(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"), HOME=str(tmp_path))
    root = RECIPES.parent
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_figures_of_a_trained_teacher(tokenizer):
    """The untouched Llama reads as measured: every unit at work, and far from coherent."""
    teacher = AutoModelForCausalLM.from_pretrained(
        RECIPES / "teachers" / "llama", dtype=torch.float32
    )
    text = read_token_ids(tokenizer, [str(RECIPES / "text" / "books-test.txt")], 128, 1024)
    student, _ = convert(teacher, KernelFFNConfig(), layers="1", calibration_ids=text[:4])
    report = evaluate_student(student, teacher, text[4:])
    assert 3 < report["teacher"]["cross_entropy"] < 5
    assert abs(report["delta_cross_entropy"]) < 0.1 < report["loss_recovered"]
    [layer] = report["layers"]
    assert layer["teacher"]["active_prototypes"] == 512
    assert 50 < layer["teacher"]["effective_prototypes"] < 300
    assert layer["teacher"]["coherence"] < 0.3
