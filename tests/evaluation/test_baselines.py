"""The controls: the teacher's own FFN as a readout, whole and truncated, and transcoders."""

import sys

import pytest
import torch

from hf_kernel_ffn import InputError, evaluate_student
from hf_kernel_ffn.conversion.sampling import read_ffn_inputs
from hf_kernel_ffn.distillation import Recipe
from hf_kernel_ffn.distillation.trainer import train
from hf_kernel_ffn.evaluation.baselines import (
    TeacherFFN,
    Transcoder,
    teacher_as_student,
    transcoder_student,
)
from hf_kernel_ffn.families.lookup import find_ffn_paths
from hf_kernel_ffn.families.registry import get_architecture_of_model
from hf_kernel_ffn.families.weights import read_ffn_weights

TOP_K = 7


def stock_layer(teacher):
    """The middle FFN of ``teacher``, and its weights."""
    architecture = get_architecture_of_model(teacher)
    path = find_ffn_paths(teacher, architecture)[1]
    ffn = teacher.base_model.get_submodule(path)
    return ffn, read_ffn_weights(ffn, architecture, teacher.config, path)


def inputs(*shape):
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(3))


def truth(weights, x):
    """Coefficients of the whole FFN, and how loud each contribution is."""
    coefficients = weights.coefficients(x)
    return coefficients, coefficients.abs() * weights.down.norm(dim=-1)


@torch.no_grad()
def test_whole_it_is_the_teachers_function(teacher):
    stock, weights = stock_layer(teacher)
    x = inputs(4, 10)
    torch.testing.assert_close(TeacherFFN(weights)(x), stock(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_truncated_it_keeps_the_loudest_contributions(teacher):
    _, weights = stock_layer(teacher)
    x = inputs(4, 10)
    found = TeacherFFN(weights, "top-k", TOP_K).coefficients(x)
    coefficients, loudness = truth(weights, x)
    order = loudness.argsort(-1, descending=True)
    expected = torch.zeros_like(coefficients).scatter(
        -1, order[..., :TOP_K], coefficients.gather(-1, order[..., :TOP_K])
    )
    assert ((found != 0).sum(-1) == TOP_K).all()
    torch.testing.assert_close(found, expected)
    by_size = coefficients.abs().topk(TOP_K).indices.sort(-1).values
    assert not torch.equal(
        by_size, order[..., :TOP_K].sort(-1).values
    )  # the lengths of the columns decide too


@torch.no_grad()
def test_a_threshold_keeps_the_loudest_of_all_tokens(teacher):
    _, weights = stock_layer(teacher)
    x = inputs(4, 10)
    ffn = TeacherFFN(weights, "threshold", TOP_K)
    ffn.fit_threshold(x)
    ffn.threshold_log_ratio.sub_(1e-4)  # between two contributions, not at one
    coefficients, loudness = truth(weights, x)
    least = loudness.flatten().topk(TOP_K * 40).values[-1]
    torch.testing.assert_close(ffn.coefficients(x), coefficients * (loudness >= least))
    assert (ffn.coefficients(x) != 0).sum() == TOP_K * 40
    assert (ffn.coefficients(x) != 0).sum(
        -1
    ).unique().numel() > 3  # more for a token that needs more


@torch.no_grad()
def test_the_rate_is_the_share_of_the_way(llama):
    ffn = TeacherFFN(stock_layer(llama)[1], "threshold", TOP_K)
    ffn.fit_threshold(inputs(40))
    before = ffn.threshold_log_ratio.clone()
    ffn.fit_threshold(3 * inputs(40), 0.25)
    quarter = ffn.threshold_log_ratio - before
    ffn.fit_threshold(3 * inputs(40))
    assert quarter.item() > 0.1
    torch.testing.assert_close(4 * quarter, ffn.threshold_log_ratio - before)


@torch.no_grad()
@pytest.mark.parametrize(
    "simplex, top_k", [("softmax", None), ("top-k", TOP_K), ("threshold", TOP_K)]
)
def test_the_record_of_a_teachers_ffn_sums_to_its_output(teacher, simplex, top_k):
    ffn, x = TeacherFFN(stock_layer(teacher)[1], simplex, top_k), inputs(4, 10)
    ffn.fit_threshold(x) if simplex == "threshold" else None
    record = ffn.readout(x)
    torch.testing.assert_close(record.output(), ffn(x))
    assert (
        record.coefficients.shape == (4, 10, 48)
        and len(record.names) == len(record.dictionary) == 48
    )
    assert top_k or (record.coefficients < 0).any()  # signed


@torch.no_grad()
def test_a_teacher_as_student_has_ffns_of_its_own(teacher, ids):
    student = teacher_as_student(teacher, ids)
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-3, atol=1e-3)
    theirs = {p.untyped_storage().data_ptr() for p in teacher.parameters()}
    own = [p for ffn in student.kernel_ffns().values() for p in ffn.parameters()]
    assert len(student.kernel_ffns()) == 3 and own
    assert not [p for p in own if p.untyped_storage().data_ptr() in theirs]
    inside = {id(p) for p in own}
    assert all(
        p.untyped_storage().data_ptr() in theirs
        for p in student.parameters()
        if id(p) not in inside
    )


@torch.no_grad()
def test_thresholds_are_fitted_on_the_text(teacher, ids):
    student = teacher_as_student(teacher, ids, "threshold", TOP_K)
    for path, ffn in student.kernel_ffns().items():
        x = torch.cat(list(read_ffn_inputs(teacher, path, ids)))
        active = (ffn.coefficients(x) != 0).sum(-1).float().mean()
        assert active.item() == pytest.approx(TOP_K, abs=2 / len(x))


def test_the_teachers_own_ffn_leaves_nothing_unexplained(teacher, ids):
    whole = evaluate_student(teacher_as_student(teacher, ids), teacher, ids)
    assert abs(whole["kl"]) < 1e-5 and whole["top1_agreement"] == 1
    for layer in whole["layers"]:
        assert layer["fvu"] < 1e-6
        for name, value in layer["teacher"].items():
            assert layer[name] == pytest.approx(value, rel=1e-3, abs=1e-5)
    cut = evaluate_student(teacher_as_student(teacher, ids, "top-k", TOP_K), teacher, ids)
    assert cut["kl"] > 1e-3
    for layer in cut["layers"]:
        assert layer["active_prototypes"] == TOP_K and 0.01 < layer["fvu"] < 1
        assert layer["write_mass_ratio"] < 1


@pytest.fixture
def transcoder(llama):
    """A transcoder of 60 latents for a tiny FFN, its decoder and skip connection no longer zero."""
    pytest.importorskip("sparsify")

    def make(skip):
        x = inputs(40)
        with torch.no_grad():
            torch.manual_seed(0)
            found = Transcoder(stock_layer(llama)[0](x), 60, TOP_K, skip)
            found.coder.W_dec.normal_()
            if skip:
                found.coder.W_skip.normal_()
        return found

    return make


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True])
def test_the_record_of_a_transcoder_sums_to_its_output(transcoder, skip):
    ffn, x = transcoder(skip), inputs(4, 10)
    record = ffn.readout(x)
    torch.testing.assert_close(record.output(), ffn(x), rtol=1e-4, atol=1e-4)
    assert record.dictionary.shape == (60, 32) and len(record.names) == 60
    latents = (x @ ffn.coder.encoder.weight.T + ffn.coder.encoder.bias).relu()
    kept, places = latents.topk(TOP_K)
    torch.testing.assert_close(
        record.coefficients, torch.zeros_like(latents).scatter(-1, places, kept)
    )
    active = (record.coefficients != 0).sum(-1)
    assert active.max() == TOP_K
    skipped = x @ ffn.coder.W_skip.T if skip else 0
    torch.testing.assert_close(
        ffn(x),
        record.coefficients @ ffn.coder.W_dec + ffn.coder.b_dec + skipped,
        rtol=1e-4,
        atol=1e-4,
    )


@torch.no_grad()
def test_a_transcoder_may_keep_more_for_a_while(transcoder):
    ffn, x = transcoder(False), inputs(40)
    for top_k, kept in ((20, 20), (10**6, 60), (TOP_K, TOP_K)):  # no more than there are
        ffn.top_k = top_k
        latents = (x @ ffn.coder.encoder.weight.T + ffn.coder.encoder.bias).relu()
        assert ffn.top_k == kept
        assert torch.equal(
            (ffn.readout(x).coefficients != 0).sum(-1), (latents > 0).sum(-1).clamp_max(kept)
        )


@pytest.mark.parametrize("family, skip", [("llama", False), ("mistral", True), ("gpt2", True)])
def test_a_transcoder_starts_from_the_mean_output(request, ids, family, skip):
    pytest.importorskip("sparsify")
    teacher = request.getfixturevalue(family)
    layers = evaluate_student(transcoder_student(teacher, ids, 60, TOP_K, skip), teacher, ids)[
        "layers"
    ]
    assert len(layers) == 3
    for layer in layers:
        assert layer["fvu"] == pytest.approx(1, abs=1e-4)  # it writes nothing yet, beside the mean
        assert 0 < layer["active_prototypes"] <= TOP_K and layer["write_mass_ratio"] == 0


def test_the_seed_draws_a_transcoder(llama, ids):
    pytest.importorskip("sparsify")
    one, same, other = (
        transcoder_student(llama, ids, 60, TOP_K, False, seed).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", ["teacher", "transcoder"])
def test_the_stages_train_a_control(make_teacher, tokenizer, ids, text_file, tmp_path, kind):
    teacher = make_teacher("llama", vocab_size=4096)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    if kind == "teacher":
        student = teacher_as_student(teacher, ids, "threshold", 2)
    else:
        pytest.importorskip("sparsify")
        student = transcoder_student(teacher, ids, 60, TOP_K, True)
    stage = {"name": "layer-wise", "tokens": 60 * 128, "learning_rate": 0.01, "batch_size": 4}
    data = {"train": str(text_file), "sequence_length": 32, "shuffle_buffer": 16}
    start = evaluate_student(student, teacher, ids)
    train(
        Recipe(teacher="", data=data, stages=[stage], output_dir=str(tmp_path)),
        tokenizer,
        teacher,
        student,
    )
    end = evaluate_student(student, teacher, ids)
    for earlier, later in zip(start["layers"], end["layers"]):
        assert later["fvu"] < 0.97 * earlier["fvu"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_a_transcoder_without_its_package_says_what_to_install(monkeypatch, llama, ids):
    monkeypatch.setitem(sys.modules, "sparsify", None)
    with pytest.raises(InputError, match="sparsify package: pip install"):
        transcoder_student(llama, ids, 60, TOP_K, False)
