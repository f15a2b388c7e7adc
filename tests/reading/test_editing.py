"""Edits do what they say, are undone bit by bit, and travel; support is a percentile."""

from dataclasses import replace

import pytest
import torch
from letters import Letters

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.reading import trace
from hf_kernel_ffn.reading.contexts import contexts
from hf_kernel_ffn.reading.editing import Addition, Edit, edited, effect
from hf_kernel_ffn.reading.model_parts import get_unembedding
from hf_kernel_ffn.reading.steering import addition, raise_token, raise_token_by_addition
from hf_kernel_ffn.reading.support import (
    Support,
    scrambled,
    separations,
    support_scores,
    text_scores,
)
from hf_kernel_ffn.storage.loading import load_student

KERNELS = ("half-yat", "yat", "exponential", "gaussian", "imq", "exponential-yat")


@pytest.fixture(scope="module", params=("llama", "gpt2", "mistral"))
def pair(request, make_teacher, ids):
    """A teacher and a sparse student of it."""
    teacher = make_teacher(request.param)
    student, _ = convert(
        teacher, KernelFFNConfig(simplex="threshold", top_k=12), calibration_ids=ids, copy=True
    )
    return teacher, student


@pytest.fixture(scope="module", params=("teacher", "student"))
def model(request, pair):
    return pair[request.param == "student"]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_edits_change_one_row_and_are_undone(model, ids):
    found = trace(model, Letters(), ids[0])
    path = list(found.ffn_inputs)[1]
    record, before = found.ffn(path), weights(model)
    new = torch.ones(32)
    for change, row in (
        (Edit(path, 7, scale=0), torch.zeros(32)),
        (Edit(path, 7, scale=-2), -2 * record.dictionary[7]),
        (Edit(path, 7, write=new), record.dictionary[7] + new),
        (Edit(path, 7, scale=0, write=new), new),
    ):
        expected = record.dictionary.clone()
        expected[7] = row
        with edited(model, change) as inside:
            now = trace(inside, Letters(), ids[0]).ffn(path)
            assert torch.allclose(now.dictionary, expected, atol=1e-6)
            assert torch.equal(
                now.coefficients, record.coefficients
            )  # of this layer: its input is as before
        after = weights(model)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_edits_are_undone_after_an_error(model, ids):
    before = weights(model)
    path = list(trace(model, Letters(), ids[0]).ffn_inputs)[0]
    with (
        pytest.raises(RuntimeError, match="inside"),
        edited(model, Edit(path, 1, scale=0), Edit(path, 2, scale=3)),
    ):
        raise RuntimeError("inside")
    with (
        pytest.raises(InputError, match="found prototype 999"),
        edited(model, Edit(path, 1, scale=0), Edit(path, 999)),
    ):
        pass
    with (
        pytest.raises(InputError, match="found no FFN 'nowhere'"),
        edited(model, Edit("nowhere", 1)),
    ):
        pass
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_new_prototype_writes_what_it_should_where_it_should(llama, ids, kernel):
    student, _ = convert(llama, KernelFFNConfig(kernel=kernel), calibration_ids=ids, copy=True)
    found = trace(student, Letters(), ids[0])
    path, write = (
        list(found.ffn_inputs)[1],
        torch.randn(32, generator=torch.Generator().manual_seed(1)),
    )
    before, prototypes = found.ffn(path).output(), found.ffn(path).coefficients.shape[1]
    added = addition(found, path, write, ids)
    with edited(student, added):
        now = trace(student, Letters(), ids[0])
        record = now.ffn(path)
        assert (
            record.coefficients.shape[1]
            == prototypes + 1
            == len(record.names)
            == len(set(record.names))
        )
        assert torch.allclose(
            record.output()[-1], before[-1] + write, atol=1e-3 * write.norm().item()
        )
        if (
            student.kernel_ffns()[path].kernel.uses_bias and kernel == "half-yat"
        ):  # one-sided: silent on ordinary text
            assert (record.coefficients[:-1, -1] == 0).float().mean() > 0.9
        if student.kernel_ffns()[path].kernel.uses_bias:
            assert added.bias < 0
    assert trace(student, Letters(), ids[0]).ffn(path).coefficients.shape[1] == prototypes
    assert student.config.kernel_ffn["layers"][path]["prototypes"] == prototypes


def test_what_cannot_be_added(pair, llama, ids):
    teacher, student = pair
    path = list(trace(student, Letters(), ids[0]).ffn_inputs)[0]
    rule = Addition(path, torch.ones(32), 0.0, torch.ones(32))
    with pytest.raises(InputError, match="a stock FFN's width is fixed"), edited(teacher, rule):
        pass
    with pytest.raises(InputError, match="expected a kernel readout: convert"):
        addition(trace(teacher, Letters(), ids[0]), path, torch.ones(32), ids)
    gated, _ = convert(llama, KernelFFNConfig(values="gated"), calibration_ids=ids)
    with (
        pytest.raises(InputError, match="with fixed values"),
        edited(gated, replace(rule, path="layers.0.mlp")),
    ):
        pass


def test_an_edited_checkpoint(pair, ids, tmp_path):
    _, student = pair
    found = trace(student, Letters(), ids[0])
    path = list(found.ffn_inputs)[2]
    changes = [addition(found, path, torch.ones(32), ids), Edit(path, 3, scale=0.5)]
    with edited(student, *changes), torch.no_grad():
        student.save_pretrained(tmp_path / "edited")
        expected = student(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(load_student(str(tmp_path / "edited"))(input_ids=ids).logits, expected)
        assert not torch.equal(student(input_ids=ids).logits, expected)


def test_the_effect_is_measured(model, ids):
    found = trace(model, Letters(), ids[0])
    path, nothing = list(found.ffn_inputs)[2], effect(model, [], ids[0], 17, others=ids[1:3])
    assert nothing.probability[0] == nothing.probability[
        1
    ] and nothing.collateral_kl == pytest.approx(0, abs=1e-6)
    assert nothing.probability[0] == pytest.approx(
        found.logits[-1].softmax(-1)[17].item(), rel=1e-4
    )
    loud = effect(model, [Edit(path, i, scale=0) for i in range(48)], ids[0], 17, others=ids[1:3])
    assert loud.collateral_kl > 0.01


def test_a_token_is_raised_by_one_prototype(model, ids):
    found, used = trace(model, Letters(), ids[0]), contexts(model, [ids[4:]])
    token = get_unembedding(model).norm(dim=-1).argmax().item()
    change, result = raise_token(found, token, used, ids[1:3], probability=0.3)
    assert (
        result.probability[0] < 0.1 and 0.3 <= result.probability[1] < 0.4 and result.rank[1] == 1
    )
    assert effect(model, [change], ids[0], token, others=ids[1:3]) == result
    assert result.collateral_kl == min(
        raise_token(found, token, used, ids[1:3], probability=0.3, candidates=n)[1].collateral_kl
        for n in (1, 2, 4)
    )


def test_a_token_is_raised_by_a_new_prototype(pair, ids):
    _, student = pair
    found = trace(student, Letters(), ids[0])
    token = get_unembedding(student).norm(dim=-1).argmax().item()
    change, result = raise_token_by_addition(found, token, ids[4:], ids[1:3], probability=0.3)
    assert (
        0.3 <= result.probability[1] < 0.4
        and effect(student, [change], ids[0], token, others=ids[1:3]) == result
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_support_is_defined_for_every_kernel(llama, ids, kernel):
    student, _ = convert(llama, KernelFFNConfig(kernel=kernel), calibration_ids=ids)
    found = trace(student, Letters(), ids[0])
    for path, inputs in found.ffn_inputs.items():
        scores = support_scores(student, path, inputs)
        ffn = student.kernel_ffns()[path]
        rows = ffn.input_prototypes.weight
        nearest = -(inputs[:, None] - rows).square().sum(-1).amin(-1)
        assert torch.allclose(scores["nearest"], nearest, rtol=1e-3)
        mass = ffn.kernel.value(*ffn.scores(inputs), **ffn.kernel_parameters()).sum(-1)
        assert torch.allclose(scores["mass"].exp(), mass, rtol=1e-3)


def test_percentiles_are_those_of_the_text(model, ids):
    support = Support(model, ids)
    paths = list(text_scores(model, ids))
    found = support.percentiles(trace(model, Letters(), ids[0]))
    assert [entry.path for entry in found[::32]] == paths
    inside = [
        entry
        for row in ids
        for entry in support.percentiles(trace(model, Letters(), row))
        if entry.position >= 8
    ]
    for score in ("nearest", "mass"):
        values = torch.tensor([getattr(entry, score) for entry in inside])
        assert (
            values.min() >= 0 and values.max() <= 100 and values.mean() == pytest.approx(50, abs=3)
        )


def test_separations(model, ids):
    text = ids.sort(1).values  # rows with an order that scrambling destroys
    other = scrambled(text)
    assert torch.equal(other.sort(1).values, text) and not torch.equal(other, text)
    found = separations(model, text, {"itself": text, "scrambled": other})
    assert len(found) == 2 * 2 * 3
    assert all(entry.auc == pytest.approx(0.5) for entry in found if entry.against == "itself")
    assert any(abs(entry.auc - 0.5) > 0.01 for entry in found if entry.against == "scrambled")
