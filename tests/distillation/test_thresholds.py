"""Sparse readouts: thresholds that are fitted and followed, a price on write mass."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from training_runs import LAYER_WISE, LOGITS, STEPS, assert_same_files, interrupt, load, run

from hf_kernel_ffn import KernelFFN, KernelFFNConfig, convert, evaluate_student
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig
from hf_kernel_ffn.conversion.sampling import read_ffn_inputs
from hf_kernel_ffn.distillation import Recipe
from hf_kernel_ffn.distillation.objectives import OBJECTIVES
from hf_kernel_ffn.distillation.recipe import Stage
from hf_kernel_ffn.distillation.thresholds import Watch
from hf_kernel_ffn.distillation.trainer import train
from hf_kernel_ffn.families.registry import get_architecture_of_model
from hf_kernel_ffn.families.weights import read_ffn_weights
from hf_kernel_ffn.text.packing import read_token_ids

TOP_K = 6
SPARSE = {"simplex": "threshold", "top_k": TOP_K}
KINDS = [
    {},
    {"temperature": 0.6},
    {"intensity": "none"},
    {"intensity": "gate"},
    {"values": "gated"},
    {"kernel": "gaussian", "intensity": "none"},
    {"kernel": "exponential", "intensity": "gate"},
    {"kernel": "exponential-yat", "intensity": "none"},
]
kind = pytest.mark.parametrize(
    "settings", KINDS, ids=lambda s: "-".join(map(str, s.values())) or "default"
)


def make_layer(top_k=TOP_K, **settings):
    """A layer of 40 prototypes with random weights; by half-yat half of them fire at a time."""
    reference = {
        "epsilon": 0.7,
        "bandwidth": 2.0,
        "rate": 0.5,
        "scale": 1.3,
        "temperature": 0.8,
        "threshold": 0.02,
    }
    torch.manual_seed(0)
    ffn = KernelFFN(
        LayerConfig(KernelFFNConfig(simplex="threshold", top_k=top_k, **settings), 8, 40, reference)
    )
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.normal_(std=0.5)
    return ffn.eval()


def inputs(count=50, seed=1):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def loudness(ffn, x):
    """(tokens, prototypes) what decides: κ, or |κ u·x| with gated values."""
    kernel = ffn.kernel.value(*ffn.scores(x), **ffn.kernel_parameters())
    return kernel if ffn.config.settings.values == "fixed" else kernel * ffn.value_proj(x).abs()


@torch.no_grad()
def active(ffn, x):
    """(tokens,) how many prototypes take part."""
    return (ffn.coefficients(x) != 0).sum(-1)


def layers_and_inputs(student, reader, ids):
    """For each layer of ``student``: path, FFN and its inputs (tokens, hidden_size) when ``reader``
    reads ``ids``."""
    return [
        (path, ffn, torch.cat(list(read_ffn_inputs(reader, path, ids))))
        for path, ffn in student.kernel_ffns().items()
    ]


# thresholds


@kind
@pytest.mark.parametrize("top_k", [1, 5, 15])
def test_a_fitted_threshold_keeps_top_k_on_average(settings, top_k):
    ffn, x = make_layer(top_k, **settings), inputs()
    ffn.fit_threshold(x)
    counts = active(ffn, x)
    assert abs(counts.sum().item() - top_k * 50) <= 1
    assert counts.unique().numel() > 2  # more for a token that needs more


@kind
def test_below_the_threshold_coefficients_are_zero(settings):
    ffn, x = make_layer(**settings), inputs()
    ffn.fit_threshold(x)
    ffn.threshold_log_ratio.sub_(1e-4)  # between two values of the kernel, not at one
    passes = loudness(ffn, x) >= ffn.threshold()
    record = ffn.readout(x)
    assert torch.equal(record.coefficients != 0, passes) and torch.equal(record.shares > 0, passes)
    torch.testing.assert_close(ffn.coefficients(x), record.coefficients)
    torch.testing.assert_close(record.output(), ffn(x))
    if not settings:  # nothing else has changed
        torch.testing.assert_close(
            record.coefficients, loudness(ffn, x) * passes * ffn.positive("scale")
        )


def test_the_rate_is_the_share_of_the_way():
    ffn, x = make_layer(), inputs()
    ffn.fit_threshold(x)
    ffn.set_top_k(3 * TOP_K)
    before, whole = ffn.threshold().log(), copy.deepcopy(ffn)
    whole.fit_threshold(x)
    ffn.fit_threshold(x, 0.25)
    way = (whole.threshold().log() - before).item()
    assert abs(way) > 0.5
    assert (ffn.threshold().log() - before).item() == pytest.approx(0.25 * way, rel=1e-4)


def test_the_top_k_of_the_moment_is_what_is_fitted():
    ffn, x = make_layer(), inputs()
    ffn.set_top_k(12)
    ffn.fit_threshold(x)
    assert abs(active(ffn, x).sum().item() - 12 * 50) <= 1


@kind
def test_where_nothing_passes_the_output_bias_is_written(settings):
    ffn, x = make_layer(**settings), inputs().requires_grad_()
    ffn.fit_threshold(x)
    ffn.threshold_log_ratio.add_(50)
    y, record = ffn(x), ffn.readout(x)
    assert torch.equal(y, ffn.output_prototypes.bias.expand_as(y))
    assert not record.coefficients.any() and not record.shares.any()
    y.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in [x, *ffn.parameters()])


def test_a_silent_layer_can_be_fitted_and_wakes_again():
    ffn, x = make_layer(), inputs()
    bias = ffn.input_prototypes.bias.detach().clone()
    with torch.no_grad():
        ffn.input_prototypes.bias.fill_(-1e3)
    for _ in range(3):
        ffn.fit_threshold(x)
        assert ffn.threshold() > 0 and not active(ffn, x).any()
    with torch.no_grad():
        ffn.input_prototypes.bias.copy_(bias)
    ffn.fit_threshold(x)
    assert abs(active(ffn, x).sum().item() - TOP_K * 50) <= 1


def test_what_does_not_fire_cannot_pass():
    ffn, x = make_layer(top_k=39), inputs()
    ffn.fit_threshold(x)
    fires, passes = loudness(ffn, x) > 0, ffn.coefficients(x) != 0
    assert not (passes & ~fires).any() and (fires & ~passes).sum() <= 1  # to the rounding
    assert fires.float().mean() < 0.7


def test_conversion_fits_the_threshold_on_its_text(teacher, ids):
    student, _ = convert(
        teacher, KernelFFNConfig(**SPARSE), calibration_ids=ids, calibration_tokens=256
    )
    for _, ffn, x in layers_and_inputs(student, student, ids):
        assert active(ffn, x).float().mean().item() == pytest.approx(TOP_K, abs=0.05)
        assert (
            ffn.threshold_log_ratio == 0
        )  # in the config, exactly, and not in a weight that may be rounded
        assert ffn.threshold().item() == pytest.approx(ffn.config.reference["threshold"], rel=1e-6)


def test_a_threshold_is_saved_and_loaded(llama, ids, tmp_path):
    student, _ = convert(
        llama, KernelFFNConfig(**SPARSE), calibration_ids=ids, calibration_tokens=256
    )
    for _, ffn, x in layers_and_inputs(student, llama, ids):
        ffn.fit_threshold(2 * x)
    student.save_pretrained(tmp_path)
    own = type(student).from_pretrained(tmp_path)
    for one, other in zip(student.kernel_ffns().values(), own.kernel_ffns().values()):
        assert one.threshold_log_ratio != 0 and torch.equal(
            one.threshold_log_ratio, other.threshold_log_ratio
        )
        assert one.config.reference["threshold"] == other.config.reference["threshold"] != 1
        assert (
            torch.equal(one.threshold(), other.threshold()) and other.config.settings.top_k == TOP_K
        )
    with torch.no_grad():
        assert torch.equal(own(ids).logits, student(ids).logits)
        assert torch.equal(
            load(tmp_path)(ids).logits, student(ids).logits
        )  # by the folder's own code


def test_half_precision_keeps_as_many(make_teacher, ids):
    teacher = make_teacher("llama").bfloat16()
    student, _ = convert(
        teacher, KernelFFNConfig(**SPARSE), calibration_ids=ids, calibration_tokens=256
    )
    for _, ffn, x in layers_and_inputs(student, student, ids):
        assert x.dtype == torch.bfloat16 and ffn.threshold().dtype == torch.float32
        assert active(ffn, x).float().mean().item() == pytest.approx(TOP_K, rel=0.05)
        ffn.fit_threshold(1.5 * x)
        assert ffn.threshold_log_ratio.dtype == torch.bfloat16 and ffn.threshold_log_ratio != 0
        assert active(ffn, 1.5 * x).float().mean().item() == pytest.approx(TOP_K, rel=0.05)


# what a stage does


def stage(**changes):
    return Stage(**{**LAYER_WISE, **changes})


def watching(ffn, **changes):
    return Watch({"a": ffn}, stage(**changes))


@pytest.mark.parametrize("wrong", [{"write_mass": -0.1}, {"kl": -1}], ids=str)
def test_settings_of_a_stage_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        stage(**wrong)


def test_an_exception_leaves_the_layers_as_they_were():
    ffn = make_layer()
    with pytest.raises(KeyError), watching(ffn, write_mass=1.0):
        assert ffn._forward_pre_hooks and ffn.output_prototypes._forward_hooks
        raise KeyError
    assert not ffn._forward_pre_hooks and not ffn.output_prototypes._forward_hooks


def test_thresholds_follow_what_was_seen():
    ffn, x, y, given = make_layer(), inputs(60), 2 * inputs(60, seed=2), []
    expected = copy.deepcopy(ffn)
    expected.fit_threshold(x)
    with watching(ffn) as watch:
        ffn(x.view(3, 20, 8))
        watch.after(0, given.append)  # the first step's tokens decide alone
        assert torch.equal(ffn.threshold_log_ratio, expected.threshold_log_ratio)
        ffn(y)
        watch.after(1, given.append)  # a mean of two
        expected.fit_threshold(y, 0.5)
        torch.testing.assert_close(ffn.threshold_log_ratio, expected.threshold_log_ratio)
        ffn(x)
        watch.after(10_000, given.append)  # slowly
        moved = abs((ffn.threshold_log_ratio - expected.threshold_log_ratio).item())
        expected.fit_threshold(x)
        assert (
            0 < moved < 0.2 * abs((ffn.threshold_log_ratio - expected.threshold_log_ratio).item())
        )
    assert len(given) == 3 and all(
        tensor is ffn.threshold_log_ratio for tensor in given
    )  # to be averaged over processes


@kind
def test_the_price_is_the_mass_written_over_the_length_of_its_sum(settings):
    ffn, x = make_layer(**settings), inputs()
    ffn.fit_threshold(x)
    with watching(ffn, write_mass=0.3) as watch:
        y = ffn(x.view(5, 10, 8))
        price = watch.price("a")
    price.backward()
    gradients = {name: p.grad.clone() for name, p in ffn.named_parameters() if p.grad is not None}
    ffn.zero_grad()
    mass = (
        sum(
            abs(c) * v.norm()
            for row in ffn.coefficients(x)
            for c, v in zip(row, ffn.output_prototypes.weight.T)
        )
        / 50
    )
    flat = y.detach().reshape(50, 8)
    expected = 0.3 * mass / (flat - flat.mean(0)).norm(dim=-1).mean()
    torch.testing.assert_close(price, expected)
    expected.backward()  # the length is no way to lower it
    assert {"input_prototypes.weight", "output_prototypes.weight"} <= gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, dict(ffn.named_parameters())[name].grad, rtol=1e-3, atol=1e-5
        )


def test_nothing_is_charged_where_nothing_is_asked():
    ffn = make_layer()
    with watching(ffn) as watch:
        ffn(inputs())
        assert watch.price("a") == 0 and not ffn.output_prototypes._forward_hooks


@pytest.fixture(scope="module")
def pair(make_teacher, tokenizer, text_file):
    """A tiny Llama with the shipped vocabulary, and makers of a sparse student and of a recipe in
    memory for it."""
    teacher = make_teacher("llama", vocab_size=4096)
    ids = read_token_ids(tokenizer, [str(text_file)], 32, 1024, spread=True)

    def student(**settings):
        settings = KernelFFNConfig(**{**SPARSE, **settings})
        return convert(teacher, settings, calibration_ids=ids, calibration_tokens=1024)[0]

    def recipe(*stages):
        data = {"train": str(text_file), "sequence_length": 32, "shuffle_buffer": 16}
        return Recipe(teacher="", data=data, stages=list(stages), output_dir="unused")

    return teacher, student, recipe


@pytest.fixture(scope="module")
def trained(pair, tokenizer, text_file):
    """A student's layers and their inputs on text read elsewhere, after sixty steps with or without
    a price."""
    teacher, student, recipe = pair
    made = {}

    def get(write_mass):
        if write_mass not in made:
            made[write_mass] = student()
            longer = {**LAYER_WISE, "tokens": 60 * 128, "batch_size": 4, "learning_rate": 0.02}
            longer |= {"write_mass": write_mass}
            train(recipe(longer), tokenizer, teacher, made[write_mass])
        ids = read_token_ids(tokenizer, [str(text_file)], 64, 2048)
        return layers_and_inputs(made[write_mass], teacher, ids)

    return get


def test_after_training_top_k_prototypes_are_active(trained, pair):
    before = pair[1]().state_dict()
    for path, ffn, x in trained(0.0):
        assert active(ffn, x).float().mean().item() == pytest.approx(TOP_K, rel=0.15)
        stale = copy.deepcopy(ffn)
        stale.threshold_log_ratio.copy_(before[f"model.{path}.threshold_log_ratio"])
        assert active(stale, x).float().mean().item() != pytest.approx(
            TOP_K, rel=0.15
        )  # so they had to follow


@torch.no_grad()
def test_a_price_lowers_write_mass(trained):
    def relative_mass(ffn, x):
        y = ffn(x)
        mass = ffn.coefficients(x).abs() @ ffn.output_prototypes.weight.norm(dim=0)
        return (mass.mean() / (y - y.mean(0)).norm(dim=-1).mean()).item()

    for (_, free, x), (_, charged, _) in zip(trained(0.0), trained(0.3)):
        assert relative_mass(charged, x) < 0.9 * relative_mass(free, x)


@pytest.fixture
def watched(monkeypatch):
    """Have every objective call ``look(number, ffns)`` before it runs."""

    def through(look):
        count = iter(range(10**6))
        for name, objective in list(OBJECTIVES.items()):

            def wrapped(step, objective=objective):
                look(next(count), step.ffns)
                return objective(step)

            monkeypatch.setitem(OBJECTIVES, name, wrapped)

    yield through


def test_training_in_memory_leaves_the_rest_alone(pair, tokenizer):
    teacher, make, recipe = pair
    student = make()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    mine = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    train(recipe(LAYER_WISE, {**LOGITS, "write_mass": 0.01}), tokenizer, teacher, student)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (".mlp." in name) != torch.equal(parameter, mine[name]), (
            name
        )
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in (*teacher.modules(), *student.modules())
    )


@pytest.fixture(scope="module")
def recipe(teacher_folder, text_file):
    """From files to files, with everything that a sparse stage has."""

    def make(out, **changes):
        content = {
            "teacher": str(teacher_folder("llama")),
            "kernel_ffn": SPARSE,
            "data": {"train": str(text_file), "sequence_length": 32, "shuffle_buffer": 16},
            "stages": [
                {**LAYER_WISE, "write_mass": 0.02},
                {**LOGITS, "write_mass": 0.01},
            ],
            "output_dir": str(out),
            "calibration_tokens": 256,
            "save_every_tokens": 128,  # two steps
        }
        return Recipe(**{**content, **changes})

    return make


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    return run(recipe(tmp_path_factory.mktemp("sparse") / "out"))


@pytest.mark.parametrize("at", [3, STEPS, STEPS + 3])
def test_a_resumed_sparse_run_ends_bit_equal(recipe, finished, monkeypatch, tmp_path, at):
    same = recipe(tmp_path / "out")
    interrupt(monkeypatch, same, at)
    run(same, resume=True)
    assert_same_files(tmp_path / "out", finished)


def test_a_finished_sparse_student_has_its_thresholds(finished):
    for ffn in load(finished).kernel_ffns().values():
        assert math.isfinite(ffn.threshold_log_ratio) and ffn.threshold_log_ratio != 0
        assert ffn.config.settings.top_k == TOP_K


def test_gradient_checkpointing_changes_nothing(recipe, tmp_path):
    logits = {**LOGITS, "write_mass": 0.1}
    outs = [
        run(recipe(tmp_path / str(on), stages=[logits], gradient_checkpointing=on))
        for on in (False, True)
    ]
    tensors, others = (load_file(out / "model.safetensors") for out in outs)
    assert all(
        torch.allclose(tensors[name], others[name], rtol=1e-3, atol=1e-5) for name in tensors
    )


# what never fires


@torch.no_grad()
def test_dead_prototypes_fire_on_no_token(llama, ids):
    teacher = copy.deepcopy(llama)
    teacher.model.layers[1].mlp.up_proj.weight[:4] = 0
    student, _ = convert(
        teacher,
        KernelFFNConfig(simplex="top-k", top_k=2),
        calibration_ids=ids,
        calibration_tokens=256,
    )
    ffns = student.kernel_ffns()
    ffns["layers.1.mlp"].input_prototypes.bias[:5] = -1e3
    layers = {
        layer["path"]: layer
        for layer in evaluate_student(student, teacher, ids, batch_tokens=64)["layers"]
    }
    for path, ffn, x in layers_and_inputs(student, teacher, ids):
        never = ~(ffn.coefficients(x) != 0).any(0)
        assert layers[path]["dead_prototypes"] == never.sum()
        weights = read_ffn_weights(
            teacher.base_model.get_submodule(path),
            get_architecture_of_model(teacher),
            teacher.config,
            path,
        )
        assert (
            layers[path]["teacher"]["dead_prototypes"]
            == (~(weights.coefficients(x) != 0).any(0)).sum()
        )
    assert layers["layers.1.mlp"]["dead_prototypes"] >= 5
    assert (
        layers["layers.1.mlp"]["teacher"]["dead_prototypes"] == 4
        and not layers["layers.0.mlp"]["teacher"]["dead_prototypes"]
    )
