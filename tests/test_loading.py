"""Loading asks nobody anything."""

import builtins

from transformers import AutoModelForCausalLM

from hf_kernel_ffn import convert
from hf_kernel_ffn.loading import check_vocabularies, load_student
from hf_kernel_ffn.surgery import save_converted


def test_no_question_is_asked_at_the_terminal(teacher_folder, ids, tmp_path, monkeypatch):
    teacher = str(teacher_folder("llama"))
    student, _ = convert(AutoModelForCausalLM.from_pretrained(teacher), calibration_ids=ids, calibration_tokens=256)
    save_converted(student, teacher, tmp_path)
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "n")
    check_vocabularies(str(tmp_path), teacher)
    load_student(str(tmp_path))
    assert not asked
