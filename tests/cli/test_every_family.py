"""Every command on a model of every family: it serves the model, or says in one line that it
cannot."""

import pytest
import yaml
from teachers import RECIPES
from tiny_families import FAMILIES, HEADS, tiny
from transformers import AutoTokenizer

from hf_kernel_ffn.families.registry import ARCHITECTURES
from hf_kernel_ffn.families.task_classes import get_stock_heads
from hf_kernel_ffn.storage.verification import verify_folder

VOCABULARY = {"vocab_size": 4160, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
"""The shipped tokenizer's, and a mask token."""
READ_NO_TEXT = (
    *("ViTModel", "CLIPModel", "CLIPVisionModel", "WhisperModel"),
    "WhisperForConditionalGeneration",
)
QUICK = (
    ("mixtral", "AutoModelForCausalLM"),
    ("qwen3_moe", "AutoModelForCausalLM"),
    ("albert", "AutoModelForMaskedLM"),
    ("albert", "AutoModel"),
    ("falcon", "AutoModelForCausalLM"),
    ("roberta", "AutoModelForMaskedLM"),
    ("t5", "AutoModelForSeq2SeqLM"),
    ("whisper", "AutoModelForCausalLM"),
    ("whisper", "AutoModelForSpeechSeq2Seq"),
    ("vit", "AutoModel"),
    ("qwen3", "AutoModelForCausalLM"),
)
"""Mixtures, shared FFNs, blocks that add in place, positions that start late, a model that is its
own base, a decoder without its encoder, sounds, images; and one that all commands serve."""


def list_cases():
    """Every family with each head that is converted, those that are not quick marked slow."""
    cases = [
        (family, head) for family in FAMILIES for head in HEADS if head in get_stock_heads(family)
    ]
    return [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(case))
        for case in cases
    ]


def save_teacher(folder, family, head):
    """Save a tiny model with a tokenizer that it has embeddings of, where it has any.

    Returns its class, and whether it predicts tokens. None: a bare model whose head is its
    embedding, which is loaded as a language model where its family has no other.
    """
    changes = {}
    if family == "clip":
        changes["text_config"] = {**FAMILIES["clip"]["text_config"], **VOCABULARY}
    elif family not in ("vit", "clip_vision_model"):
        changes = VOCABULARY
    model = tiny(family, head, **changes)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "teachers" / "llama")
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(folder)
    predicts = model.get_output_embeddings() is not None
    if not predicts and getattr(model.config, "tie_word_embeddings", False):
        return type(model).__name__, None
    return type(model).__name__, predicts


@pytest.mark.parametrize("family, head", list_cases())
def test_a_command_serves_a_model_or_says_why_not(cli, tmp_path, text_file, family, head):
    teacher, student, record = (tmp_path / name for name in ("teacher", "student", "record"))
    name, predicts = save_teacher(teacher, family, head)
    reads_text = name not in READ_NO_TEXT

    def run(serves, *command):
        code, _, error = cli(*command)
        if serves is None:  # either
            assert code in (0, 2), (command, error)
        else:
            assert code == (0 if serves else 2), (command, error)
        if code == 2:
            last = error.splitlines()[-1]
            assert last.startswith("error: ") and "expected" in last, (command, error)

    few = ("--calibration-tokens", 256)
    text = ("--calibration-text", text_file)
    run(True, "families", "--check", teacher)
    run(True, "families", "--explain", teacher)
    run(reads_text, "convert", teacher, tmp_path / "with-text", *few, *text)
    run(None, "convert", teacher, tmp_path / "streamed", *few, *text, "--stream")
    run(True, "convert", teacher, student, *few)
    run(True, "verify", student)

    short = ("--max-tokens", 256, "--sequence-length", 32)
    pair = (student, "--teacher", teacher, "--text", text_file)
    run(reads_text and predicts, "evaluate", *pair, *short)
    run(reads_text and predicts, "evaluate", *pair, *short, "--dtype", "bfloat16")
    run(None, "evaluate", *pair, *short, "--prompts", 1)

    is_described = ARCHITECTURES[family].qkv is not None
    for model in (teacher, student):
        prompt = (model, "--prompt", "A whale", "--html", tmp_path / "page.html")
        run(is_described and predicts, "read", *prompt, "--text", text_file)
        run(is_described and predicts, "graph", *prompt, "--heads", "--nodes", 16)

    stage = {"tokens": 64, "learning_rate": 0.01, "batch_size": 2}
    content = {
        "teacher": str(teacher),
        "student": str(student),
        "data": {"train": str(text_file), "sequence_length": 32},
        "stages": [{"name": "layer-wise", **stage}, {"name": "logits", **stage}],
        "output_dir": str(tmp_path / "distilled"),
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    has_masks = "MaskedLM" in name  # drawn anew for every step: there is nothing to record
    run(reads_text and predicts and not has_masks, "record", recipe, record, "--top-k", 4)
    run(reads_text and predicts, "distill", recipe)
    changes = (f"output_dir={tmp_path / 'other'}", "gradient_checkpointing=true", "dtype=bfloat16")
    run(None, "distill", recipe, *changes)
    if record.exists():
        changes = (f"output_dir={tmp_path / 'again'}", f"stages.1.stored_logits={record}")
        run(True, "distill", recipe, *changes)
    if (tmp_path / "distilled").exists():
        assert all(finding.good for finding in verify_folder(tmp_path / "distilled"))

    run(True, "export", student, tmp_path / "ffns.safetensors")
    run(True, "apply", tmp_path / "ffns.safetensors", teacher, tmp_path / "applied")
