"""The command line: what it makes, and that bad input is one line, exit code 2 and nothing
half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from teachers import RECIPES
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kernel_ffn.cli.app import main

SCRIPTS = Path(__file__).parents[2] / "scripts"
FEW = ("--calibration-tokens", 256)
KERNEL = """
from hf_kernel_ffn import Kernel, register_kernel


class Mine(Kernel):
    def value(self, score, distance2):
        {body}


register_kernel(Mine("mine", nonnegative={nonnegative}, positive_definite=False, uses_bias=True))
"""


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(cli, tmp_path):
    """Run what has to fail, and see that it fails well; the line."""

    def run(*arguments):
        before = contents(tmp_path)
        code, _, error = cli(*arguments)
        assert code == 2
        assert len(error.splitlines()) == 1 and error.startswith("error: "), error
        assert contents(tmp_path) == before
        return error

    return run


@pytest.fixture
def model(teacher_folder, tmp_path):
    """A copy of a tiny Llama's folder, to be broken."""
    return Path(shutil.copytree(teacher_folder("llama"), tmp_path / "model"))


@pytest.fixture(scope="session")
def student_folder(teacher_folder, tmp_path_factory, text_file):
    """A converted tiny Llama."""
    folder = tmp_path_factory.mktemp("students") / "student"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(
            sys, "argv", ["", "convert", str(teacher_folder("llama")), str(folder), *map(str, FEW)]
        )
        main()
    assert stopped.value.code == 0
    return folder


@pytest.fixture
def own_kernel(tmp_path, monkeypatch, registry):
    """A file with the user's kernel "mine"."""
    monkeypatch.setitem(
        sys.modules, "my_kernel_file", None
    )  # whatever is put there is taken out again

    def write(body="return score.relu().square()", nonnegative=True):
        file = tmp_path / "my_kernel_file.py"
        file.write_text(KERNEL.format(body=body, nonnegative=nonnegative))
        return f"{file}:mine"

    return write


@pytest.fixture
def texts(tmp_path):
    """Texts that cannot be used, by what is wrong with them."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin-1") * 1000)
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    names = {
        "missing": "missing.txt",
        "empty": "empty.txt",
        "short": "short.txt",
        "latin": "latin.txt",
        "field": "rows.jsonl",
    }
    return {what: tmp_path / name for what, name in names.items()}


BAD_TEXTS = {
    "missing": "unreadable",
    "empty": "found 0 tokens",
    "short": "expected at least",
    "latin": "UTF-8",
    "field": "text field 'text'",
}


# convert


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_convert_makes_a_folder_that_loads(cli, teacher_folder, family, tmp_path, text_file, ids):
    out = tmp_path / "new" / "student"
    code, printed, _ = cli(
        "convert", teacher_folder(family), out, *FEW, "--calibration-text", text_file
    )
    assert code == 0 and "256 tokens (text)" in printed
    student = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert student.config.model_type == f"kernel_{family}"
    assert len(student.kernel_ffns()) == 3
    with torch.no_grad():
        assert torch.isfinite(student(ids).logits).all()
    tokenizer, original = (
        AutoTokenizer.from_pretrained(folder) for folder in (out, teacher_folder(family))
    )
    assert tokenizer("A whale\nof a tale.") == original("A whale\nof a tale.")
    assert list(json.loads((out / "conversion.json").read_text())["layers"]) == list(
        student.kernel_ffns()
    )
    assert [path.name for path in out.parent.iterdir()] == ["student"]  # no scratch folder is left


def test_every_option_reaches_the_student(cli, teacher_folder, tmp_path):
    options = "--kernel yat --simplex top-k --top-k 5 --intensity gate --init polarised --expansion 1.5 --temperature 0.5"
    code, _, _ = cli(
        "convert",
        teacher_folder("llama"),
        tmp_path / "out",
        *FEW,
        *options.split(),
        "--layers",
        "0,2",
    )
    assert code == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert list(student.kernel_ffns()) == ["layers.0.mlp", "layers.2.mlp"]
    for layer in student.config.kernel_ffn_layers().values():
        settings = layer.settings
        assert (settings.kernel, settings.simplex, settings.top_k, settings.intensity) == (
            "yat",
            "top-k",
            5,
            "gate",
        )
        assert (settings.init, settings.expansion, settings.temperature, layer.prototypes) == (
            "polarised",
            1.5,
            0.5,
            72,
        )


def test_the_seed_decides_the_models_own_text(cli, teacher_folder, tmp_path):
    tensors = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            cli("convert", teacher_folder("llama"), tmp_path / name, *FEW, "--seed", seed)[0] == 0
        )
        tensors.append((tmp_path / name / "model.safetensors").read_bytes())
    assert tensors[0] == tensors[1] != tensors[2]


def test_the_student_is_stored_as_the_teacher_was(cli, model, tmp_path):
    AutoModelForCausalLM.from_pretrained(model).to(torch.bfloat16).save_pretrained(model)
    assert cli("convert", model, tmp_path / "out", *FEW)[0] == 0
    kinds = {
        t.dtype
        for n, t in load_file(tmp_path / "out" / "model.safetensors").items()
        if not n.endswith("units")
    }
    assert kinds == {torch.bfloat16}


def test_an_empty_folder_is_taken(cli, teacher_folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert cli("convert", teacher_folder("llama"), tmp_path / "out", *FEW)[0] == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_unsupported_model_is_told_what_is_supported(refused, tmp_path):
    config = transformers.CodeGenConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    transformers.CodeGenForCausalLM(config).save_pretrained(tmp_path / "codegen")
    message = refused("convert", tmp_path / "codegen", tmp_path / "out")
    for part in ("'codegen'", "llama", "mistral", "gpt2", "register_architecture"):
        assert part in message


def test_a_converted_model_is_not_converted_again(refused, student_folder, tmp_path):
    assert "converted already" in refused("convert", student_folder, tmp_path / "out")


@pytest.mark.parametrize(
    "layers, found",
    [("3", "'3'"), ("0-9", "'0-9'"), ("2-1", "'2-1'"), ("first", "'first'"), ("", "''")],
)
def test_layers_outside_the_model_are_named(refused, teacher_folder, tmp_path, layers, found):
    message = refused(
        "convert", teacher_folder("llama"), tmp_path / "out", *FEW, "--layers", layers
    )
    assert f"found layers {found}, expected numbers" in message


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    ["layers.1.mlp.up_proj.weight", "layers.2.self_attn.k_proj.weight", "embed_tokens.weight"],
)
def test_a_tensor_that_is_not_finite_is_named(refused, model, tmp_path, name, value):
    change_tensors(model, lambda tensors: tensors[f"model.{name}"].view(-1)[7:8].fill_(value))
    assert name in refused("convert", model, tmp_path / "out", *FEW)


@pytest.mark.parametrize(
    "name", ["layers.1.mlp.up_proj.weight", "layers.2.self_attn.k_proj.weight", "norm.weight"]
)
def test_a_tensor_that_is_missing_is_named(refused, model, tmp_path, name):
    change_tensors(model, lambda tensors: tensors.pop(f"model.{name}"))
    assert name in refused(
        "convert", model, tmp_path / "out", *FEW
    )  # never a model with random weights


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_quantised_model_is_refused(refused, model, tmp_path):
    change_config(model, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "unquantised" in refused("convert", model, tmp_path / "out", *FEW)


def test_a_folder_that_holds_no_model_is_refused(refused, model, tmp_path):
    def refusal(folder):
        message = refused("convert", folder, tmp_path / "out", *FEW)
        assert str(folder) in message
        return message

    assert "config.json" in refusal(tmp_path)
    assert "no readable model" in refusal(tmp_path / "nowhere")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    assert "complete" in refusal(model)
    (model / "model.safetensors").unlink()
    assert "complete" in refusal(model)
    (model / "config.json").write_text('{"model_type": ')
    assert "expected JSON" in refusal(model)
    (model / "config.json").write_text("[]")
    assert "expected a mapping" in refusal(model)


@pytest.mark.parametrize(
    "options, reason",
    [
        ("--kernel yta", "'yta', expected one of"),
        ("--simplex argmax", "simplex='argmax', expected one of"),
        ("--intensity loud", "intensity='loud', expected one of"),
        ("--init random", "init='random', expected one of"),
        ("--values free", "values='free', expected one of"),
        ("--dtype float8", "'float8', expected one of"),
        ("--device abacus", "'abacus'"),
        ("--simplex top-k", "top_k=None"),
        ("--top-k 3", "only 'top-k'"),
        ("--simplex top-k --top-k 0", "top_k=0"),
        ("--temperature 0", "temperature=0.0"),
        ("--temperature nan", "temperature=nan"),
        ("--expansion 8.5", "expansion=8.5"),
        ("--values gated --init polarised", "values 'gated' with init 'polarised'"),
        ("--kernel nowhere.py:mine", "'nowhere.py'"),
    ],
)
def test_unknown_names_and_refused_combinations(refused, teacher_folder, tmp_path, options, reason):
    assert reason in refused(
        "convert", teacher_folder("llama"), tmp_path / "out", *FEW, *options.split()
    )


@pytest.mark.parametrize("options", ["--values gated", "--init polarised"])
def test_an_ffn_without_a_gate_refuses_what_needs_one(refused, teacher_folder, tmp_path, options):
    assert "without a gate" in refused(
        "convert", teacher_folder("gpt2"), tmp_path / "out", *FEW, *options.split()
    )


def test_a_kernel_file_has_to_work(refused, teacher_folder, own_kernel, tmp_path):
    convert = ("convert", teacher_folder("llama"), tmp_path / "out", *FEW, "--kernel")
    assert "can be negative" in refused(*convert, own_kernel("return score", nonnegative=False))
    assert "failing when run" in refused(*convert, own_kernel("return ("))
    assert "'yours'" in refused(*convert, own_kernel().replace(":mine", ":yours"))


def test_what_is_in_the_way_stays(refused, teacher_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        assert f"{tmp_path / name} not empty" in refused(
            "convert", teacher_folder("llama"), tmp_path / name, *FEW
        )


@pytest.mark.parametrize("what", BAD_TEXTS)
def test_convert_refuses_a_text_that_cannot_be_used(refused, teacher_folder, tmp_path, texts, what):
    message = refused(
        "convert", teacher_folder("llama"), tmp_path / "out", "--calibration-text", texts[what]
    )
    assert BAD_TEXTS[what] in message and str(texts[what]) in message


def test_a_text_needs_a_tokenizer(refused, model, tmp_path, text_file):
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert str(model) in refused(
        "convert", model, tmp_path / "out", *FEW, "--calibration-text", text_file
    )


def test_an_interrupted_conversion_leaves_nothing(monkeypatch, teacher_folder, tmp_path):
    from hf_kernel_ffn.storage import checkpoint as saving

    def save(student, source, out, **extra):
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "save_converted", save)
    monkeypatch.setattr(
        sys,
        "argv",
        ["", "convert", str(teacher_folder("llama")), str(tmp_path / "out"), *map(str, FEW)],
    )
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main()
    assert not list(tmp_path.iterdir())


# evaluate


def evaluate(student, teacher, text, out, *more):
    lengths = ("--sequence-length", 32, "--max-tokens", 256)
    return (
        "evaluate",
        student,
        "--teacher",
        teacher,
        "--text",
        text,
        "--json",
        out,
        *lengths,
        *more,
    )


def test_evaluate_prints_and_writes_the_report(
    cli, student_folder, teacher_folder, text_file, tmp_path
):
    out = tmp_path / "new" / "report.json"
    code, printed, _ = cli(*evaluate(student_folder, teacher_folder("llama"), text_file, out))
    report = json.loads(out.read_text())
    assert code == 0
    assert report["tokens"] == 8 * 31
    assert [layer["path"] for layer in report["layers"]] == [
        "layers.0.mlp",
        "layers.1.mlp",
        "layers.2.mlp",
    ]
    for value in (
        report["kl"],
        report["top1_agreement"],
        report["layers"][1]["teacher"]["coherence"],
    ):
        assert f"{value:.4f}" in printed


def test_evaluate_continues_prompts_in_batches_of_any_size(
    cli, refused, student_folder, teacher_folder, text_file, tmp_path
):
    out = tmp_path / "report.json"
    pair = (student_folder, teacher_folder("llama"), text_file, out)
    code, printed, _ = cli(*evaluate(*pair, "--prompts", 5, "--batch-tokens", 64))
    found = json.loads(out.read_text())["generation"]
    assert code == 0
    assert found["prompts"] == 5 and 0 <= found["equal_continuations"] <= 1
    assert f"{found['tokens_until_difference']:.4f}" in printed
    assert "found 8 rows of text for 9 prompts" in refused(*evaluate(*pair, "--prompts", 9))


def test_evaluate_refuses_what_does_not_belong_together(
    refused, student_folder, teacher_folder, text_file, tmp_path
):
    teacher, out = teacher_folder("llama"), tmp_path / "report.json"

    def refusal(*arguments):
        return refused(*evaluate(*arguments))

    assert "not converted" in refusal(teacher, teacher, text_file, out)
    assert "converted already" in refusal(student_folder, student_folder, text_file, out)
    assert "'gpt2'" in refusal(student_folder, teacher_folder("gpt2"), text_file, out)
    larger = teacher_folder("llama", vocab_size=4097)
    assert "vocab_size 4096 in the student and 4097 in the teacher" in refusal(
        student_folder, larger, text_file, out
    )
    deeper = teacher_folder("llama", num_hidden_layers=4)
    assert "num_hidden_layers" in refusal(student_folder, deeper, text_file, out)
    shorter = teacher_folder("llama", max_position_embeddings=16)
    assert "at most the teacher's 16" in refusal(student_folder, shorter, text_file, out)
    assert "'float8'" in refusal(student_folder, teacher, text_file, out, "--dtype", "float8")


def other_tokens(folder, target):
    """A copy of a model's folder in which two tokens have changed places: as many, but not the
    same."""
    shutil.copytree(folder, target)
    file = target / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["the"], vocabulary["and"] = vocabulary["and"], vocabulary["the"]
    file.write_text(json.dumps(content), encoding="utf-8")
    return target


def test_a_vocabulary_of_the_same_size_is_not_the_same(
    refused, recipe, student_folder, teacher_folder, text_file, tmp_path
):
    teacher = teacher_folder("llama")
    other = other_tokens(teacher, tmp_path / "other")
    for command in (
        evaluate(student_folder, other, text_file, tmp_path / "report.json"),
        ("distill", recipe(student=str(student_folder), teacher=str(other))),
    ):
        message = refused(*command)
        assert "tokens" in message and str(student_folder) in message and str(other) in message


def test_a_student_without_a_tokenizer_takes_its_teachers(
    cli, student_folder, teacher_folder, text_file, tmp_path
):
    bare = Path(shutil.copytree(student_folder, tmp_path / "bare"))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert (
        cli(*evaluate(bare, teacher_folder("llama"), text_file, tmp_path / "report.json"))[0] == 0
    )


@pytest.mark.parametrize("what", BAD_TEXTS)
def test_evaluate_refuses_a_text_that_cannot_be_used(
    refused, student_folder, teacher_folder, tmp_path, texts, what
):
    message = refused(
        *evaluate(student_folder, teacher_folder("llama"), texts[what], tmp_path / "report.json")
    )
    assert BAD_TEXTS[what] in message and str(texts[what]) in message


def test_a_damaged_student_is_refused(refused, student_folder, teacher_folder, text_file, tmp_path):
    damaged = Path(shutil.copytree(student_folder, tmp_path / "damaged"))
    change_tensors(
        damaged, lambda tensors: tensors.pop("model.layers.1.mlp.input_prototypes.weight")
    )
    message = refused(
        *evaluate(damaged, teacher_folder("llama"), text_file, tmp_path / "report.json")
    )
    assert "layers.1.mlp.input_prototypes.weight" in message


def test_a_kernel_of_the_users_own(cli, refused, own_kernel, teacher_folder, text_file, tmp_path):
    teacher, student, out = teacher_folder("llama"), tmp_path / "student", tmp_path / "report.json"
    assert cli("convert", teacher, student, *FEW, "--kernel", own_kernel())[0] == 0
    assert "class Mine" in (student / "custom_kernel.py").read_text()
    assert "--trust-remote-code" in refused(*evaluate(student, teacher, text_file, out))
    assert cli(*evaluate(student, teacher, text_file, out, "--trust-remote-code"))[0] == 0
    report = json.loads(out.read_text())
    assert 0 < report["kl"] < 10 and len(report["layers"]) == 3


# distill


@pytest.fixture
def recipe(teacher_folder, text_file, tmp_path):
    """Write a recipe of two steps, with changes; its file."""
    content = {
        "teacher": str(teacher_folder("llama")),
        "data": {"train": str(text_file), "sequence_length": 32},
        "stages": [
            {"name": name, "tokens": 64, "learning_rate": 0.01, "batch_size": 2}
            for name in ("layer-wise", "logits")
        ],
        "output_dir": str(tmp_path / "out"),
        "calibration_tokens": 256,
    }

    def write(**changes):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**content, **changes}))
        return file

    return write


def test_distill_makes_a_folder_that_loads(cli, recipe, tmp_path, ids):
    code, printed, _ = cli(
        "distill", recipe(), "seed=3", "stages.0.tokens=128", "kernel_ffn.layers=1"
    )
    assert code == 0 and f"saved in {tmp_path / 'out'}" in printed
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert list(student.kernel_ffns()) == ["layers.1.mlp"]
    with torch.no_grad():
        assert torch.isfinite(student(ids).logits).all()
    used = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert used["seed"] == 3 and used["stages"][0]["tokens"] == 128
    assert not [
        path for path in (tmp_path / "out").iterdir() if path.is_dir()
    ]  # nothing to resume from is left


def test_distill_with_a_kernel_of_the_users_own(cli, recipe, own_kernel, tmp_path):
    assert cli("distill", recipe(kernel_ffn={"kernel": own_kernel(), "layers": "0"}))[0] == 0
    assert "class Mine" in (tmp_path / "out" / "custom_kernel.py").read_text()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"sead": 1}, "unknown key 'sead', did you mean 'seed'?"),
        ({"seed": "one"}, "seed: "),
        (
            {"stages": [{"name": "logits", "tokens": "many", "learning_rate": 1}]},
            "stages.0.tokens: ",
        ),
        ({"kernel_ffn": {"simplex": "top-k"}}, "top_k=None"),
        ({"kernel_ffn": {"layers": "2-3"}}, "'2-3'"),
        ({"kernel_ffn": {"layers": 3}}, "'3'"),
        ({"data": {"train": "nowhere.txt"}}, "nowhere.txt"),
        ({"teacher": "nowhere/at-all"}, "nowhere/at-all"),
        ({"student": "nowhere/at-all"}, "nowhere/at-all"),
    ],
)
def test_distill_refuses_a_bad_recipe(refused, recipe, changes, reason):
    assert reason in refused("distill", recipe(**changes))


def test_distill_refuses_bad_overrides(refused, recipe, tmp_path):
    file = recipe()
    for override, reason in {
        "stages.2.tokens=1": "below 2",
        "stages.0.tokens": "dotted.key=value",
        "data.sequence_length=4096": "at most the teacher's 2048",
        "data.sequence_length=many": "data.sequence_length: ",
    }.items():
        assert reason in refused("distill", file, override)
    assert "unreadable" in refused("distill", tmp_path / "nowhere.yaml")
    assert "no state to resume from" in refused("distill", file, "--resume")


@pytest.mark.parametrize("what", BAD_TEXTS)
@pytest.mark.parametrize("given", ["teacher", "student"])
def test_distill_refuses_a_text_that_cannot_be_used(
    refused, recipe, student_folder, texts, what, given
):
    changes = {
        "data": {"train": str(texts[what]), "sequence_length": 32},
        "student": str(student_folder),
    }
    message = refused(
        "distill", recipe(**changes) if given == "student" else recipe(data=changes["data"])
    )
    assert BAD_TEXTS[what] in message and str(texts[what]) in message


def test_distill_refuses_a_student_of_another_vocabulary(
    refused, recipe, student_folder, teacher_folder
):
    larger = teacher_folder("llama", vocab_size=4097)
    assert "vocab_size" in refused(
        "distill", recipe(student=str(student_folder), teacher=str(larger))
    )


def test_distill_leaves_what_is_in_the_way(refused, recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert "not empty" in refused("distill", recipe())


def test_a_loss_that_is_not_finite_is_one_line(cli, recipe):
    stage = {"name": "layer-wise", "tokens": 640, "learning_rate": 1e30, "batch_size": 2}
    code, _, error = cli("distill", recipe(stages=[stage]))
    assert code == 2
    assert (
        len(error.splitlines()) == 1
        and error.startswith("error: found loss")
        and "'layer-wise'" in error
    )


# families, scripts, processes


def test_families_lists_the_table(cli):
    code, printed, _ = cli("families")
    assert code == 0
    assert all(f" {family} " in printed for family in ("llama", "mistral", "gpt2"))
    assert "gate_proj" in printed and "c_fc" in printed


def run_process(*command):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("command", ["convert", "distill", "evaluate_model"])
def test_scripts_are_the_same_commands(command):
    done = run_process(SCRIPTS / f"{command}.py", "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert {"convert": "OUT_DIR", "distill": "RECIPE", "evaluate_model": "STUDENT"}[
        command
    ] in done.stdout


COMMANDS = """
import json, sys
from hf_kernel_ffn.cli.app import main

for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    try:
        main()
    except SystemExit as stopped:
        assert stopped.code == 2, command
    else:
        raise AssertionError(command)
"""


def test_the_one_line_is_all_that_a_process_prints(
    model, recipe, student_folder, text_file, tmp_path
):
    """Loggers and progress bars of other libraries included: they write past what this process can
    catch."""
    parquet, damaged, out = tmp_path / "text.parquet", tmp_path / "damaged", tmp_path / "out"
    parquet.write_bytes(b"this is no parquet file")
    shutil.copytree(student_folder, damaged)
    teacher = RECIPES / "teachers" / "gpt2"
    change_tensors(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    change_tensors(
        damaged, lambda tensors: tensors.pop("model.layers.1.mlp.input_prototypes.weight")
    )
    commands = [
        ("convert", teacher, out, "--calibration-text", parquet),
        ("convert", teacher, out, "--layers", "4"),
        ("convert", model, out),
        ("evaluate", damaged, "--teacher", teacher, "--text", text_file),
        ("evaluate", student_folder, "--teacher", teacher, "--text", text_file),
        ("distill", recipe(), "data.sequence_length=4096"),
        ("distill", recipe(student=str(student_folder), teacher=str(teacher))),
    ]
    done = run_process(
        "-c", COMMANDS, json.dumps([list(map(str, command)) for command in commands])
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands) and all(line.startswith("error: ") for line in lines), (
        done.stderr
    )
    assert not out.exists()
