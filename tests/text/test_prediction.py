"""Masked language models: what is masked, that only that counts, and the commands on an encoder."""

import copy
import importlib.util
import json
import math
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from teachers import RECIPES
from training_runs import make_step
from transformers import (
    AutoModelForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from hf_kernel_ffn import InputError, KernelFFNConfig, convert, evaluate_student
from hf_kernel_ffn.cli.app import main
from hf_kernel_ffn.distillation import Recipe, distill
from hf_kernel_ffn.distillation import run as loop_module
from hf_kernel_ffn.distillation.objectives import OBJECTIVES, logits
from hf_kernel_ffn.distillation.recipe import Stage
from hf_kernel_ffn.text.prediction import (
    logits_with_answers,
    make_inputs_for_prediction,
    mask_tokens,
    select_predicting_logits,
)

MASK = 4096
SMALL = dict(
    vocab_size=MASK + 1,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=0,
)
STAGE = {"learning_rate": 0.002, "batch_size": 2, "tokens": 384}  # six steps


def tiny_bert(head=BertForMaskedLM):
    """A random encoder whose biases are not zero."""
    torch.manual_seed(0)
    model = head(BertConfig(**SMALL)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def bert():
    return tiny_bert()


@pytest.fixture(scope="module")
def mask_tokenizer(tokenizer):
    """The shipped one with a mask token."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"mask_token": "<|mask|>"})
    assert own.mask_token_id == MASK
    return own


@pytest.fixture(scope="module")
def folder(bert, mask_tokenizer, tmp_path_factory):
    made = tmp_path_factory.mktemp("teachers") / "bert"
    bert.save_pretrained(made)
    mask_tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def asked(bert, mask_tokenizer, ids):
    return make_inputs_for_prediction(bert, mask_tokenizer, ids)


@pytest.fixture(scope="module")
def student(bert, asked):
    return convert(
        bert, KernelFFNConfig(), calibration_ids=asked, calibration_tokens=256, copy=True
    )[0]


# the masks


@pytest.mark.parametrize("length, count", [(2, 1), (7, 1), (32, 5), (256, 38)])
def test_every_row_has_its_share_of_masks(length, count):
    ids = torch.randint(1, MASK, (9, length), generator=torch.Generator().manual_seed(1))
    found = mask_tokens(ids, MASK, seed=3)
    under = found["labels"] != -100
    assert (under.sum(-1) == count).all()
    assert torch.equal(under, found["input_ids"] == MASK)
    assert torch.equal(torch.where(under, found["labels"], found["input_ids"]), ids)
    assert length == 2 or not torch.equal(under[0], under[1])
    assert mask_tokens(ids[:0], MASK)["input_ids"].shape == (0, length)


def test_the_seed_decides_the_masks(bert, mask_tokenizer, ids):
    one, same, other = (
        make_inputs_for_prediction(bert, mask_tokenizer, ids, seed)["input_ids"]
        for seed in ("0 8 0", "0 8 0", "0 10 0")
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_class_decides_what_is_predicted(llama, mask_tokenizer, ids):
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=300,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
        )
    )
    for model in (llama, bart, tiny_bert(BertForSequenceClassification)):
        assert make_inputs_for_prediction(model, None, ids) is ids
    for tokenizer in (None, object()):
        with pytest.raises(InputError, match="found a BertForMaskedLM and no mask token"):
            make_inputs_for_prediction(tiny_bert(), tokenizer, ids)


# the loss


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_cross_entropy_is_the_models_own(family, request, mask_tokenizer, ids):
    model = request.getfixturevalue(family)
    asked = make_inputs_for_prediction(model, mask_tokenizer, ids)
    given = asked if isinstance(asked, dict) else {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        output = model(**given)
        guesses, answers = logits_with_answers(output.logits, asked)
    found = torch.nn.functional.cross_entropy(guesses.flatten(0, -2), answers.flatten())
    torch.testing.assert_close(found, output.loss)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_is_taken_at_masked_tokens(bert, student, asked, weight):
    stage = Stage(name="logits", cross_entropy=weight, **STAGE)
    found = logits(make_step(stage, bert, student, {"": bert}, asked))
    at = asked["labels"] != -100
    with torch.no_grad():
        p, q = (
            model(asked["input_ids"]).logits[at].double().log_softmax(-1)
            for model in (bert, student)
        )
        own = student(**asked).loss.item()
    assert found.item() == pytest.approx(
        (p.exp() * (p - q)).sum(-1).mean().item() + weight * own, rel=1e-4
    )
    assert select_predicting_logits(torch.zeros(8, 32, 3), asked).shape == (8 * 5, 3)


def test_a_teacher_has_no_loss_against_itself(bert, asked):
    stage = Stage(name="logits", **STAGE)
    found = logits(make_step(stage, bert, bert, {"": bert}, asked))
    assert found.item() == pytest.approx(0, abs=1e-7)


def test_what_is_under_no_mask_does_not_count(bert, student, asked):
    stage = Stage(name="logits", cross_entropy=1.0, **STAGE)
    few = {**asked, "labels": asked["labels"].clone()}
    few["labels"][1:] = -100

    def noisy(module, args, output):
        return output + torch.randn_like(output).masked_fill((few["labels"] != -100)[..., None], 0)

    step = make_step(stage, bert, student, {"": bert}, few)
    expected = logits(step)
    hook = student.get_output_embeddings().register_forward_hook(noisy)
    found = logits(step)
    hook.remove()
    assert found.item() == expected.item()


# a run


def recipe(folder, text_file, out, **more):
    return {
        "teacher": str(folder),
        "kernel_ffn": {"rows": "free"},
        "data": {"train": str(text_file), "sequence_length": 32, "shuffle_buffer": 16},
        "stages": [{**STAGE, "name": name} for name in ("layer-wise", "logits")],
        "output_dir": str(out),
        "calibration_tokens": 256,
        "save_every_tokens": 128,  # two steps
        **more,
    }


def run(folder, text_file, out, resume=False, **more):
    return distill(Recipe(**recipe(folder, text_file, out, **more)), resume=resume, progress=False)


def test_each_stage_lowers_its_loss(folder, text_file, tmp_path, monkeypatch):
    losses, masks = {name: [] for name in OBJECTIVES}, []
    for name, objective in list(OBJECTIVES.items()):

        def note(step, objective=objective):
            masks.append(tuple((step.batch["labels"] != -100).flatten().tolist()))
            loss = objective(step)
            losses[step.stage.name].append(loss.detach())
            return loss

        monkeypatch.setitem(OBJECTIVES, name, note)
    run(
        folder,
        text_file,
        tmp_path / "out",
        stages=[{**STAGE, "name": name, "tokens": 2560} for name in losses],
    )
    for name, values in losses.items():
        assert len(values) == 40
        assert sum(values[-10:]) < 0.95 * sum(values[:10]), name
    assert len(set(masks)) == len(masks) == 80  # new ones at every step
    found = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(found).__name__ == "KernelBertForMaskedLM" and len(found.kernel_ffns()) == 2


@pytest.mark.parametrize("calls", [3, 9])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    folder, text_file, tmp_path, monkeypatch, calls
):
    whole = run(folder, text_file, tmp_path / "whole")
    made = []

    def stop(*arguments, objective):
        made.append(1)
        if len(made) > calls:
            raise KeyboardInterrupt
        return objective(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name, objective in list(OBJECTIVES.items()):
            patch.setitem(
                OBJECTIVES,
                name,
                lambda *arguments, objective=objective: stop(*arguments, objective=objective),
            )
        run(folder, text_file, tmp_path / "stopped")
    assert loop_module.find_state(tmp_path / "stopped") is not None
    resumed = run(folder, text_file, tmp_path / "stopped", resume=True)
    expected, found = (load_file(out / "model.safetensors") for out in (whole, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


# the report


def test_the_report_is_taken_at_masked_tokens(bert, student, mask_tokenizer, asked, ids):
    report = evaluate_student(student, bert, ids, tokenizer=mask_tokenizer)
    assert report["tokens"] == (asked["labels"] != -100).sum()
    with torch.no_grad():
        for who, model in (("teacher", bert), ("student", student)):
            assert report[who]["cross_entropy"] == pytest.approx(
                model(**asked).loss.item(), abs=1e-5
            )
        one, other = (model.bert(ids).last_hidden_state.mean(1) for model in (bert, student))
    expected = torch.cosine_similarity(one, other).mean().item()
    assert report["pooled_cosine"] == pytest.approx(expected, abs=1e-5) and expected < 0.9999
    again = evaluate_student(student, bert, ids, tokenizer=mask_tokenizer, batch_tokens=64)
    for name in ("kl", "delta_cross_entropy", "pooled_cosine", "top1_agreement"):
        assert again[name] == pytest.approx(report[name], abs=1e-5)
    with pytest.raises(InputError, match="no mask token"):
        evaluate_student(student, bert, ids)


def test_a_student_that_computes_the_same_is_perfect(bert, mask_tokenizer, asked, ids):
    student, _ = convert(
        bert, KernelFFNConfig(), calibration_ids=asked, calibration_tokens=256, copy=True
    )
    for path, ffn in student.kernel_ffns().items():
        block = bert.base_model.get_submodule(path.removesuffix(".intermediate.dense"))
        ffn.forward = lambda x, block=block: block.output.dense(block.intermediate(x))
    report = evaluate_student(student, bert, ids, tokenizer=mask_tokenizer)
    assert report["kl"] == report["delta_cross_entropy"] == 0
    assert report["top1_agreement"] == report["loss_recovered"] == 1
    assert report["pooled_cosine"] == report["pooled_cosine_centred"] == pytest.approx(1, abs=1e-12)
    assert report["teacher"]["pooled_cosine_of_neighbours"] < 1 - 1e-6


# the commands


def test_convert_and_evaluate_an_encoder(folder, text_file, tmp_path, monkeypatch, capsys):
    def cli(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-kernel-ffn", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0
        return capsys.readouterr().out

    few = ("--calibration-tokens", 256, "--calibration-text", text_file)
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert "256 tokens (text)" in cli("convert", folder, tmp_path / name, *few, "--seed", seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]  # the seed is that of the masks
    assert (
        "model = AutoModelForMaskedLM.from_pretrained" in (tmp_path / "a" / "README.md").read_text()
    )
    out = tmp_path / "report.json"
    lengths = ("--max-tokens", 512, "--sequence-length", 32)
    printed = cli(
        "evaluate",
        tmp_path / "a",
        "--teacher",
        folder,
        "--text",
        text_file,
        *lengths,
        "--json",
        out,
    )
    report = json.loads(out.read_text())
    assert "pooled_cosine" in printed and report["tokens"] == 16 * 5
    assert 0.5 < report["pooled_cosine"] <= 1 and math.isfinite(report["delta_cross_entropy"])
    assert len(report["layers"]) == 2


def test_the_table_of_trained_families(folder, text_file, tmp_path, capsys):
    (tmp_path / "bert-short.yaml").write_text(
        yaml.safe_dump(recipe(folder, text_file, tmp_path / "student"))
    )
    file = RECIPES.parent / "scripts" / "experiments" / "trained_families.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(file.parent)  # which it removes
        spec = importlib.util.spec_from_file_location("trained_families", file)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
    printed = []
    for _ in range(2):  # what is there is not made again
        script.main([str(tmp_path / "bert-short.yaml")], tmp_path / "results", str(text_file), 512)
        printed.append(capsys.readouterr().out.splitlines()[-5:])
    assert printed[0] == printed[1]
    columns = [line.count("|") for line in printed[0]]
    assert columns == [columns[0]] * 5 and [line.split(" | ")[0] for line in printed[0][2:]] == [
        "| *bert, untouched*",
        "| bert, converted",
        "| bert, distilled",
    ]
    before, after = (
        json.loads((tmp_path / "results" / "bert" / f"{n}.json").read_text())
        for n in ("converted", "distilled")
    )
    assert (before["training_tokens"], after["training_tokens"]) == (0, 768)
    assert before["teacher"] == after["teacher"] and before["kl"] != after["kl"]
