"""How often blocks are read, and that the numbers are those read from the embedding."""

from collections import Counter
from functools import partial

import pytest
import tiny_families
import torch

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.checkpoint_code.settings import ROWS
from hf_kernel_ffn.conversion import convert as surgery
from hf_kernel_ffn.conversion.block_source import BlockSource
from hf_kernel_ffn.conversion.calibration_set import CalibrationSet
from hf_kernel_ffn.conversion.replay import Replay
from hf_kernel_ffn.conversion.replay_check import find_reason_against_replay, open_block_source
from hf_kernel_ffn.families.task_classes import get_stock_heads
from hf_kernel_ffn.text.inputs import make_random_inputs

IDS = torch.randint(3, 300, (12, 32), generator=torch.Generator().manual_seed(0))
OPTIONS = {"calibration_ids": IDS, "calibration_tokens": 384}
ONE_STACK = ("gemma3_text", "bert", "mixtral", "mpt", "vit")
"""Two rotary embeddings and masks, a split FFN, experts, position biases, patches."""
SEVERAL_STACKS = {
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "clip": "AutoModel",
}
ELSEWHERE = {"whisper", "albert", *SEVERAL_STACKS}
"""Families of which a stack is not served, or whose inputs need more than random numbers."""


def count_block_passes(model, **options):
    """How often each block computes while ``model`` is converted, by its number."""
    passes = Counter()
    hooks = [
        block.input_layernorm.register_forward_hook(
            lambda *_, number=number: passes.update([number])
        )
        for number, block in enumerate(model.model.layers)
    ]
    convert(model, KernelFFNConfig(), **{**OPTIONS, **options})
    for hook in hooks:
        hook.remove()
    return passes


def assert_same_conversion(model, ids, monkeypatch, rows="free"):
    """What is read block after block makes the student that reading from the embedding makes."""
    config = KernelFFNConfig() if rows == "free" else None
    options = {"calibration_ids": ids, "calibration_tokens": 384}
    student, report = convert(model, config, **options)
    monkeypatch.setattr(surgery, "open_block_source", BlockSource)
    expected, expected_report = convert(model, config, **options)
    assert report.to_dict() == expected_report.to_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name


def test_passes_are_linear_in_depth():
    passes = {}
    for layers in (2, 4, 8):
        model = tiny_families.tiny("llama", "AutoModelForCausalLM", num_hidden_layers=layers)
        passes[layers] = count_block_passes(model)
        first, *_, last = passes[layers].values()
        # Tried once, read for three purposes, and for the three again when the block is converted.
        assert set(list(passes[layers].values())[:-1]) == {7} and last == 4
    assert passes[8].total() - passes[4].total() == 2 * (passes[4].total() - passes[2].total())


@pytest.mark.parametrize("source", [BlockSource, open_block_source])
def test_experts_are_read_in_one_go(source, monkeypatch):
    monkeypatch.setattr(surgery, "open_block_source", source)
    few, many = (
        count_block_passes(
            tiny_families.tiny("mixtral", "AutoModelForCausalLM", num_local_experts=experts)
        )
        for experts in (4, 16)
    )
    assert few == many


def test_blocks_between_those_that_are_converted_compute_once_a_purpose():
    model = tiny_families.tiny("llama", "AutoModelForCausalLM", num_hidden_layers=6)
    passes = count_block_passes(model, layers="1,5")
    assert dict(passes) == {0: 4, 1: 7, 2: 4, 3: 4, 4: 4, 5: 4}


@pytest.mark.parametrize("family", ONE_STACK)
@pytest.mark.parametrize("rows", ROWS)
def test_the_same_numbers_as_from_the_embedding(family, rows, monkeypatch):
    auto = next(auto for auto in tiny_families.HEADS if auto in get_stock_heads(family))
    model = tiny_families.tiny(family, auto)
    ids = IDS if hasattr(model.config, "vocab_size") else make_random_inputs(model, 1024, 0)
    assert type(open_block_source(model, CalibrationSet.choose(ids, 384))) is Replay
    assert_same_conversion(model, ids, monkeypatch, rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*tiny_families.FAMILIES} - {*ONE_STACK} - ELSEWHERE))
@pytest.mark.parametrize("rows", ROWS)
def test_the_same_numbers_in_every_other_family(family, rows, monkeypatch):
    test_the_same_numbers_as_from_the_embedding(family, rows, monkeypatch)


def test_a_block_may_write_into_what_it_is_given(monkeypatch):
    model = tiny_families.tiny("llama", "AutoModelForCausalLM", num_hidden_layers=3)

    def write_and_compute(compute, hidden_states, **arguments):
        return compute(hidden_states.mul_(1.01), **arguments)

    for block in model.model.layers:
        block.forward = partial(write_and_compute, block.forward)
    assert find_reason_against_replay(model, CalibrationSet.choose(IDS, 384)) is None
    assert_same_conversion(model, IDS, monkeypatch)


@pytest.mark.parametrize("family, auto", SEVERAL_STACKS.items())
def test_several_stacks_are_read_from_the_embedding(family, auto):
    model = tiny_families.tiny(family, auto)
    calibration = CalibrationSet.choose(make_random_inputs(model, 1024, 0), 1024)
    assert find_reason_against_replay(model, calibration) == "it has 2 stacks of blocks"
    assert type(open_block_source(model, calibration)) is BlockSource


def test_shared_ffns_are_read_from_the_embedding():
    model = tiny_families.tiny("albert", "AutoModelForMaskedLM")
    reason = find_reason_against_replay(model, CalibrationSet.choose(IDS, 384))
    assert reason == "its layers share their FFNs"


def test_connections_that_span_blocks_are_read_from_the_embedding(monkeypatch):
    """What the last block adds is what the first put out, which is not kept any more by then."""
    model = tiny_families.tiny("llama", "AutoModelForCausalLM", num_hidden_layers=3)
    put_out = []
    first, _, last = model.model.layers
    first.register_forward_hook(lambda module, args, output: put_out.append(output))
    last.register_forward_pre_hook(lambda module, args: (args[0] + put_out.pop(), *args[1:]))
    reason = find_reason_against_replay(model, CalibrationSet.choose(IDS, 384))
    assert reason == "what its block 2 reads is not only what block 1 puts out"
    assert_same_conversion(model, IDS, monkeypatch)


def test_blocks_that_run_twice_are_read_from_the_embedding():
    model = tiny_families.tiny("llama", "AutoModelForCausalLM")
    first, last = model.model.layers
    running = []

    def run_again(module, args, kwargs, output):
        if running:
            return None
        running.append(module)
        again = module(output, *args[1:], **kwargs)
        running.clear()
        return again

    last.register_forward_hook(run_again, with_kwargs=True)
    reason = find_reason_against_replay(model, CalibrationSet.choose(IDS, 384))
    assert reason == "its blocks do not run once each, in order"


def test_trying_leaves_the_model_alone(llama):
    forwards = [vars(block).get("forward") for block in llama.model.layers]
    hooks = [len(block._forward_pre_hooks) for block in llama.model.layers]
    find_reason_against_replay(llama, CalibrationSet.choose(IDS, 384))
    assert [vars(block).get("forward") for block in llama.model.layers] == forwards
    assert [len(block._forward_pre_hooks) for block in llama.model.layers] == hooks
