"""Loading asks nobody anything."""

import builtins

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_kernel_ffn import convert
from hf_kernel_ffn.storage.checkpoint import save_converted
from hf_kernel_ffn.storage.loading import check_vocabularies, load_student


def test_no_question_is_asked_at_the_terminal(teacher_folder, ids, tmp_path, monkeypatch):
    teacher = str(teacher_folder("llama"))
    student, _ = convert(
        AutoModelForCausalLM.from_pretrained(teacher), calibration_ids=ids, calibration_tokens=256
    )
    save_converted(student, teacher, tmp_path)
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "n")
    check_vocabularies(str(tmp_path), teacher)
    load_student(str(tmp_path))
    assert not asked


def test_layers_keep_their_order_past_the_tenth(ids, tmp_path):
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=12,
        num_attention_heads=2,
    )
    student, _ = convert(LlamaForCausalLM(config), calibration_ids=ids, calibration_tokens=256)
    student.save_pretrained(tmp_path)
    expected = [f"layers.{number}.mlp" for number in range(12)]
    assert (
        list(type(student).from_pretrained(tmp_path).kernel_ffns())
        == list(student.kernel_ffns())
        == expected
    )
