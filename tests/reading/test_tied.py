"""Readings and edits of readouts with tied rows."""

import pytest
import torch
from letters import Letters

from hf_kernel_ffn import InputError, KernelFFNConfig, convert, trace
from hf_kernel_ffn.reading.attribution import logit_split
from hf_kernel_ffn.reading.editing import Addition, Edit, edit, edited
from hf_kernel_ffn.reading.geometry import function_norm, prototype_kernel
from hf_kernel_ffn.reading.regimes import contributions, regime
from hf_kernel_ffn.reading.support import support_scores

PROMPT = "the prompt"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def student(request, make_teacher, ids):
    values = "product" if request.param == "llama" else "fixed"
    settings = KernelFFNConfig(kernel="root-half-yat", values=values, rows="tied")
    return convert(make_teacher(request.param).double(), settings, calibration_ids=ids, copy=True)[
        0
    ]


def test_a_layer_is_conic_and_its_parts_have_names(student):
    passed = trace(student, Letters(), PROMPT)
    for path in passed.ffn_inputs:
        record = passed.ffn(path)
        assert regime(record).name == "conic"
        assert contributions(record, top=1)[0].name[-1] in "+-"


def test_a_logit_splits_into_prototypes(student):
    passed = trace(student, Letters(), PROMPT)
    first, second = passed.logits[-1].topk(2).indices.tolist()
    split = logit_split(passed, first, second)
    assert abs(split.remainder) < 1e-6


def test_an_edit_of_either_sign_changes_the_unit_and_is_put_back(student, ids):
    path = next(iter(student.kernel_ffns()))
    ffn = student.kernel_ffns()[path]
    units = ffn.config.prototypes
    before = student(ids).logits
    with edited(student, Edit(path, units + 3, scale=0)):
        silent = student(ids).logits
        assert not ffn.output_prototypes.weight[:, 3].any()
    with edited(student, Edit(path, 3, scale=0)):
        torch.testing.assert_close(student(ids).logits, silent)
    write = torch.ones(student.config.hidden_size, dtype=torch.float64)
    with edited(student, Edit(path, units + 3, scale=0, write=write)):
        record = ffn.readout(torch.zeros(1, len(write), dtype=torch.float64))
        torch.testing.assert_close(record.dictionary[units + 3], write)
    assert torch.equal(student(ids).logits, before)
    with pytest.raises(InputError, match=f"from 0 to {2 * units - 1}"):
        edit(student, Edit(path, 2 * units))


def test_a_prototype_of_its_own_has_no_place(student):
    path = next(iter(student.kernel_ffns()))
    row = torch.zeros(student.config.hidden_size)
    with pytest.raises(InputError, match="convert with rows 'free'"):
        edit(student, Addition(path, row, 0.0, row))


def test_quantities_of_rows_are_refused(student):
    for ffn in student.kernel_ffns().values():
        with pytest.raises(InputError, match="rows 'tied'"):
            prototype_kernel(ffn)
        with pytest.raises(InputError):
            function_norm(ffn)


def test_support_is_scored(student):
    path = next(iter(student.kernel_ffns()))
    inputs = torch.randn(5, student.config.hidden_size, dtype=torch.float64)
    scores = support_scores(student, path, inputs)
    assert scores["nearest"].shape == scores["mass"].shape == (5,)
    assert torch.isfinite(scores["nearest"]).all()
