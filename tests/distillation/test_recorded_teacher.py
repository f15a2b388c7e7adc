"""A recorded teacher stands in for a running one: what is recorded, learnt from it, refused."""

import errno
import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from teachers import RECIPES
from transformers import AutoModelForCausalLM

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.cli import app as cli
from hf_kernel_ffn.distillation import Recipe, distill, load_recipe, recording
from hf_kernel_ffn.distillation import run as run_module
from hf_kernel_ffn.distillation.divergence import kl, top_and_rest_log_probs
from hf_kernel_ffn.distillation.objectives import OBJECTIVES
from hf_kernel_ffn.distillation.recording import record
from hf_kernel_ffn.distillation.records import Record, can_do_without_teacher
from hf_kernel_ffn.distillation.trainer import train
from hf_kernel_ffn.text.packing import pack_blocks, read_token_ids

SHIPPED, TEXT = RECIPES / "teachers" / "llama", RECIPES / "text"
VOCABULARY = 4096
LOGITS = {"name": "logits", "tokens": 384, "learning_rate": 0.002, "batch_size": 2}  # six steps
STEPS = 6
WEIGHTS = "model.safetensors"
quietly = partial(record, exact=True, say=lambda line: None)
pack = partial(record, say=lambda line: None)


@pytest.fixture(scope="module")
def short_text(tmp_path_factory):
    """Some twenty sequences of 32 tokens."""
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text(
        (TEXT / "books-distil.txt").read_text(encoding="utf-8")[:2500], encoding="utf-8"
    )
    return file


@pytest.fixture(scope="module")
def stock():
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)


@pytest.fixture(scope="module")
def student_folder(stock, tokenizer, tmp_path_factory):
    """A conversion that has much to learn, of a gated FFN without its pairs; smooth, so that
    roundings stay what they are."""
    folder = tmp_path_factory.mktemp("student")
    ids = read_token_ids(tokenizer, [str(TEXT / "books-distil.txt")], 128, 512)
    convert(stock, KernelFFNConfig(init="single"), calibration_ids=ids, calibration_tokens=512)[
        0
    ].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(short_text, student_folder):
    """A recipe of one logits stage, with changes to it and to the rest."""

    def make(out, stage=(), **changes):
        content = {
            "teacher": str(SHIPPED),
            "student": str(student_folder),
            "data": {"train": str(short_text), "sequence_length": 32, "shuffle_buffer": 8},
            "stages": [{**LOGITS, **dict(stage)}],
            "output_dir": str(out),
            "save_every_tokens": 128,  # two steps
        }
        return Recipe(**{**content, **changes})

    return make


@pytest.fixture(scope="module")
def folder(recipe, tmp_path_factory):
    """A record of the sixteen likeliest tokens."""
    out = tmp_path_factory.mktemp("record") / "record"
    quietly(recipe("nowhere"), out, 16)
    return out


@pytest.fixture
def copy(folder, tmp_path):
    """One to be spoilt, and how its only shard is."""
    new = tmp_path / "copy"
    new.mkdir()
    for file in folder.iterdir():
        (new / file.name).write_bytes(file.read_bytes())

    def change(edit):
        tensors = load_file(new / "00000.safetensors")
        edit(tensors)
        save_file(tensors, new / "00000.safetensors")
        return new

    change.folder = new
    return change


def run(recipe, **more):
    return distill(recipe, progress=False, **more)


def weights(folder):
    return load_file(folder / "model.safetensors")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)


# the divergence


@st.composite
def distributions(draw):
    """Logits of a student and a teacher (3, vocabulary), the teacher's k likeliest tokens in
    ascending order."""
    vocabulary = draw(st.integers(2, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0, 100.0]))
    student, teacher = (
        scale * torch.randn(3, vocabulary, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    top = teacher.topk(draw(st.integers(1, vocabulary))).indices.sort().values
    return student.requires_grad_(True), teacher, top


def full(student, teacher):
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@given(distributions())
def test_the_lumped_divergence_is_a_lower_bound(drawn):
    student, teacher, top = drawn
    found, bound = (
        kl(top_and_rest_log_probs(student, top), top_and_rest_log_probs(teacher, top)),
        full(student, teacher),
    )
    assert (found <= bound + 1e-12 * (1 + bound)).all() and (found >= -1e-12).all()
    if top.shape[-1] >= student.shape[-1] - 1:  # nothing is lumped
        torch.testing.assert_close(found, bound, rtol=1e-10, atol=1e-12)


@given(distributions())
def test_the_lumped_divergence_has_the_gradient_of_its_formula(drawn):
    student, teacher, top = drawn
    k, vocabulary = top.shape[-1], student.shape[-1]
    [mine] = torch.autograd.grad(
        kl(top_and_rest_log_probs(student, top), top_and_rest_log_probs(teacher, top)).sum(),
        student,
    )
    p, q = (logits.softmax(-1).gather(-1, top) for logits in (teacher, student))
    naive = (p * (p / q).log()).sum(-1)
    if k < vocabulary:
        naive = naive + (1 - p.sum(-1)) * ((1 - p.sum(-1)) / (1 - q.sum(-1))).log()
    [expected] = torch.autograd.grad(naive.sum(), student)
    trusted = expected.isfinite() & (
        (1 - q.sum(-1, keepdim=True) > 1e-6) | (k == vocabulary)
    )  # where 1 - x has digits left
    assert mine.isfinite().all()
    torch.testing.assert_close(mine[trusted], expected[trusted], rtol=1e-6, atol=1e-8)


def test_what_is_left_of_a_sure_prediction_is_not_rounded_away():
    """Two tokens of a probability below float32's step at 1, of which one is recorded."""
    logits = torch.tensor([[0.0, -30.0, -31.0]], requires_grad=True)
    found = top_and_rest_log_probs(logits, torch.tensor([[0, 1]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, -30.0, -31.0]]))
    found[0, 2].backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 0.0, 1.0]]))


# what is recorded


def test_a_record_has_what_the_stages_read_once(recipe, monkeypatch, tmp_path):
    """Behind three layer-wise parts, in two logits stages; the text is read more than once."""
    layer_wise = {
        "name": "layer-wise",
        "tokens": 65,
        "learning_rate": 1e-9,
        "batch_size": 1,
        "layers_at_once": 2,
    }
    stages = [
        layer_wise,
        LOGITS,
        {**layer_wise, "layers_at_once": None},
        {**LOGITS, "tokens": 800, "batch_size": 3},
    ]
    read = []

    def note(step):
        read.extend(map(tuple, step.batch.tolist()))
        return OBJECTIVES["layer-wise"](step)  # the quicker one

    monkeypatch.setitem(OBJECTIVES, "logits", note)
    short = recipe(tmp_path / "out", stages=stages)
    run(short)
    quietly(short, tmp_path / "record", 2)
    recorded = Counter(
        map(tuple, load_file(tmp_path / "record" / "00000.safetensors")["input_ids"].tolist())
    )
    assert set(recorded) == set(read) and set(recorded.values()) == {1}
    assert len(read) > len(recorded)


def test_without_a_student_the_layers_to_convert_are_counted(recipe, stock, tmp_path):
    stages = [
        {
            "name": "layer-wise",
            "tokens": 32,
            "learning_rate": 1,
            "batch_size": 1,
            "layers_at_once": 1,
        },
        LOGITS,
    ]
    for layers, parts in ((None, 4), ("1-3", 3), ([2], 1)):
        settings = {} if layers is None else {"layers": layers}
        whole = recipe(tmp_path, stages=stages, student=None, kernel_ffn=settings)
        assert recording.spans_of_logits_stages(whole, stock, 1) == [range(parts, parts + 12)]
    assert recording.spans_of_logits_stages(whole, stock, 3) == [
        range(3, 3 + 12)
    ]  # two steps of three times two
    assert recording.spans_of_logits_stages(recipe(tmp_path, {"tokens": 385}), stock, 4) == [
        range(16)
    ]


def test_shards_are_what_one_file_would_be(recipe, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(recording, "SHARD_BYTES", 4 * 32 * (8 * 16 + 8))  # four sequences
    quietly(recipe("nowhere"), tmp_path / "record", 16)
    files = sorted((tmp_path / "record").glob("*.safetensors"))
    parts, whole = [load_file(file) for file in files], load_file(folder / "00000.safetensors")
    assert [len(part["top"]) for part in parts] == [4, 4, 4]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)
    one, other = Record(tmp_path / "record"), Record(folder)
    ids = whole["input_ids"][[9, 0, 5]].long()
    for found, expected in zip(one.look_up(ids, VOCABULARY), other.look_up(ids, VOCABULARY)):
        assert torch.equal(found, expected)


def test_a_record_is_the_teachers_predictions(recipe, folder, stock):
    ids = load_file(folder / "00000.safetensors")["input_ids"][[3, 7]].long()
    top, found = Record(folder).look_up(ids, VOCABULARY)
    with torch.no_grad():
        p = stock(ids).logits.double().softmax(-1)
    likeliest = p.topk(16).indices.sort().values
    assert torch.equal(top, likeliest)
    expected = p.gather(-1, likeliest)
    torch.testing.assert_close(found[..., :-1].double().exp(), expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(
        found[..., -1].double().exp(), 1 - expected.sum(-1), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize(
    ("options", "each", "total"), [(["--exact"], 32, "0.1 MiB"), ([], 14, "0.0 MiB")]
)
def test_the_command_states_the_size(
    recipe, short_text, tokenizer, capsys, tmp_path, options, each, total
):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(tmp_path / "out", {"tokens": 6400}).model_dump_json())  # JSON is YAML
    cli.app(
        [
            "record",
            str(file),
            str(tmp_path / "record"),
            "stages.0.tokens=3200",
            "--top-k",
            "3",
            *options,
        ],
        standalone_mode=False,
    )
    printed = capsys.readouterr().out
    assert f"at most 100 sequences of 32 tokens, {each} bytes per token" in printed
    assert f"{total} in all" in printed
    count = len(list(pack_blocks(tokenizer, [str(short_text)], 32)))
    assert (
        "the recorded tokens hold" in printed
        and f"{count} sequences, none twice" in printed
        and f"saved in {tmp_path / 'record'}" in printed
    )
    size = (tmp_path / "record" / "00000.safetensors").stat().st_size
    assert 0 < size - count * 32 * each < 1000  # a header


# what is learnt from it


def test_all_of_the_vocabulary_is_the_running_teacher(
    recipe, stock, student_folder, tokenizer, monkeypatch, tmp_path
):
    settings = {
        "temperature": 2.0,
        "cross_entropy": 0.25,
        "optimizer": "adamw",
    }  # Muon turns roundings into directions
    quietly(recipe("nowhere", settings), tmp_path / "record", VOCABULARY)
    start, one, other = (load(student_folder) for _ in range(3))
    losses = []
    noted = [lambda report: losses.append(report.loss)]
    train(recipe("nowhere", settings), tokenizer, stock, one, listeners=noted)

    def never(*arguments):
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(stock, "forward", never)
    train(
        recipe("nowhere", {**settings, "stored_logits": str(tmp_path / "record")}),
        tokenizer,
        stock,
        other,
        listeners=noted,
    )
    # Losses and gradients of one step differ by 1e-6 of themselves: roundings of 4096
    # log-probabilities in another order. AdamW divides every number of a gradient by its own size,
    # the least exact ones too.
    assert losses[STEPS:] == pytest.approx(losses[:STEPS], rel=1e-5) and len(losses) == 2 * STEPS
    for path, ffn in one.kernel_ffns().items():
        for name, parameter in ffn.named_parameters():
            begun = start.base_model.get_submodule(path).get_parameter(name)
            ended = other.base_model.get_submodule(path).get_parameter(name)
            way = (parameter - begun).norm()
            assert way > 0 and (ended - parameter).norm() < 1e-3 * way, (path, name)


def test_a_packed_record_is_the_exact_one_to_millionths_of_a_nat(recipe, folder, tmp_path):
    pack(recipe("nowhere"), tmp_path / "packed", 16)
    exact, packed = Record(folder), Record(tmp_path / "packed")
    assert packed.places == exact.places
    ids = load_file(folder / "00000.safetensors")["input_ids"].long()
    top, log_probabilities = packed.look_up(ids, VOCABULARY)
    expected_top, expected = exact.look_up(ids, VOCABULARY)
    assert torch.equal(top, expected_top)
    assert 0 < kl(log_probabilities, expected).mean() < 2e-6
    sizes = [(out / "00000.safetensors").stat().st_size for out in (tmp_path / "packed", folder)]
    assert sizes[0] < 0.45 * sizes[1]


@pytest.mark.parametrize("name", ["top", "probabilities"])
def test_a_tampered_packed_record_is_refused(recipe, tmp_path, name):
    folder = tmp_path / "packed"
    pack(recipe("nowhere"), folder, 16)
    file = folder / "00000.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][..., 1:].contiguous()}, file)
    assert f"found {folder} damaged" in refusal(Record, folder)
    if name == "top":  # other bits, of the right shape
        save_file({**tensors, name: torch.zeros_like(tensors[name])}, file)
        ids = tensors["input_ids"][:2].long()
        assert f"found {folder} damaged" in refusal(Record(folder).look_up, ids, VOCABULARY)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "packed"])
def test_64_tokens_of_4096_teach_nearly_as_much(
    recipe, student_folder, stock, tokenizer, tmp_path, exact
):
    data = {"train": str(TEXT / "books-distil.txt"), "sequence_length": 64, "shuffle_buffer": 64}
    stage = {"tokens": 8192, "batch_size": 8, "learning_rate": 0.01}
    make = quietly if exact else pack
    make(recipe("nowhere", stage, data=data), tmp_path / "record", 64)
    held_out = read_token_ids(tokenizer, [str(TEXT / "books-test.txt")], 64, 2048)

    def divergence(student):
        with torch.no_grad():
            return full(student(held_out).logits, stock(held_out).logits).mean().item()

    start = divergence(load(student_folder))
    complete = divergence(load(run(recipe(tmp_path / "complete", stage, data=data))))
    stored = divergence(
        load(
            run(
                recipe(
                    tmp_path / "stored",
                    {**stage, "stored_logits": str(tmp_path / "record")},
                    data=data,
                )
            )
        )
    )
    assert complete < 0.8 * start
    assert abs(stored - complete) < 0.15 * (start - complete)


class Interrupted(BaseException):
    """As a KeyboardInterrupt: nobody catches it."""


@pytest.mark.parametrize("at", [2, 5])
def test_a_resumed_run_ends_bit_equal(recipe, folder, finished, monkeypatch, tmp_path, at):
    same, calls = recipe(tmp_path / "out", {"stored_logits": str(folder)}), iter(range(100))
    original = Record.look_up

    def interrupted(*arguments):
        if next(calls) == at:
            raise Interrupted
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "look_up", interrupted)
        with pytest.raises(Interrupted):
            run(same)
    one = weights(run(same, resume=True))
    assert one.keys() == finished.keys() and all(
        torch.equal(one[name], finished[name]) for name in one
    )


@pytest.fixture(scope="module")
def finished(recipe, folder, tmp_path_factory):
    """Weights of an uninterrupted run."""
    return weights(
        run(recipe(tmp_path_factory.mktemp("finished") / "out", {"stored_logits": str(folder)}))
    )


def test_a_loss_that_is_not_finite_is_looked_into(recipe, folder, monkeypatch, tmp_path):
    monkeypatch.setitem(OBJECTIVES, "logits", lambda step: torch.tensor(float("nan")))
    with pytest.raises(
        FloatingPointError, match="loss nan at step 0 of stage 'logits', in no FFN's own numbers"
    ):
        run(recipe(tmp_path / "out", {"stored_logits": str(folder)}))


@pytest.mark.slow
def test_two_processes_look_up_their_own(recipe, student_folder, tmp_path):
    stage = {
        "tokens": 320,
        "batch_size": 2,
        "optimizer": "adamw",
    }  # twelve sequences; one process would read ten
    files = []
    for name, stored in (("running", None), ("stored", str(tmp_path / "record"))):
        whole = recipe(tmp_path / name, {**stage, "stored_logits": stored})
        if stored:
            quietly(whole, stored, VOCABULARY, 2)
        file = tmp_path / f"{name}.yaml"
        file.write_text(whole.model_dump_json())
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
        ]
        environment = dict(os.environ, ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1")
        command = [*launcher, RECIPES.parent / "scripts" / "distill.py", file]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        files.append(weights(tmp_path / name))
    start, (one, other) = weights(student_folder), files
    for name in start:
        if name.endswith(
            "prototypes.weight"
        ):  # stored in bfloat16: a rounding is a large part of a short way
            way = (one[name] - start[name]).float().norm()
            assert way > 0 and (other[name] - one[name]).float().norm() < 0.2 * way


# refusals


def refusal(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_a_logits_stage_has_stored_logits(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(tmp_path / "out").model_dump_json())
    message = refusal(
        load_recipe, file, ["stages.0.name=layer-wise", "stages.0.stored_logits=there"]
    )
    assert (
        "stages.0: stored_logits 'there' in a layer-wise stage" in message
        and "leave it out" in message
    )


def test_a_folder_that_is_no_record_is_refused(recipe, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path, SHIPPED):
        message = refusal(run, recipe(tmp_path / "out", {"stored_logits": str(path)}))
        assert f"found no record.json in {path}, expected" in message


def test_the_teachers_weights_are_not_loaded(recipe, folder, monkeypatch, tmp_path):
    stored = {"stored_logits": str(folder)}
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "can_do_without_teacher", lambda recipe: False)
        run(recipe(tmp_path / "loaded", stored))

    def never(*arguments):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(run_module, "load_teacher", never)
    run(recipe(tmp_path / "empty", stored))
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("loaded", "empty"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("change", ["student", "validation", "running", "shard", "dtype", "files"])
def test_the_teacher_is_loaded_where_its_weights_are_needed(
    recipe, folder, stock, tokenizer, tmp_path, change
):
    asked = recipe("nowhere", {"stored_logits": str(folder)})
    assert can_do_without_teacher(asked)
    stages = [asked.stages[0], asked.stages[0].model_copy(update={"stored_logits": None})]
    data = asked.data.model_copy(update={"validation": asked.data.train})
    stock.save_pretrained(tmp_path / "teacher", max_shard_size="1MB")
    tokenizer.save_pretrained(tmp_path / "teacher")
    changes = {
        "student": {"student": None},
        "validation": {"data": data},
        "running": {"stages": stages},
        "shard": {"shard": True},
        "dtype": {"dtype": "bfloat16"},
        "files": {"teacher": str(tmp_path / "teacher")},  # the same weights in other files
    }
    assert not can_do_without_teacher(asked.model_copy(update=changes[change]))


def test_the_same_weights_in_other_files_are_the_same_teacher(
    recipe, folder, stock, tokenizer, tmp_path
):
    stock.save_pretrained(tmp_path / "teacher", max_shard_size="1MB")
    tokenizer.save_pretrained(tmp_path / "teacher")
    stored = {"stored_logits": str(folder)}
    run(recipe(tmp_path / "out", stored, teacher=str(tmp_path / "teacher")))
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_a_record_of_something_else_is_refused(recipe, folder, teacher_folder, tmp_path):
    stored = {"stored_logits": str(folder)}
    data = recipe("nowhere").data.model_dump()
    other = {"teacher": str(teacher_folder("llama")), "student": None, "calibration_tokens": 256}
    for changed, reason in (
        (
            recipe(tmp_path / "out", stored, **other),
            f"found other weights, of {SHIPPED}, in {folder}, expected those of {other['teacher']}",
        ),
        (
            recipe(tmp_path / "out", {**stored, "temperature": 2.0}),
            f"found temperature 1.0 in {folder}, expected the stage's 2.0",
        ),
        (
            recipe(tmp_path / "out", stored, data={**data, "sequence_length": 16}),
            f"found sequences of 32 tokens in {folder}, expected the recipe's 16",
        ),
    ):
        message = refusal(run, changed)
        assert reason in message and "record again" in message


def test_a_sequence_that_is_not_there_is_refused(recipe, folder, text_file, tmp_path):
    data = {**recipe("nowhere").data.model_dump(), "train": str(text_file)}
    message = refusal(run, recipe(tmp_path / "out", {"stored_logits": str(folder)}, data=data))
    assert f"found a sequence that {folder} does not have" in message and "record again" in message


SPOILT = {
    "a tensor is missing": lambda tensors: tensors.pop("top"),
    "a tensor is too many": lambda tensors: tensors.update(more=torch.zeros(1)),
    "other ids": lambda tensors: tensors.update(input_ids=tensors["input_ids"].long()),
    "other probabilities": lambda tensors: tensors.update(
        log_probabilities=tensors["log_probabilities"].half()
    ),
    "fewer tokens": lambda tensors: tensors.update(top=tensors["top"][..., :3].contiguous()),
    "fewer sequences": lambda tensors: tensors.update(top=tensors["top"][:3].contiguous()),
    "ids that are one": lambda tensors: tensors.update(
        input_ids=torch.tensor(1, dtype=torch.int32)
    ),
    "ids that are flat": lambda tensors: tensors.update(input_ids=tensors["input_ids"].flatten()),
    "a token below the vocabulary": lambda tensors: tensors["top"][..., 0].fill_(-1),
    "a token above the vocabulary": lambda tensors: tensors["top"][..., -1].fill_(VOCABULARY),
    "a token twice": lambda tensors: tensors["top"][..., 1].copy_(tensors["top"][..., 0]),
    "a probability of nothing": lambda tensors: tensors["log_probabilities"].fill_(float("nan")),
    "too much probability": lambda tensors: tensors["log_probabilities"].add_(0.1),
}


@pytest.mark.parametrize("edit", SPOILT.values(), ids=SPOILT)
def test_a_tampered_record_is_refused(copy, edit):
    ids = load_file(copy.folder / "00000.safetensors")["input_ids"][:2].long()
    Record(copy.folder).look_up(ids, VOCABULARY)  # whole so far
    spoilt = copy(edit)
    message = refusal(lambda: Record(spoilt).look_up(ids, VOCABULARY))
    assert (
        f"found {spoilt} damaged" in message and "make it again by hf-kernel-ffn record" in message
    )


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_refused(copy, keep):
    file = copy.folder / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"found {copy.folder} damaged" in refusal(Record, copy.folder)
    file.unlink()
    assert f"found {copy.folder} damaged" in refusal(Record, copy.folder)


def test_a_shard_that_is_lost_on_the_way_is_named(copy):
    known, file = Record(copy.folder), copy.folder / "00000.safetensors"
    ids = load_file(file)["input_ids"][:2].long()
    file.unlink()
    assert f"found {copy.folder} damaged" in refusal(known.look_up, ids, VOCABULARY)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"shards": 2},
        {"shards": 0},
        {"top_k": "16"},
        {"top_k": 15},
        {"temperature": None},
        {"more": 1},
    ],
    ids=str,
)
def test_facts_that_are_none_are_refused(copy, changes):
    file = copy.folder / "record.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert f"found {copy.folder} damaged" in refusal(Record, copy.folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b"[" * 100_000], ids=["empty", "list", "no text", "nested"]
)
def test_facts_that_are_no_json_are_refused(copy, content):
    (copy.folder / "record.json").write_bytes(content)
    assert f"found {copy.folder} damaged" in refusal(Record, copy.folder)


def test_masked_models_are_refused(recipe, folder, tmp_path):
    bert = str(RECIPES / "teachers" / "bert")
    stored = recipe(
        tmp_path / "out",
        {"stored_logits": str(folder)},
        teacher=bert,
        student=None,
        calibration_tokens=256,
    )
    for call in (lambda: run(stored), lambda: quietly(stored, tmp_path / "record")):
        assert "found a BertForMaskedLM, whose masks are drawn anew" in refusal(call)
    assert not (tmp_path / "record").exists()


def test_what_cannot_be_recorded_is_refused(recipe, folder, monkeypatch, tmp_path):
    one, out = recipe("nowhere"), tmp_path / "record"
    assert "not empty" in refusal(quietly, one, folder)
    layer_wise = {**LOGITS, "name": "layer-wise"}
    assert "found logits stages at 0 temperatures" in refusal(
        quietly, recipe("nowhere", layer_wise), out
    )
    two = recipe("nowhere", stages=[LOGITS, {**LOGITS, "temperature": 2}])
    assert "found logits stages at 2 temperatures [1.0, 2.0]" in refusal(quietly, two, out)
    assert "expected 4097 tokens to choose from" in refusal(quietly, one, out, VOCABULARY + 1)
    long = recipe("nowhere", data={**one.data.model_dump(), "sequence_length": 1024})
    assert "found sequence_length 1024, expected at most the teacher's 512" in refusal(
        quietly, long, out
    )

    nowhere = recipe("nowhere", data={**one.data.model_dump(), "train": "nowhere.txt"})
    assert "found nowhere.txt unreadable as text" in refusal(quietly, nowhere, out)

    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(recording, "save_tensors", full)
    assert "No space left on device" in refusal(quietly, one, out)
    assert list(tmp_path.iterdir()) == []
