"""Converting into sparse tied rows: counts shared out by cost, a linear map, pieces taken over."""

from dataclasses import replace

import pytest
import torch
from tiny_families import tiny

from hf_kernel_ffn import InputError, KernelFFNConfig, convert, load_student
from hf_kernel_ffn.conversion import convert as conversion
from hf_kernel_ffn.conversion.allocation import _count_dearest, allocate_top_k
from hf_kernel_ffn.conversion.ridge import Moments
from hf_kernel_ffn.families.lookup import find_stock_ffns
from hf_kernel_ffn.families.registry import get_architecture_of_model

SPARSE = KernelFFNConfig(rows="tied", simplex="threshold", top_k=8)


def read_counts(student):
    return [ffn.config.settings.top_k for ffn in student.kernel_ffns().values()]


def mean_error(report):
    return sum(layer["fvu"] for layer in report.layers.values())


@pytest.fixture
def chosen(teacher):
    return find_stock_ffns(teacher, get_architecture_of_model(teacher))


def test_counts_add_up_and_the_teacher_stays_as_it_is(teacher, ids):
    before = {name: parameter.requires_grad for name, parameter in teacher.named_parameters()}
    student, _ = convert(teacher, SPARSE, calibration_ids=ids, allocate=True)
    counts = read_counts(student)
    assert sum(counts) == 8 * len(counts)
    assert min(counts) >= 1
    after = {name: parameter.requires_grad for name, parameter in teacher.named_parameters()}
    assert before == after
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_layer_whose_output_hardly_matters_gets_fewer(make_teacher, ids):
    teacher = make_teacher("llama")
    ffns = find_stock_ffns(teacher, get_architecture_of_model(teacher))
    settings = dict.fromkeys(ffns, SPARSE)
    counts = allocate_top_k(teacher, ffns, settings, ids)
    last = list(ffns)[-1]
    with torch.no_grad():
        ffns[last].host.down_proj.weight.mul_(0.1)
    fewer = allocate_top_k(teacher, ffns, settings, ids)
    assert fewer[last].top_k < counts[last].top_k
    assert sum(each.top_k for each in fewer.values()) == 8 * len(ffns)


@pytest.mark.parametrize(
    "settings, family, message",
    [
        (KernelFFNConfig(rows="tied"), "llama", "simplex 'softmax'"),
        (SPARSE, "mixtral", "an expert"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(settings, family, message, ids):
    teacher = tiny(family, "AutoModelForCausalLM")
    with pytest.raises(InputError, match=message):
        convert(teacher, settings, calibration_ids=ids, allocate=True)


def test_a_model_without_logits_is_refused(make_teacher, ids):
    with pytest.raises(InputError, match="predicts tokens"):
        convert(make_teacher("llama").base_model, SPARSE, calibration_ids=ids, allocate=True)


@pytest.mark.parametrize("calibration_tokens", (None, 0))
def test_refusals_come_before_the_work(make_teacher, calibration_tokens, monkeypatch):
    """Before the teacher writes text of its own, which takes minutes."""
    monkeypatch.setattr(conversion, "write_own_text", lambda *_, **__: pytest.fail("wrote text"))
    dense = KernelFFNConfig(rows="tied")
    asked = SPARSE if calibration_tokens == 0 else dense
    with pytest.raises(InputError, match="allocate"):
        convert(make_teacher("llama"), asked, allocate=True, calibration_tokens=calibration_tokens)


def test_a_start_is_of_no_use_to_free_rows(make_teacher, ids):
    teacher = make_teacher("llama")
    dense, _ = convert(teacher, KernelFFNConfig(rows="tied"), calibration_ids=ids)
    with pytest.raises(InputError, match="rows='tied' in the model to start from"):
        convert(teacher, KernelFFNConfig(), calibration_ids=ids, start=dense)


def test_a_spike_counts_as_an_output_of_ordinary_length():
    coefficients = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    outputs = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    moments = Moments(2, 2, torch.device("cpu"))
    moments.add(coefficients, outputs, longest=5.0)
    expected = Moments(2, 2, torch.device("cpu"))
    expected.add(coefficients[:1], outputs[:1])
    # The second token's error is weighed by (5 / 500)².
    weighed = torch.cat([coefficients[1:], torch.ones(1, 1)], 1) / 100
    torch.testing.assert_close(moments.cc, expected.cc + weighed.T @ weighed)
    torch.testing.assert_close(moments.cy, expected.cy + weighed.T @ outputs[1:] / 100)
    assert moments.count == pytest.approx(1 + 1e-4)


def test_a_linear_map_leaves_less_unexplained(make_teacher, ids):
    teacher = make_teacher("llama")
    text = (ids.repeat(16, 1) + torch.arange(16 * len(ids))[:, None]) % 300
    few = replace(SPARSE, top_k=2)
    _, without = convert(teacher, few, calibration_ids=text)
    student, with_map = convert(teacher, replace(few, skip=True), calibration_ids=text)
    assert mean_error(with_map) < mean_error(without)
    assert all(ffn.skip.weight.any() for ffn in student.kernel_ffns().values())


def test_pieces_are_those_of_the_model_to_start_from(make_teacher, ids):
    teacher = make_teacher("llama")
    dense, _ = convert(teacher, KernelFFNConfig(rows="tied"), calibration_ids=ids)
    student, _ = convert(teacher, SPARSE, calibration_ids=ids, start=dense)
    for path, ffn in student.kernel_ffns().items():
        for name, numbers in dense.kernel_ffns()[path].pieces.items():
            torch.testing.assert_close(ffn.pieces[name], numbers)


def test_a_start_of_other_pieces_or_layers_is_refused(make_teacher, ids):
    teacher = make_teacher("llama")
    fewer = KernelFFNConfig(rows="tied", pieces=4)
    start, _ = convert(teacher, fewer, calibration_ids=ids)
    with pytest.raises(InputError, match="pieces=4"):
        convert(teacher, SPARSE, calibration_ids=ids, start=start)
    partly, _ = convert(teacher, KernelFFNConfig(rows="tied"), "0", calibration_ids=ids)
    with pytest.raises(InputError, match="no readout at"):
        convert(teacher, SPARSE, calibration_ids=ids, start=partly)


@pytest.mark.parametrize("skip", (False, True))
def test_a_sparse_student_is_saved_and_loads(skip, make_teacher, ids, tmp_path):
    settings = replace(SPARSE, skip=skip)
    student, _ = convert(make_teacher("llama"), settings, calibration_ids=ids, allocate=True)
    student.save_pretrained(tmp_path / "student")
    loaded = load_student(str(tmp_path / "student"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, student(ids).logits)
    assert read_counts(loaded) == read_counts(student)


def test_a_layer_that_earns_nothing_has_one_unit_all_the_same():
    dear = torch.rand(10, 12) + 1
    cheap = torch.rand(10, 12) * 1e-6
    assert _count_dearest([dear, cheap, cheap], 9) == [7, 1, 1]
