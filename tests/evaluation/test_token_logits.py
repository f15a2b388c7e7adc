"""Logits a few tokens at a time: the model's own, whatever its head does, in bounded memory."""

import pytest
import torch
from teachers import tiny_teacher
from tiny_families import tiny
from transformers import LlamaForCausalLM

from hf_kernel_ffn import InputError, convert, evaluate_student
from hf_kernel_ffn.evaluation import token_logits
from hf_kernel_ffn.evaluation.token_logits import TokenLogits
from hf_kernel_ffn.gpu.measuring import peak_memory
from hf_kernel_ffn.text.inputs import make_forward_arguments
from hf_kernel_ffn.text.prediction import logits_with_answers, make_inputs_for_prediction

CASES = [
    ("llama", "AutoModelForCausalLM", {}),
    ("gpt2", "AutoModelForCausalLM", {}),
    ("opt", "AutoModelForCausalLM", {}),
    ("gemma3_text", "AutoModelForCausalLM", {}),
    ("gemma3_text", "AutoModelForCausalLM", {"final_logit_softcapping": 2.0}),
    ("gemma2", "AutoModelForCausalLM", {"final_logit_softcapping": 2.0}),
    ("cohere", "AutoModelForCausalLM", {"logit_scale": 0.25}),
    ("granite", "AutoModelForCausalLM", {"logits_scaling": 3.0}),
    ("mixtral", "AutoModelForCausalLM", {}),
    ("bert", "AutoModelForMaskedLM", {}),
    ("albert", "AutoModelForMaskedLM", {}),
]


class MaskTokenizer:
    """Knows a mask token, and puts nothing around a text."""

    mask_token_id = 4

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [5]}


class PositionalHead(LlamaForCausalLM):
    """Its logits depend on where in the row they are: no part of them can be had alone."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * torch.arange(1.0, output.logits.shape[1] + 1)[:, None]
        return output


@pytest.fixture
def three_tokens(monkeypatch):
    """Chunks of three tokens."""
    monkeypatch.setattr(token_logits, "LOGIT_BYTES", 3 * 300 * 4 * token_logits.MATRICES)


def check(model, ids):
    inputs = make_inputs_for_prediction(model, MaskTokenizer(), ids)
    with torch.no_grad():
        logits = model(**make_forward_arguments(model, inputs)).logits
        expected, answers = logits_with_answers(logits.log_softmax(-1), inputs)
        source = TokenLogits(model, inputs)
        predictions = source.predict(inputs)
        chunks = list(source.split(predictions))
        found = [predictions.log_probabilities(chunk) for chunk in chunks]
    assert len(chunks) > 4 and max(map(len, found)) == 3
    assert torch.equal(predictions.answers, answers.flatten())
    torch.testing.assert_close(torch.cat(found), expected.flatten(0, -2), rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(model.base_model)
    return source, predictions


@pytest.mark.parametrize("family, auto, changes", CASES)
def test_chunks_are_the_models_own_logits(three_tokens, ids, family, auto, changes):
    source, predictions = check(tiny(family, auto, **changes), ids[:, :30])
    assert source._head is not None
    assert predictions.states.shape[-1] != 300  # what is kept are states


def test_a_head_that_has_to_see_the_whole_row_does(three_tokens, ids):
    source, predictions = check(PositionalHead(tiny_teacher("llama").config).eval(), ids)
    assert source._head is None
    assert predictions.states.shape[-1] == 300


def test_a_wrapper_around_the_base_model_stays(ids):
    model = tiny_teacher("llama")
    own = model.model.forward
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.model.forward = wrapper
    with torch.no_grad():
        predictions = TokenLogits(model, ids).predict(ids)
        before = len(calls)
        predictions.log_probabilities(slice(0, 4))
    assert len(calls) == before >= 1
    assert model.model.forward is wrapper


def test_a_model_without_a_head_is_refused(ids):
    with pytest.raises(InputError, match="found a LlamaModel, which predicts no tokens"):
        TokenLogits(tiny_teacher("llama", "base"), ids)
    with pytest.raises(InputError, match="predicts no tokens"):
        TokenLogits(tiny_teacher("gpt2", "classify"), ids)


@pytest.mark.parametrize("at_once", [False, True])
def test_the_report_is_the_same_in_chunks(llama, ids, monkeypatch, at_once):
    teacher = llama
    student, _ = convert(teacher, calibration_ids=ids, calibration_tokens=128, copy=True)
    whole = evaluate_student(student, teacher, ids)
    if at_once:
        monkeypatch.setattr(TokenLogits, "_find_head", lambda self, inputs: None)
    monkeypatch.setattr(token_logits, "LOGIT_BYTES", 1)
    chunked = evaluate_student(student, teacher, ids)
    for name in ("tokens", "kl", "top1_agreement", "delta_cross_entropy", "loss_recovered"):
        assert chunked[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-7), name
    assert chunked["layers"] == whole["layers"]


def test_memory_is_bounded_over_a_large_vocabulary(monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    teacher = tiny_teacher("llama", vocab_size=100_000, **sizes)
    ids = torch.randint(100_000, (4, 64), generator=torch.Generator().manual_seed(0))
    student, _ = convert(teacher, calibration_ids=ids, calibration_tokens=64, copy=True)
    whole = ids.numel() * 100_000 * 4
    monkeypatch.setattr(token_logits, "LOGIT_BYTES", 2**25)
    peak = peak_memory(lambda: evaluate_student(student, teacher, ids), ids.device)
    assert peak < 2**25 + 2**23 < whole / 2
