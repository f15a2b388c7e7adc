"""Readings and edits of readouts with tied rows."""

import pytest
import torch
from letters import Letters

from hf_kernel_ffn import InputError, KernelFFNConfig, convert, trace
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig
from hf_kernel_ffn.checkpoint_code.tied import TiedKernelFFN
from hf_kernel_ffn.reading.attribution import logit_split
from hf_kernel_ffn.reading.editing import Addition, Edit, edit, edited
from hf_kernel_ffn.reading.geometry import function_norm, prototype_kernel, unit_norms
from hf_kernel_ffn.reading.regimes import contributions, regime
from hf_kernel_ffn.reading.support import support_scores

PROMPT = "the prompt"


@pytest.fixture(
    scope="module",
    params=[(family, kernel) for family in ("llama", "gpt2") for kernel in ("brownian", "yat")],
    ids="-".join,
)
def student(request, make_teacher, ids):
    family, kernel = request.param
    values = "product" if family == "llama" else "fixed"
    settings = KernelFFNConfig(kernel=kernel, values=values, rows="tied")
    return convert(make_teacher(family).double(), settings, calibration_ids=ids, copy=True)[0]


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
        if not ffn.kernel.uses_knot:
            with pytest.raises(InputError, match="rows 'tied'"):
                function_norm(ffn)
            with pytest.raises(InputError, match="convert with rows 'tied' and kernel 'brownian'"):
                unit_norms(ffn)


@pytest.mark.parametrize("gated", [False, True])
def test_the_norm_of_a_unit_is_that_of_its_least_interpolant(gated):
    """Among functions of the space with the unit's values at its knots f is the least:
    ‖f‖² = yᵀ K⁻¹ y."""
    knots = torch.tensor([0.5, 2.0, -1.0, -3.0], dtype=torch.float64)
    values = "product" if gated else "fixed"
    settings = KernelFFNConfig(kernel="brownian", values=values, rows="tied", pieces=4)
    reference = {"scale": 1.5, "far": 5.0}
    one = torch.ones(1, 1, dtype=torch.float64)
    ffn = TiedKernelFFN.from_pieces(
        LayerConfig(settings, 1, 1, reference, gated=gated),
        rows=one,
        row_bias=None,
        values=one if gated else None,
        value_bias=None,
        outputs=3 * one,
        output_bias=None,
        pieces={"knot": knots[:, None], "amount": torch.tensor([[1.0], [-2], [0.5], [1]])},
    ).double()
    gram = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 2, 0, 0], [0, 0, 1, 1], [0, 0, 1, 3]]).double()
    y = ffn.coefficients(knots[:, None])[:, 0]
    square = 9.0
    if gated:  # the other factor is x itself, up to far: its space's norm at ±far is 2·far
        y = y / knots
        square = 9.0 * 2 * 5.0
    expected = square * (y @ torch.linalg.solve(gram, y))
    assert function_norm(ffn) == pytest.approx(expected.item())
    assert unit_norms(ffn).shape == (1,)


def test_support_is_scored(student):
    path = next(iter(student.kernel_ffns()))
    inputs = torch.randn(5, student.config.hidden_size, dtype=torch.float64)
    scores = support_scores(student, path, inputs)
    assert scores["nearest"].shape == scores["mass"].shape == (5,)
    assert torch.isfinite(scores["nearest"]).all()


def test_a_linear_map_is_a_part_of_its_own(make_teacher, ids):
    settings = KernelFFNConfig(rows="tied", simplex="threshold", top_k=8, skip=True)
    teacher = make_teacher("llama").double()
    student, _ = convert(teacher, settings, calibration_ids=ids, copy=True)
    passed = trace(student, Letters(), PROMPT)
    record = passed.ffn(next(iter(passed.ffn_inputs)))
    assert regime(record).name == "conic + linear"
    split = logit_split(passed, *passed.logits[-1].topk(2).indices.tolist())
    assert abs(split.remainder) < 1e-6
    assert split.kinds()["linear"] != 0
