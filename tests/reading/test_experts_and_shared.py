"""Readings in Python of models whose FFNs do not read every token once: experts of mixtures, FFNs
that layers share, encoders with decoders."""

import pytest
import torch
from tiny_families import tiny

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.reading.contexts import contexts
from hf_kernel_ffn.reading.editing import Addition, Edit, edited
from hf_kernel_ffn.reading.model_parts import ffn_readout, list_ffn_paths, read_dictionary
from hf_kernel_ffn.reading.support import Support, separations, support_scores
from hf_kernel_ffn.storage.loading import load_student
from hf_kernel_ffn.text.inputs import make_forward_arguments

FAMILIES = {
    "mixtral": ("AutoModelForCausalLM", False),
    "qwen3_moe": ("AutoModelForCausalLM", False),
    "albert": ("AutoModelForMaskedLM", False),
    "t5": ("AutoModelForSeq2SeqLM", True),
    "bart": ("AutoModelForSeq2SeqLM", True),
}
"""The head, and whether every FFN reads whole rows."""
KINDS = {"stock": None, "tied": {"rows": "tied"}, "free": {"simplex": "top-k", "top_k": 4}}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=KINDS)
def model(request, family, ids):
    stock = tiny(family, FAMILIES[family][0])
    settings = KINDS[request.param]
    if settings is None:
        return stock
    return convert(stock, KernelFFNConfig(**settings), calibration_ids=ids)[0]


def run(model, ids):
    with torch.no_grad():
        return model(**make_forward_arguments(model, ids[:2]))[0]


def test_a_record_can_be_made_of_every_ffn(model):
    for path in list_ffn_paths(model):
        inputs = torch.randn(5, 32)
        record = ffn_readout(model, path, inputs)
        assert record.output().shape == (5, 32)
        assert torch.equal(read_dictionary(model, path).dictionary, record.dictionary)
        scores = support_scores(model, path, inputs)
        assert all(values.shape == (5,) for values in scores.values())


def test_scores_and_contexts_are_of_whole_rows_or_refused(model, family, ids):
    readings = (
        lambda: Support(model, ids),
        lambda: separations(model, ids[:4], {"other": ids[4:]}),
        lambda: contexts(model, ids.split(4)),
    )
    for read in readings:
        if FAMILIES[family][1]:
            read()
            continue
        with pytest.raises(InputError, match="expected FFNs that read every token once"):
            read()


def test_an_edit_changes_the_model_and_is_undone_bit_by_bit(model, ids):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = run(model, ids)
    for path in list_ffn_paths(model):
        silenced = [Edit(path, unit, scale=0) for unit in range(16)]
        with edited(model, *silenced):
            assert not torch.equal(run(model, ids), plain), path
    assert torch.equal(run(model, ids), plain)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_an_addition_is_saved_or_refused(model, ids, tmp_path, request):
    path = list_ffn_paths(model)[0]
    # What the kernel of free rows finds near to everything on one side.
    change = Addition(path, torch.ones(32), 5.0, torch.ones(32))
    if "free" not in request.node.callspec.id:
        with pytest.raises(InputError, match="expected a kernel readout"), edited(model, change):
            pass
        return
    plain = run(model, ids)
    with edited(model, change):
        changed = run(model, ids)
        model.save_pretrained(tmp_path)
    assert not torch.equal(changed, plain) and torch.equal(run(model, ids), plain)
    torch.testing.assert_close(run(load_student(str(tmp_path)), ids), changed)


def test_a_path_that_is_none_is_named(model):
    with (
        pytest.raises(InputError, match="found no FFN 'layers.7.mlp'"),
        edited(model, Edit("layers.7.mlp", 0, scale=0)),
    ):
        pass
