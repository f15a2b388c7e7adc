"""Tokens per second in turns, and times of large models on a line."""

import pytest
import torch
from conversion_time import continue_line, format_scale, plan_whole
from generation_speed import compare_speeds
from teachers import RECIPES

from hf_kernel_ffn import convert, load_teacher

GIB = 2**30


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_speeds_are_of_as_many_tokens_as_asked(clock):
    teacher = load_teacher(str(RECIPES / "teachers/llama"))
    student, _ = convert(teacher, layers="0", calibration_tokens=0)
    lengths = []
    for model in (teacher, student):
        generate = model.generate

        def generate_and_count(ids, generate=generate, **options):
            output = generate(ids, **options)
            lengths.append(output.shape[1] - ids.shape[1])
            return output

        model.generate = generate_and_count
    models = {"teacher": teacher, "student": student}
    found = compare_speeds(models, torch.tensor([[5, 6]]), tokens=3, rounds=2, clock=clock)
    assert lengths == [4, 4, 3, 3, 3, 3]
    assert found["rounds"] == 2 and set(found["ratio"]) == {"student"}
    for figures in (*found["tokens_per_second"].values(), found["ratio"]["student"]):
        assert 0 < figures["low"] <= figures["median"] <= figures["high"]


def make_cases(per_block, peak):
    return [{"cpu_seconds": 1.0 + per_block * blocks, "peak_rss_bytes": peak} for blocks in (1, 2)]


def test_a_plan_lies_on_the_line_through_two_shapes():
    assert continue_line([1.0, 3.0], [10, 20, 40]) == 7.0
    smaller, larger = make_cases(2.0, GIB), make_cases(6.0, 2 * GIB)
    plan = plan_whole(smaller, larger, [100, 300, 500], 7)
    assert plan == {"layers": 7, "cpu_seconds": 70.0, "peak_rss_bytes": 3 * GIB}

    measured = {"cases": larger, "computed": {"layers": 32, "cpu_seconds": 1200.0}}
    lines = format_scale({"llama-3-8b": measured, "llama-3-70b": {"computed": plan}}).splitlines()
    assert lines[2] == "| llama-3-8b | 416 MiB | 6 s | 2.0 GiB | 32 blocks: 20.0 min |"
    assert lines[3].endswith("| *10 s* | *3.0 GiB* | 7 blocks: 1.2 min |")
