"""A streamed conversion writes what one in memory writes, byte for byte, and holds little."""

import gc
import json
import sys

import pytest
import tiny_families
import torch
from safetensors.torch import load_file, save_file

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.cli.app import main
from hf_kernel_ffn.conversion import streaming
from hf_kernel_ffn.conversion.streaming import convert_streamed
from hf_kernel_ffn.conversion.tensor_writer import Writer
from hf_kernel_ffn.families.task_classes import get_stock_heads
from hf_kernel_ffn.storage.checkpoint import save_converted
from hf_kernel_ffn.storage.files import new_folder
from hf_kernel_ffn.storage.loading import load_student, load_teacher
from hf_kernel_ffn.storage.verification import verify_folder

IDS = torch.randint(3, 300, (12, 32), generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "phi3": "AutoModelForCausalLM",
    "gemma2": "AutoModelForCausalLM",
    "gemma3_text": "AutoModelForCausalLM",
    "bloom": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "modernbert": "AutoModelForSequenceClassification",
    "mixtral": "AutoModelForCausalLM",
    "qwen3_moe": "AutoModelForCausalLM",
    "olmoe": "AutoModelForCausalLM",
}
"""Plain, gated, fused, split and expert FFNs; heads that generate, fill in and classify."""
REFUSED = {
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModel",
    "albert": "AutoModel",
    "clip": "AutoModel",
}
"""Two stacks, patches, a shared FFN, two stacks side by side."""


def folder_bytes(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tokenizer):
    """The folder of a tiny random model of a family, saved with the given arguments."""

    def save(family, auto=None, **options):
        folder = tmp_path_factory.mktemp("stored") / family
        changes = {"vocab_size": options.pop("vocab_size")} if "vocab_size" in options else {}
        model = tiny_families.tiny(family, auto or FAMILIES[family], **changes)
        model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def both(source, folder, config=None, layers=None, dtype="float32", **options):
    """Files of the conversion in memory and of the streamed one, by name; with tied rows, the
    default, unless ``config`` says otherwise."""
    student, report = convert(load_teacher(str(source), dtype), config, layers, **options)
    with new_folder(folder / "whole") as made:
        save_converted(
            student, str(source), made, place=folder / "streamed", conversion=report.to_dict()
        )
    convert_streamed(str(source), folder / "streamed", config, layers, dtype=dtype, **options)
    return folder_bytes(folder / "whole"), folder_bytes(folder / "streamed")


def check_equal(expected, found):
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings, layers, calibrated",
    [
        ({}, None, True),
        ({}, None, False),
        ({"simplex": "threshold", "top_k": 5, "intensity": "gate"}, "0", True),
        ({"simplex": "entmax-1.5"}, "1", True),
        (None, None, True),
        (None, None, False),
    ],
    ids=["all", "all, not calibrated", "0", "1", "tied", "tied, not calibrated"],
)
def test_the_same_bytes_as_in_memory(stored, family, settings, layers, calibrated, tmp_path):
    source = stored(family)
    options = (
        dict(calibration_ids=IDS, calibration_tokens=384)
        if calibrated
        else dict(calibration_tokens=0)
    )
    config = None if settings is None else KernelFFNConfig(**settings)
    expected, found = both(source, tmp_path, config, layers, **options)
    check_equal(expected, found)
    assert all(finding.good for finding in verify_folder(tmp_path / "streamed"))
    assert {
        "checksums.json",
        "README.md",
        "tokenizer.json",
        "conversion.json",
        f"modeling_kernel_{family}.py",
    } <= found.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    sorted({*tiny_families.FAMILIES} - {*FAMILIES} - {*REFUSED, "clip_vision_model", "whisper"}),
)
@pytest.mark.parametrize("config", [None, KernelFFNConfig()], ids=["tied", "free"])
def test_the_same_bytes_in_every_other_family(stored, family, config, tmp_path):
    auto = next(auto for auto in tiny_families.HEADS if auto in get_stock_heads(family))
    options = dict(calibration_ids=IDS, calibration_tokens=384)
    check_equal(*both(stored(family, auto), tmp_path, config, **options))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_and_half_precision(stored, family, dtype, tmp_path):
    source = stored(
        family, max_shard_size="20KB", dtype=torch.bfloat16 if dtype == "float32" else torch.float32
    )
    assert len(list(source.glob("*.safetensors"))) > 2
    check_equal(*both(source, tmp_path, dtype=dtype, calibration_ids=IDS, calibration_tokens=384))
    load_student(str(tmp_path / "streamed"))  # an error if a tensor is missing or too many


def test_experts_in_the_names_that_they_have_on_the_hub(stored):
    names = load_file(stored("mixtral") / "model.safetensors")
    assert any(".block_sparse_moe.experts.0.w1." in name for name in names)


@pytest.mark.parametrize(
    "family, auto",
    [*REFUSED.items(), ("bart", "AutoModelForSeq2SeqLM"), ("clip_vision_model", "AutoModel")],
)
def test_models_that_are_not_one_stack_of_blocks_are_refused(stored, family, auto, tmp_path):
    assert auto in get_stock_heads(family)
    with pytest.raises(InputError, match="found a .*, expected one stack of blocks"):
        convert_streamed(str(stored(family, auto)), tmp_path / "out", calibration_tokens=0)
    assert not (tmp_path / "out").exists()


def test_text_is_needed(stored, tmp_path):
    with pytest.raises(InputError, match="calibration text, or 0"):
        convert_streamed(str(stored("llama")), tmp_path / "out")


def rewritten(folder, change):
    """The weights of ``folder``, changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop(LAST), "no whole tensor 'model.layers.1.mlp.down_proj.weight'"),
        (lambda t: t.update({LAST: t[LAST][:5].clone()}), "misshapen tensor"),
        (
            lambda t: t[LAST].fill_(torch.nan),
            "NaN or infinite values in model.layers.1.mlp.down_proj.weight",
        ),
        (
            lambda t: t["model.embed_tokens.weight"].fill_(torch.inf),
            "NaN or infinite values in model.embed_tokens.weight",
        ),
        (lambda t: t.update({LAST: t[LAST].to(torch.int8)}), "of dtype I8"),
    ],
    ids=["missing", "misshapen", "NaN", "infinite", "int8"],
)
def test_damaged_tensors_are_named_and_nothing_is_left(stored, change, said, tmp_path):
    source = stored("llama")
    rewritten(source, change)
    with pytest.raises(InputError, match=said) as caught:
        convert_streamed(str(source), tmp_path / "out", calibration_tokens=0)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_truncated_files_are_refused(stored, tmp_path):
    source = stored("llama")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        convert_streamed(str(source), tmp_path / "out", calibration_tokens=0)
    file.unlink()
    with pytest.raises(InputError, match="no model.safetensors"):
        convert_streamed(str(source), tmp_path / "out", calibration_tokens=0)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(stored, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        convert_streamed(str(stored("llama")), tmp_path / "out", calibration_tokens=0)
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_stopped_half_way_nothing_is_left(stored, tmp_path, monkeypatch):
    from hf_kernel_ffn.conversion import streaming

    whole = streaming.convert_block

    def stop(model, ffns, *args):
        if ffns[0].number == 1:
            assert not (tmp_path / "out").exists()
            raise KeyboardInterrupt
        return whole(model, ffns, *args)

    monkeypatch.setattr(streaming, "convert_block", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_streamed(str(stored("llama")), tmp_path / "out", calibration_tokens=0)
    assert not list(tmp_path.iterdir())


def test_the_index_of_a_sharded_output_names_every_tensor(stored, tmp_path, monkeypatch):
    from hf_kernel_ffn.conversion import tensor_writer

    plan = tensor_writer.split_state_dict_into_shards_factory
    monkeypatch.setattr(
        tensor_writer,
        "split_state_dict_into_shards_factory",
        lambda *a, **k: plan(*a, **{**k, "max_shard_size": 20_000}),
    )
    convert_streamed(str(stored("llama")), tmp_path / "out", calibration_tokens=0)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (
        len(set(index["weight_map"].values())) > 2
        and not (tmp_path / "out" / "model.safetensors").exists()
    )
    assert all(finding.good for finding in verify_folder(tmp_path / "out"))
    load_student(str(tmp_path / "out"))  # an error if a tensor is missing or too many


def test_the_command(stored, text_file, tmp_path, monkeypatch, capsys):
    source = str(stored("llama", vocab_size=4096))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-kernel-ffn", "convert", source, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().err

    options = ("--calibration-text", text_file, "--calibration-tokens", 256, "--layers", 1)
    assert (
        run(tmp_path / "whole", *options)[0]
        == run(tmp_path / "streamed", *options, "--stream")[0]
        == 0
    )
    whole, streamed = (folder_bytes(tmp_path / name) for name in ("whole", "streamed"))
    whole["README.md"] = whole["README.md"].replace(b"whole", b"streamed")  # its own place
    check_equal(whole, streamed)
    assert run(tmp_path / "none", "--calibration-tokens", 0, "--stream")[0] == 0
    for options, said in (
        (("--stream",), "calibration text, or 0"),
        (("--stream", "--calibration-tokens", 0, "--device", "nowhere"), "'nowhere' unusable"),
        (("--calibration-tokens", 17), "expected 0, or 256 and more"),
        (("--calibration-tokens", 0, "--calibration-text", text_file), "leave one out"),
    ):
        code, error = run(tmp_path / "refused", *options)
        assert code == 2 and said in error and len(error.splitlines()) == 1
        assert not (tmp_path / "refused").exists()


def test_an_error_in_the_last_write_is_not_lost(tmp_path):
    def pieces():
        yield torch.ones(2)
        raise OSError("full")

    with (
        pytest.raises(OSError, match="full"),
        Writer(tmp_path, {"a": torch.empty(4, device="meta")}) as writer,
    ):
        writer.write("a", pieces())
    with Writer(tmp_path, {"a": torch.empty(4, device="meta")}) as writer:
        writer.write("a", [torch.ones(2), torch.zeros(2)])
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("family", ["llama", "bert", "mixtral"])
def test_what_is_held_does_not_grow_with_the_blocks(tokenizer, tmp_path, monkeypatch, family):
    """Neither a block that is done nor the FFN that was taken out of it."""

    def weigh():
        gc.collect()
        # exactly these types: what an earlier test compiled leaves FakeTensors behind, which have
        # no storage to ask
        tensors = [
            o
            for o in gc.get_objects()
            if type(o) in (torch.Tensor, torch.nn.Parameter) and not o.is_meta
        ]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        held.append(sum(storages.values()))

    held = []
    model = tiny_families.tiny(family, FAMILIES[family], num_hidden_layers=8)
    block = sum(p.nbytes for p in model.parameters()) // 8
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "stored")
    monkeypatch.setattr(streaming, "_give_back", weigh)
    convert_streamed(str(tmp_path / "stored"), tmp_path / "out", calibration_tokens=0)
    # The next block may have been read ahead already, and this one may wait to be written; kept
    # blocks would be six.
    assert len(held) == 8 and held[6] < held[0] + 3 * block
