"""Converted models where the rest of the ecosystem takes them: adapters, quantisers, evaluation,
pipelines, trainers, hubs."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from safetensors.torch import load_file
from teachers import tiny_teacher
from torch.utils.data import Dataset
from training_runs import make_step
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.checkpoint_code.linears import get_effective_weight
from hf_kernel_ffn.cli.app import main
from hf_kernel_ffn.distillation.objectives import layer_wise, logits
from hf_kernel_ffn.distillation.recipe import Stage
from hf_kernel_ffn.evaluation.probes import multiple_choice
from hf_kernel_ffn.storage.exporting import apply_surgery, export_surgery
from hf_kernel_ffn.storage.publishing import FIGURES
from hf_kernel_ffn.storage.verification import verify_folder

# Other packages call what transformers is going to remove.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def folder(teacher_folder, tmp_path_factory, ids):
    """A converted tiny Llama with its tokenizer, as the command line leaves it."""
    out = tmp_path_factory.mktemp("student") / "student"
    sys.argv = [
        "hf-kernel-ffn",
        "convert",
        str(teacher_folder("llama")),
        str(out),
        "--calibration-tokens",
        "512",
        "--rows",
        "free",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(sys.argv))
        try:
            main()
        except SystemExit as end:
            assert not end.code
    return out


def load(folder, auto=AutoModelForCausalLM, **more):
    return auto.from_pretrained(folder, trust_remote_code=True, **{"dtype": torch.float32, **more})


@pytest.fixture
def student(folder):
    return load(folder)


@torch.no_grad()
def output(model, ids, **more):
    return model(ids, **more).logits


def run(monkeypatch, *arguments):
    """The command line's exit code."""
    monkeypatch.setattr(sys, "argv", ["hf-kernel-ffn", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


# peft


def test_lora_on_all_linear_layers(student, folder, ids, tmp_path):
    peft = pytest.importorskip("peft")
    before = output(student, ids)
    adapted = peft.get_peft_model(
        student, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    touched = {
        name.partition(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name
    }
    for part in ("input_prototypes", "output_prototypes", "q_proj"):
        assert sum(name.endswith(part) for name in touched) == 3
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if ".lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    expected = output(adapted, ids)
    assert (expected - before).abs().max() > 0.01
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    assert torch.equal(output(again, ids), expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(output(merged, ids), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(output(load(tmp_path / "merged"), ids), output(merged, ids))


# quantisers


def assert_quantised_sanely(model, student, ids, room):
    """Logits near the unquantised ones, and scores and distances of the weights that are in use."""
    expected, found = output(student, ids).float(), output(model, ids).float()
    assert torch.isfinite(found).all() and not torch.equal(found, expected)
    assert (found - expected).square().mean() < room * expected.var()
    ffn = next(module for module in model.modules() if type(module).__name__ == "KernelFFN")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(found.dtype)
    with torch.no_grad():
        weight, bias = get_effective_weight(ffn.input_prototypes, x)
        assert weight.shape == (96, 32)
        score, distance2 = ffn.scores(x)
        torch.testing.assert_close(
            distance2,
            torch.cdist(x.double(), weight.double()).square().float(),
            rtol=0.02,
            atol=0.02,
        )
        torch.testing.assert_close(
            score, (x.double() @ weight.double().T + bias.double()).float(), rtol=0.05, atol=0.05
        )
    stock = next(iter(student.kernel_ffns().values())).input_prototypes.weight
    assert not torch.equal(weight, stock) and (weight - stock).abs().max() < 0.1 * stock.abs().max()


def test_torchao_int8_weights(student, folder, ids):
    quantization = pytest.importorskip("torchao.quantization")
    model = load(folder)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert "Int8" in type(model.model.layers[0].mlp.input_prototypes.weight).__name__
    assert_quantised_sanely(model, student, ids, 0.01)


def test_bitsandbytes_int8(student, folder, ids):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    try:
        model = load(folder, quantization_config=config, device_map="cpu")
    except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
        pytest.skip(f"bitsandbytes does not quantise here: {error}")
    assert "8bit" in type(model.model.layers[0].mlp.input_prototypes).__name__
    assert_quantised_sanely(model, student, ids, 0.02)


# evaluation, pipelines, caches, padding


@pytest.mark.slow
def test_lm_evaluation_harness(folder, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [
        {"text": f"{word} is", "choices": ["good", "bad", "blue"], "label": n % 3}
        for n, word in enumerate("abcdef")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(task))
    model = HFLM(
        pretrained=str(folder),
        trust_remote_code=True,
        device="cpu",
        dtype="float32",
        batch_size=2,
        max_length=64,
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(model, tasks=["local"], task_manager=manager, bootstrap_iters=0)

    questions = [
        {"context": row["text"], "choices": row["choices"], "answer": row["label"]} for row in rows
    ]
    expected = multiple_choice(load(folder), AutoTokenizer.from_pretrained(folder), questions)
    assert found["n-samples"]["local"]["effective"] == len(rows)
    assert found["results"]["local"]["acc,none"] == pytest.approx(expected["accuracy"])
    likelihoods = [
        [likelihood for likelihood, _ in sample["filtered_resps"]]
        for sample in found["samples"]["local"]
    ]
    assert [max(range(3), key=row.__getitem__) for row in likelihoods] == expected["choices"]


def test_the_text_generation_pipeline(folder, student):
    generate = pipeline(
        "text-generation",
        model=str(folder),
        trust_remote_code=True,
        device="cpu",
        dtype=torch.float32,
    )
    [made] = generate("The sea was", max_new_tokens=8, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The sea was", return_tensors="pt").input_ids
    expected = student.generate(ids, max_new_tokens=8, do_sample=False)
    assert made["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_a_static_cache_generates_the_same(student, ids):
    runs = [
        student.generate(
            ids[:2, :9], max_new_tokens=12, min_new_tokens=12, do_sample=False, **cache
        )
        for cache in ({}, {"cache_implementation": "static"})
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_left_padding_changes_nothing(make_teacher, ids, family):
    model, _ = convert(
        make_teacher(family), KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256
    )
    short, long = ids[0, :6], ids[1, :11]
    padded = torch.stack([torch.cat([torch.zeros(5, dtype=torch.long), short]), long])
    mask = torch.tensor([[0] * 5 + [1] * 6, [1] * 11])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    found = output(model, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found[0, 5:], output(model, short[None])[0], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(found).all()
    made = model.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    alone = model.generate(
        short[None], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert torch.equal(made[0, 11:], alone[0, 6:])


# training


class Rows(Dataset):
    def __init__(self, ids, labels):
        self.ids, self.labels = ids, labels

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def arguments(out, **more):
    common = {
        "report_to": [],
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "use_cpu": True,
        "logging_steps": 1,
    }
    return TrainingArguments(
        output_dir=str(out), **{**common, "learning_rate": 0.003, "disable_tqdm": True, **more}
    )


def test_trainer_trains_one_epoch(student, ids, tmp_path):
    many = ids.repeat(8, 1)
    trainer = Trainer(
        student, arguments(tmp_path / "run", save_strategy="epoch"), train_dataset=Rows(many, many)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 16 and losses[-1] < losses[0]
    trainer.save_model(tmp_path / "done")
    again = load(tmp_path / "done").eval()
    assert torch.equal(output(again, ids), output(student.eval(), ids))
    assert (
        tmp_path / "run" / "checkpoint-16" / "modeling.py"
    ).is_file()  # its checkpoints load as well


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_classification_head_is_trained_on_a_converted_model(make_teacher, ids, tmp_path, family):
    convert(make_teacher(family), KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256)[
        0
    ].save_pretrained(tmp_path / "student")
    model = load(tmp_path / "student", AutoModelForSequenceClassification, num_labels=2)
    many = ids.repeat(6, 1)
    labels = (many[:, -1] % 2).long()
    trainer = Trainer(
        model, arguments(tmp_path / "run", save_strategy="no"), train_dataset=Rows(many, labels)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    trainer.save_model(tmp_path / "done")
    again = load(tmp_path / "done", AutoModelForSequenceClassification).eval()
    assert again.config.num_labels == 2
    assert torch.equal(output(again, ids), output(model.eval(), ids))


# a teacher that does not fit


def test_a_teacher_on_the_disk_teaches_the_same(teacher_folder, student, ids, tmp_path):
    """Its blocks are read from the disk as they run; objectives need nothing else of it."""
    name = teacher_folder("llama")
    here = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, device_map=places, offload_folder=tmp_path
    )
    assert any(parameter.is_meta for parameter in spread.parameters())
    assert torch.equal(output(spread, ids), output(here, ids))
    for objective, stage in ((layer_wise, "layer-wise"), (logits, "logits")):
        settings = Stage(name=stage, tokens=1, learning_rate=1)
        losses = [
            objective(make_step(settings, teacher, student, student.kernel_ffns(), ids))
            for teacher in (here, spread)
        ]
        assert torch.equal(*losses)
    with pytest.raises(InputError, match="offloaded, expected it in memory"):
        convert(spread, KernelFFNConfig(), calibration_ids=ids)


# the surgery as a file


def test_export_and_apply_give_the_student_back(
    folder, teacher_folder, tmp_path, monkeypatch, capsys
):
    file, out = tmp_path / "surgery.safetensors", tmp_path / "again"
    assert run(monkeypatch, "export", folder, file) == 0
    assert file.stat().st_size < 0.5 * (folder / "model.safetensors").stat().st_size
    assert run(monkeypatch, "apply", file, teacher_folder("llama"), out) == 0
    mine, theirs = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    assert mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name]) for name in mine
    )
    assert (
        json.loads((out / "config.json").read_text())["kernel_ffn"]
        == json.loads((folder / "config.json").read_text())["kernel_ffn"]
    )
    assert all(finding.good for finding in verify_folder(out))


def test_apply_refuses_another_base(folder, teacher_folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "surgery.safetensors"
    assert run(monkeypatch, "export", folder, file) == 0
    other = shutil.copytree(teacher_folder("llama"), tmp_path / "other")
    tiny_teacher(
        "llama", seed=1, vocab_size=4096, bos_token_id=0, eos_token_id=0, pad_token_id=None
    ).save_pretrained(other)
    capsys.readouterr()
    for teacher, said in (
        (other, "another base model"),
        (teacher_folder("gpt2"), "expected the 'llama'"),
        (folder, "converted already"),
    ):
        assert run(monkeypatch, "apply", file, teacher, tmp_path / "out") == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_export_is_refused(student, llama, teacher_folder, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder("llama"), dtype=torch.float32)
    file = tmp_path / "surgery.safetensors"
    export_surgery(student, file)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    entry = json.loads(about["kernel_ffn"])

    def changed(change):
        made = json.loads(json.dumps(entry))
        change(made, next(iter(made["layers"].values())))
        return {**about, "kernel_ffn": json.dumps(made)}

    less = {name: tensor for name, tensor in tensors.items() if not name.endswith("units")}
    cases = [
        (tensors, {}),
        (tensors, {**about, "kernel_ffn": "[" * 10**5}),
        (tensors, {**about, "kernel_ffn": "{}"}),
        (tensors, {**about, "fingerprint": "0"}),
        (tensors, changed(lambda e, y: y.update(prototypes=2**31 - 1))),
        (tensors, changed(lambda e, y: y.update(prototypes="1"))),
        (tensors, changed(lambda e, y: e.update(format=7))),
        (tensors, changed(lambda e, y: e.update(layers={}))),
        (tensors, changed(lambda e, y: y["settings"].update(kernel="__import__('os')"))),
        (less, about),
    ]
    for content, metadata in cases:
        save_file(content, file, metadata=metadata)
        with pytest.raises(InputError):
            apply_surgery(file, teacher)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged"):
        apply_surgery(file, teacher)


# a hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; keeps the files of every repository in
    ``server.files``."""

    def log_message(self, *arguments):
        pass

    def answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"id": "me/student", "sha": "0", "siblings": [], "name": "me", "type": "user"})

    def do_HEAD(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        length = self.headers.get("Content-Length")
        if length is not None:
            body = self.rfile.read(int(length))
        else:  # chunked
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        address = f"http://127.0.0.1:{self.server.server_port}/me/student"
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        if self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(
                        entry["value"]["content"]
                    )
            return self.answer(
                {"commitUrl": f"{address}/commit/0", "commitOid": "0", "success": True}
            )
        return self.answer(
            {"url": address, "name": "me/student", "id": "me/student", "errors": [], "warnings": []}
        )


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def online(hub, *command):
    """Run Python in a process that takes ``hub`` for the hub."""
    environment = dict(
        os.environ,
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
        HF_TOKEN="hf_none",
        HF_HUB_OFFLINE="0",
    )
    environment["HF_HUB_DISABLE_XET"] = "1"
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_push_uploads_everything_with_a_card(folder, hub, tmp_path, ids):
    report = {"tokens": 1000, **dict.fromkeys(FIGURES, 0.125)}
    (tmp_path / "report.json").write_text(json.dumps(report))
    done = online(
        hub,
        "-m",
        "hf_kernel_ffn",
        "push",
        folder,
        "me/student",
        "--report",
        tmp_path / "report.json",
        "--base-model",
        "someone/llama",
    )
    assert done.returncode == 0, done.stderr
    assert set(hub.files) == {file.name for file in folder.iterdir()}
    card = hub.files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers" and front["base_model"] == "someone/llama"
    assert "| kl | 0.1250 |" in card and "over 1,000 predicted tokens" in card
    assert "| layers.1.mlp | half-yat | softmax | mass | polarised | fixed |" in card
    assert 'from_pretrained("me/student", trust_remote_code=True)' in card
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in hub.files.items():
        (fetched / name).write_bytes(content)
    assert all(finding.good for finding in verify_folder(fetched))
    assert torch.equal(output(load(fetched), ids), output(load(folder), ids))


@pytest.mark.slow
def test_push_to_hub_of_a_model_uploads_what_loads(folder, hub, tmp_path, ids):
    code = f"""
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True).push_to_hub("me/student")
"""
    done = online(hub, "-c", code)
    assert done.returncode == 0, done.stderr
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in hub.files.items():
        (fetched / name).write_bytes(content)
    assert all(finding.good for finding in verify_folder(fetched))
    assert torch.equal(output(load(fetched), ids), output(load(folder), ids))


def test_a_hub_that_refuses_is_one_error(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "report.json").write_text("{}")
    assert run(monkeypatch, "push", folder, "me/student", "--report", tmp_path / "report.json") == 2
    assert "no evaluation" in capsys.readouterr().err
    assert run(monkeypatch, "push", tmp_path, "me/student", "--base-model", "x") == 2
    assert capsys.readouterr().err.count("\n") == 1
