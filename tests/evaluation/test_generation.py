"""Continuations of prompts: how much of them is the same, and what cannot be continued."""

import copy

import pytest
import torch
from teachers import FAMILIES, tiny_teacher
from tiny_families import tiny

from hf_kernel_ffn import InputError, convert, evaluate_student
from hf_kernel_ffn.evaluation.generation import NEW_TOKENS, compare_continuations, select_prompts


@pytest.fixture(scope="module")
def pairs(ids):
    """A teacher of every family and a student of it whose FFNs are a little off."""
    made = {}
    for family in FAMILIES:
        teacher = tiny_teacher(family, max_position_embeddings=128)
        student, _ = convert(teacher, calibration_ids=ids, calibration_tokens=256, copy=True)
        for model in (teacher, student):
            model.generation_config.eos_token_id = None
        made[family] = (teacher, student)
    return made


def write(model, prompts, end=()):
    """Greedy continuations as lists, without a cache: one row and one token at a time."""
    continuations = []
    for prompt in prompts:
        row = prompt[None]
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
                if row[0, -1] in end:
                    break
        continuations.append(row[0, len(prompt) :].tolist())
    return continuations


def shares(expected, written):
    """How much of each continuation is the same before the first difference."""
    found = []
    for one, other in zip(expected, written, strict=True):
        same = 0
        while same < min(len(one), len(other)) and one[same] == other[same]:
            same += 1
        found.append(same / len(one))
    return found


def check(teacher, student, prompts, end=()):
    expected = shares(write(teacher, prompts, end), write(student, prompts, end))
    for batch_size in (32, 3):
        found = compare_continuations(student, teacher, prompts, batch_size)
        assert found == {
            "prompts": len(prompts),
            "new_tokens": 32,
            "tokens_until_difference": pytest.approx(sum(expected) / len(expected)),
            "equal_continuations": sum(share == 1 for share in expected) / len(expected),
        }
    return expected


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_those_of_a_plain_loop(pairs, ids, family):
    teacher, student = pairs[family]
    expected = check(teacher, student, ids[:, :10])
    assert 0 < sum(expected) / len(expected) < 1


def test_a_continuation_ends_where_the_teacher_ends_it(pairs, ids):
    teacher, student = map(copy.deepcopy, pairs["llama"])
    prompts = ids[:, :10]
    end = [write(teacher, prompts[:1])[0][3], write(teacher, prompts[1:2])[0][6]]
    teacher.generation_config.eos_token_id = end
    student.generation_config.eos_token_id = 299
    check(teacher, student, prompts, end)
    assert min(map(len, write(teacher, prompts, end))) < NEW_TOKENS


def test_the_models_own_settings_do_not_matter(pairs, ids):
    teacher, student = pairs["llama"]
    expected = compare_continuations(student, teacher, ids[:, :10])
    eager = copy.deepcopy(student)
    eager.generation_config.update(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=2
    )
    assert compare_continuations(eager, teacher, ids[:, :10]) == expected


def test_a_model_continues_like_itself(pairs, ids):
    teacher, _ = pairs["gpt2"]
    found = compare_continuations(teacher, teacher, ids[:, :10])
    assert found["tokens_until_difference"] == found["equal_continuations"] == 1


def test_prompts_are_beginnings_of_rows_evenly_spaced(pairs):
    teacher, _ = pairs["llama"]
    ids = torch.arange(10 * 40).view(10, 40)
    assert torch.equal(select_prompts(teacher, ids, 3), ids[[0, 3, 6], :32])
    assert torch.equal(select_prompts(teacher, ids[:, :7], 10), ids[:, :7])


def test_the_report_has_them_if_asked(pairs, ids):
    teacher, student = pairs["llama"]
    report = evaluate_student(student, teacher, ids, prompts=4)
    prompts = select_prompts(teacher, ids, 4)
    assert report["generation"] == compare_continuations(student, teacher, prompts)
    assert "generation" not in evaluate_student(student, teacher, ids[:2])


def test_what_cannot_be_continued_is_refused(pairs, ids):
    teacher, student = pairs["llama"]
    with pytest.raises(InputError, match="found 8 rows of text for 9 prompts"):
        evaluate_student(student, teacher, ids, prompts=9)
    with pytest.raises(InputError, match="does not continue a text"):
        select_prompts(tiny("bert", "AutoModelForMaskedLM"), ids, 2)
    short = tiny_teacher("gpt2", n_positions=40)
    with pytest.raises(InputError, match="40 positions, expected at least 64"):
        select_prompts(short, ids, 2)
