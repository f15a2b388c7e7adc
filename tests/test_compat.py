"""What nobody promises of transformers: it is there, and means what compat says."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from hf_kernel_ffn import KernelFFNConfig, compat, convert
from hf_kernel_ffn.conversion.sampling import write_own_text
from hf_kernel_ffn.reading import tracing


@pytest.fixture
def refuse_deprecations(monkeypatch):
    """Turn the warnings of whatever goes in a later transformers into errors."""

    def refuse(self, message, *rest, **more):
        assert "deprecated" not in str(message), message

    logger_class = type(logging.get_logger("transformers.utils.generic"))
    monkeypatch.setattr(logger_class, "warning_once", refuse, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        yield


def greedy_tokens(model, ids, count):
    """Tokens chosen one by one with the cache."""
    logits, cache = compat.run_with_cache(model, ids, None)
    chosen = []
    for _ in range(count):
        chosen.append(logits[:, -1:].argmax(-1))
        logits, cache = compat.run_with_cache(model, chosen[-1], cache)
    return torch.cat(chosen, 1)


def test_a_stock_model_and_a_student_run_with_the_cache(teacher, ids, refuse_deprecations):
    student, _ = convert(teacher, KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256)
    for model in (teacher, student):
        with torch.no_grad():
            found = greedy_tokens(model, ids[:2, :5], 6)
            read = ids[:2, :5]
            for _ in range(6):
                read = torch.cat([read, model(read).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, read[:, 5:])


def test_a_model_with_the_older_argument_is_given_that():
    class Older(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None, use_cache=None):
            past = past_key_values or 0
            return CausalLMOutputWithPast(
                logits=input_ids, **{compat.CACHE_NAME: past + input_ids.shape[1]}
            )

    _, cache = compat.run_with_cache(Older(), torch.zeros(1, 3), None)
    assert compat.run_with_cache(Older(), torch.zeros(1, 4), cache)[1] == 7


def test_a_model_without_a_cache_returns_none():
    class Cacheless(torch.nn.Module):
        def forward(self, input_ids, **kwargs):
            return CausalLMOutputWithPast(logits=input_ids)

    assert compat.run_with_cache(Cacheless(), torch.zeros(1, 3), None)[1] is None


def test_own_text_and_traces_use_nothing_deprecated(
    teacher, tokenizer, monkeypatch, refuse_deprecations
):
    assert write_own_text(teacher, 64, 0, length=16).shape == (4, 16)
    monkeypatch.setattr(tracing, "CHUNK", 8)  # several calls with a cache
    assert tracing.trace(teacher, tokenizer, torch.arange(3, 33)).logits.shape[0] == 30


def test_class_names_are_those_of_the_auto_classes():
    names = compat.find_class_names("llama")
    assert names["AutoModel"] == "LlamaModel"
    assert names["AutoModelForCausalLM"] == "LlamaForCausalLM"
    assert list(names) == sorted(names)
    assert compat.find_class_names("no such family") == {}


def test_a_missing_file_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert compat.find_cached_file(str(tmp_path), "config.json") == tmp_path / "config.json"
    assert compat.find_cached_file(str(tmp_path), "nothing.json") is None


def test_relative_imports_are_followed(tmp_path):
    (tmp_path / "one.py").write_text("from .two import x\n")
    (tmp_path / "two.py").write_text("from .three import x\n")
    (tmp_path / "three.py").write_text("x = 1\n")
    found = compat.find_relative_imports(tmp_path / "one.py")
    assert {path.name for path in found} >= {"two.py", "three.py"}


def test_the_attention_can_be_set_and_put_back(make_teacher):
    model = make_teacher("llama")
    before = compat.get_attention_implementation(model.config)
    compat.set_attention_implementation(model.config, "eager")
    output = model(torch.tensor([[3, 4, 5]]), output_attentions=True)
    assert output.attentions[0].shape[-2:] == (3, 3)
    compat.set_attention_implementation(model.config, before)
    assert compat.get_attention_implementation(model.config) == before


@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, LlamaForCausalLM])
def test_a_model_is_made_from_its_config(llama, model_class):
    with torch.device("meta"):
        model = compat.make_model_from_config(model_class, llama.config, torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16


def test_activations_are_computed_again(make_teacher, ids, refuse_deprecations):
    model = make_teacher("llama").train()
    projection = model.model.layers[0].mlp.up_proj
    calls, gradients = [], []
    projection.register_forward_hook(lambda *_: calls.append(1))
    for enable in (False, True, False):
        compat.set_activation_checkpointing(model, enable)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append((len(calls), projection.weight.grad.clone()))
        calls.clear()
    assert [count for count, _ in gradients] == [1, 2, 1]
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_tied_parameters_are_named(llama, mistral):
    assert compat.get_tied_parameter_names(llama) == {"lm_head.weight"}
    assert compat.get_tied_parameter_names(mistral) == set()


def test_a_module_is_initialized(make_teacher):
    model = make_teacher("llama")
    rotary = model.model.rotary_emb
    expected = rotary.inv_freq.clone()
    rotary.inv_freq.fill_(0)
    compat.initialize_module(model, rotary)
    assert torch.equal(rotary.inv_freq, expected)


def test_the_reader_of_gguf_files_has_what_is_used_of_it():
    from transformers import modeling_gguf_pytorch_utils as reader

    for name in ("TENSOR_PROCESSORS", "TensorProcessor", "get_gguf_hf_weights_map", "tqdm"):
        assert hasattr(reader, name)
    assert isinstance(compat.make_gguf_options(), dict)
