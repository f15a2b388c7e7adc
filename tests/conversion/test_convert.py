"""Conversion and restoration in memory: what is shared, what is left alone, what is refused."""

import copy

import pytest
import tiny_families
import torch
import transformers
from torch import nn

from hf_kernel_ffn import InputError, KernelFFN, KernelFFNConfig, convert, restore
from hf_kernel_ffn.checkpoint_code.kernels import KERNELS, Kernel
from hf_kernel_ffn.conversion import convert as surgery
from hf_kernel_ffn.families.lookup import find_ffn_paths
from hf_kernel_ffn.families.registry import get_architecture_of_model
from hf_kernel_ffn.families.weights import read_ffn_weights, read_teacher_readout

OWN_TOKENS = {"calibration_tokens": 256}


@pytest.fixture(scope="module")
def run(ids):
    """Convert with a given text, which spares the teacher's sampling."""
    return lambda teacher, config=None, *args, **kwargs: convert(
        teacher,
        config or KernelFFNConfig(),
        *args,
        calibration_ids=ids,
        calibration_tokens=256,
        **kwargs,
    )


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def ffns(model):
    return [module for module in model.modules() if isinstance(module, KernelFFN)]


def test_teacher_stays_as_it_is(teacher, ids):
    modules = [type(module) for module in teacher.modules()]
    before, out, config = states(teacher), logits(teacher, ids), teacher.config.to_dict()
    teacher.train()
    try:
        student, _ = convert(teacher, KernelFFNConfig(), **OWN_TOKENS)
        assert teacher.training and not student.training
    finally:
        teacher.eval()
    assert_same(states(teacher), before)
    assert torch.equal(logits(teacher, ids), out)
    assert [type(module) for module in teacher.modules()] == modules
    assert teacher.config.to_dict() == config
    assert all(not module._forward_pre_hooks for module in teacher.modules())


def test_training_flags_of_the_teachers_parts_stay(llama):
    frozen = llama.model.layers[1]
    llama.train()
    frozen.eval()
    before = [module.training for module in llama.modules()]
    try:
        convert(llama, KernelFFNConfig(), **OWN_TOKENS)
        assert [module.training for module in llama.modules()] == before
    finally:
        llama.eval()


def attributes(model):
    """What stands at every path of a model that is neither a module nor a tensor."""
    return {
        path: {name: value for name, value in vars(module).items() if not name.startswith("_")}
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("family", ["llama", "bart", "mixtral"])
def test_an_installation_that_fails_half_way_is_undone(family, ids, monkeypatch):
    """Of one FFN, of an FFN that absorbs a number, and of several experts in one block."""
    teacher = tiny_families.tiny(family, "AutoModelForCausalLM")
    modules = list(teacher.named_modules())
    before = attributes(teacher)
    done = []

    def install(base, path, ffn):
        done.append(path)
        surgery_install(base, path, ffn)
        if len(done) == 2:
            raise RuntimeError("half-way")

    surgery_install = surgery.install_ffn
    monkeypatch.setattr(surgery, "install_ffn", install)
    with pytest.raises(RuntimeError, match="half-way"):
        convert(teacher, KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256)
    after = list(teacher.named_modules())
    assert [path for path, _ in after] == [path for path, _ in modules]
    assert all(one is other for (_, one), (_, other) in zip(after, modules, strict=True))
    assert attributes(teacher) == before


def test_a_bar_is_shown_from_the_first_text_on(llama, ids, capsys):
    convert(llama, KernelFFNConfig(), **OWN_TOKENS, progress=True)
    shown = capsys.readouterr().out
    assert [
        label for label in ("checking", "writing own text", "converting") if label in shown
    ] == [
        "checking",
        "writing own text",
        "converting",
    ]
    convert(llama, KernelFFNConfig(), **OWN_TOKENS)
    assert capsys.readouterr().out == ""


def test_every_ffn_is_replaced_and_the_rest_is_the_teachers_own_memory(teacher, run, ids):
    student, report = run(teacher)
    converted = student.kernel_ffns()
    assert (
        list(converted)
        == list(report.layers)
        == find_ffn_paths(teacher, get_architecture_of_model(teacher))
    )
    assert len(ffns(student)) == 3
    mine = {n: p for n, p in student.named_parameters() if ".mlp." not in n}
    other = {n: p for n, p in teacher.named_parameters() if ".mlp." not in n}
    assert mine.keys() == other.keys()
    assert all(mine[n].data_ptr() == other[n].data_ptr() for n in mine)
    assert torch.isfinite(logits(student, ids)).all()
    assert not torch.equal(logits(student, ids), logits(teacher, ids))
    tied = teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied


def test_copy_separates_the_parameters(llama, run, ids):
    shared, _ = run(llama)
    student, _ = run(llama, copy=True)
    owned = {p.data_ptr() for p in llama.parameters()}
    assert not owned & {p.data_ptr() for p in student.parameters()}
    assert_same(states(student), states(shared))
    before = states(llama)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert_same(states(llama), before)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_restore_gives_the_teacher_back(teacher, run, ids):
    student, _ = run(teacher)
    stock = restore(student, teacher)
    assert type(stock) is type(teacher)
    assert torch.equal(logits(stock, ids), logits(teacher, ids))
    assert_same(states(stock), states(teacher))
    assert len(ffns(student)) == 3  # the student stays converted


def test_restore_keeps_what_the_student_learned_outside_its_ffns(gpt2, run):
    student, _ = run(gpt2, copy=True)
    with torch.no_grad():
        student.transformer.ln_f.bias.add_(1)
    stock = restore(student, gpt2)
    torch.testing.assert_close(stock.transformer.ln_f.bias, gpt2.transformer.ln_f.bias + 1)
    assert torch.equal(
        stock.transformer.h[0].mlp.c_fc.weight, gpt2.transformer.h[0].mlp.c_fc.weight
    )


def test_restore_refuses_what_does_not_belong_together(llama, gpt2, run, make_teacher):
    student, _ = run(llama, layers="0")
    with pytest.raises(InputError, match="not converted"):
        restore(llama, llama)
    with pytest.raises(InputError, match="'gpt2'.*'llama'"):
        restore(student, gpt2)
    with pytest.raises(InputError, match="differ in name or shape"):
        restore(student, make_teacher("llama", head="base"))


@pytest.mark.parametrize(
    "layers, chosen",
    [("1", [1]), ("0,2", [0, 2]), ("1-2", [1, 2]), ([2, 0], [0, 2]), (None, [0, 1, 2])],
)
def test_any_subset_of_layers(teacher, run, layers, chosen):
    student, report = run(teacher, layers=layers)
    paths = find_ffn_paths(teacher, get_architecture_of_model(teacher))
    assert list(student.kernel_ffns()) == list(report.layers) == [paths[i] for i in chosen]
    for i, path in enumerate(paths):
        mine, other = (model.base_model.get_submodule(path) for model in (student, teacher))
        assert type(mine) is (KernelFFN if i in chosen else type(other))
        if i not in chosen:
            assert [p.data_ptr() for p in mine.parameters()] == [
                p.data_ptr() for p in other.parameters()
            ]


def test_settings_per_layer(mistral, run):
    per_layer = {
        2: KernelFFNConfig(values="gated"),
        0: KernelFFNConfig(kernel="imq", simplex="top-k", intensity="gate", top_k=7),
    }
    student, _ = run(mistral, per_layer)
    found = {path: ffn.config.settings for path, ffn in student.kernel_ffns().items()}
    assert list(found) == ["layers.0.mlp", "layers.2.mlp"]
    assert (found["layers.0.mlp"].kernel, found["layers.0.mlp"].top_k) == ("imq", 7)
    assert found["layers.2.mlp"].values == "gated"
    with pytest.raises(InputError, match="leave layers out"):
        run(mistral, per_layer, layers="0")


@pytest.mark.parametrize("layers", ["0-3", "7", [3], "2-1", "-1", "", "a", "0,,1", [-1], "1.5"])
def test_layers_outside_the_model(llama, run, layers):
    with pytest.raises(InputError, match="found layers"):
        run(llama, layers=layers)
    with pytest.raises(InputError, match="found layers"):
        run(llama, {5: KernelFFNConfig()})


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"kernel": "cosine"}, "found kernel 'cosine', expected one of exponential"),
        ({"simplex": "softmaxx"}, "found simplex='softmaxx', expected one of softmax"),
        ({"intensity": "loud"}, "found intensity='loud'"),
        ({"init": "random"}, "found init='random'"),
        ({"values": "free"}, "found values='free'"),
        ({"kernel": ["yat"]}, "kernel"),
        ({"simplex": ["softmax"]}, "simplex"),
        ({"simplex": "top-k"}, "top_k=None"),
        ({"simplex": "top-k", "top_k": 0}, "top_k=0"),
        ({"simplex": "top-k", "top_k": True}, "top_k=True"),
        ({"simplex": "top-k", "top_k": 2.0}, "top_k=2.0"),
        ({"top_k": 3}, "top_k=3 with simplex 'softmax'"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"expansion": 0.5}, "expansion=0.5"),
        ({"expansion": 8.5}, "expansion=8.5"),
        ({"values": "gated", "init": "polarised"}, "gated values carry the sign already"),
    ],
    ids=str,
)
def test_refused_settings_say_why(settings, reason):
    with pytest.raises(ValueError, match=reason):
        KernelFFNConfig(**settings)


@pytest.mark.parametrize("settings", [{"values": "gated"}, {"init": "polarised"}], ids=str)
def test_gated_settings_need_a_gate(gpt2, run, settings):
    with pytest.raises(ValueError, match="without a gate"):
        run(gpt2, KernelFFNConfig(**settings))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.norm.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(llama, run, name, value):
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.get_parameter(name).view(-1)[0] = value
    with pytest.raises(InputError, match=f"NaN or infinite.*{name.removeprefix('model.')}"):
        run(broken)


class Overflowing(Kernel):
    """Infinite wherever a score is above a few."""

    def value(self, score, distance2, **parameters):
        return (1e38 * score.relu()).square()


@pytest.mark.parametrize("rows", ["free", "tied"])
def test_a_kernel_that_overflows_is_named_with_the_layer(llama, run, monkeypatch, rows):
    kernel = Overflowing("overflowing", nonnegative=True, positive_definite=False, uses_bias=True)
    monkeypatch.setitem(KERNELS, "overflowing", kernel)
    with pytest.raises(InputError, match=r"layers\.0\.mlp that is not finite.*'overflowing'"):
        run(llama, KernelFFNConfig(kernel="overflowing", rows=rows))


class ScaledFP8Linear(nn.Linear):
    """As transformers' FP8Linear: float8 weights that mean nothing without their scales."""


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(llama, run, dtype):
    quantised = copy.deepcopy(llama)
    linear = ScaledFP8Linear(32, 48, bias=False)
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    quantised.model.layers[1].mlp.gate_proj = linear
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.gate_proj.*unquantised"):
        run(quantised)


def test_a_quantised_model_is_refused_whatever_its_tensors_say(llama, run):
    quantised = copy.deepcopy(llama)
    quantised.config.quantization_config = {
        "quant_method": "torchao"
    }  # its tensors call themselves bfloat16
    quantised.hf_quantizer = object()
    with pytest.raises(InputError, match="unquantised"):
        run(quantised)


def test_unsupported_models_are_told_what_is_supported(run):
    config = transformers.CodeGenConfig(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, rotary_dim=4
    )
    with pytest.raises(InputError, match="'codegen'.*llama, mistral, gpt2.*register_architecture"):
        run(transformers.CodeGenForCausalLM(config))


def test_an_unsupported_head_is_told_what_is_supported(gpt2, run):
    with pytest.raises(InputError, match="GPT2DoubleHeadsModel.*GPT2LMHeadModel"):
        run(transformers.GPT2DoubleHeadsModel(gpt2.config).eval())


def test_converted_models_are_not_converted_again(teacher, run):
    student, _ = run(teacher, layers="0")
    with pytest.raises(InputError, match="converted already"):
        run(student, layers="1")


def test_same_teacher_and_seed_same_student(teacher):
    first, report = convert(teacher, KernelFFNConfig(), **OWN_TOKENS, seed=3)
    second, again = convert(teacher, KernelFFNConfig(), **OWN_TOKENS, seed=3)
    other, _ = convert(teacher, KernelFFNConfig(), **OWN_TOKENS, seed=4)
    assert_same(states(first), states(second))
    assert report.to_dict() == again.to_dict()
    assert report.calibration == "own tokens" and report.calibration_tokens == 256
    name = next(n for n in states(first) if "output_prototypes.weight" in n)
    assert not torch.equal(states(first)[name], states(other)[name])


@pytest.mark.parametrize("head", ["base", "classify"])
def test_other_heads_convert_without_text(make_teacher, head, ids):
    teacher = make_teacher("gpt2", head)
    student, report = convert(teacher, KernelFFNConfig(), calibration_tokens=128)
    assert type(student).__name__ == f"Kernel{type(teacher).__name__}"
    assert len(report.layers) == 3
    with torch.no_grad():
        assert torch.isfinite(student(ids)[0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_student_has_the_teachers_dtype(llama, run, ids, dtype):
    student, report = run(copy.deepcopy(llama).to(dtype))
    assert {p.dtype for p in student.parameters()} == {dtype}
    assert torch.isfinite(logits(student, ids)).all()
    assert all(0 <= figures["fvu"] < 1.5 for figures in report.layers.values())


def test_calibration_on_text_beats_the_mean_and_its_start(teacher, ids):
    _, report = convert(
        teacher, KernelFFNConfig(), calibration_ids=ids.repeat(4, 1), calibration_tokens=1024
    )
    for figures in report.layers.values():
        assert figures["fvu"] < min(1, figures["fvu_start"] + 1e-9)


@pytest.mark.parametrize("init", ["single", "polarised", "data-scale", "firing-means"])
def test_rows_come_from_the_rows_of_w_in(llama, run, ids, init):
    student, _ = run(llama, KernelFFNConfig(init=init), layers="1")
    [ffn] = ffns(student)
    gate, rows, units = (
        llama.model.layers[1].mlp.gate_proj.weight,
        ffn.input_prototypes.weight,
        ffn.units,
    )
    if init == "single":  # as long as the unit is loud
        torch.testing.assert_close(torch.cosine_similarity(rows, gate), torch.ones(48))
        assert torch.equal(units.abs(), torch.arange(1, 49))
    elif (
        init == "polarised"
    ):  # (g + ru)/2 and (g − ru)/2, as long as the unit is loud, written with opposite signs
        torch.testing.assert_close(
            torch.cosine_similarity(rows[:48] + rows[48:], gate), torch.ones(48)
        )
        assert torch.equal(units[:48], -units[48:])
    else:
        norms = []
        hook = llama.model.layers[1].mlp.register_forward_pre_hook(
            lambda module, args: norms.append(args[0].norm(dim=-1))
        )
        with torch.no_grad():
            llama(ids)
        hook.remove()
        torch.testing.assert_close(rows.norm(dim=-1), norms[0].square().mean().sqrt().expand(96))


@pytest.mark.parametrize("expansion, prototypes", [(None, 96), (1.5, 72), (2, 96), (4, 192)])
def test_polarised_prototype_counts(llama, run, expansion, prototypes):
    student, _ = run(llama, KernelFFNConfig(expansion=expansion), layers="1")
    [ffn] = ffns(student)
    assert ffn.input_prototypes.weight.shape == (prototypes, 32)
    assert len(set(ffn.units.tolist())) == min(
        prototypes, 96
    )  # every unit and sign, once in every pair
    if expansion == 1.5:
        matrices = ffn.input_prototypes.weight.numel() + ffn.output_prototypes.weight.numel()
        assert matrices == sum(p.numel() for p in llama.model.layers[1].mlp.parameters())


def test_a_teachers_own_record_sums_to_its_output(teacher):
    model = copy.deepcopy(teacher).double()
    architecture = get_architecture_of_model(model)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for path in find_ffn_paths(model, architecture):
        ffn = model.base_model.get_submodule(path)
        with torch.no_grad():
            record = read_teacher_readout(
                read_ffn_weights(ffn, architecture, model.config, path), x
            )
            torch.testing.assert_close(record.output(), ffn(x), rtol=1e-11, atol=1e-12)
        assert record.coefficients.shape == (2, 5, 48)
        assert record.dictionary.shape == (48, 32)
        assert (record.coefficients < 0).any()
        assert record.shares is None and record.intensity is None


def test_by_default_rows_are_tied_and_nothing_is_shared_with_the_teachers_ffns(teacher, ids):
    student, report = convert(teacher, calibration_ids=ids, calibration_tokens=256)
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    for path, ffn in student.kernel_ffns().items():
        assert ffn.config.settings.rows == "tied"
        assert not {parameter.data_ptr() for parameter in ffn.parameters()} & theirs
        assert report.layers[path]["fvu"] < 0.01
