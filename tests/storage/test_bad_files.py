"""Bad files: one clear refusal each; nothing hangs, fills the memory, runs code, or loads."""

import json
import random
import resource
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from teachers import tiny_teacher
from transformers import AutoModelForCausalLM

from hf_kernel_ffn import InputError, KernelFFNConfig, convert
from hf_kernel_ffn.checkpoint_code.integrity import CHECKSUMS
from hf_kernel_ffn.cli.app import main
from hf_kernel_ffn.distillation import load_recipe
from hf_kernel_ffn.storage.loading import load_student
from hf_kernel_ffn.storage.verification import verify_folder

SHARDED, PLAIN, TIED = "sharded", "plain", "tied"


@pytest.fixture(scope="module")
def whole(ids, tmp_path_factory):
    """A converted model of free rows, in one file and in shards, and one of tied rows."""
    student, _ = convert(
        tiny_teacher("llama"), KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256
    )
    made = tmp_path_factory.mktemp("whole")
    student.save_pretrained(made / PLAIN)
    student.save_pretrained(made / SHARDED, max_shard_size="30KB")
    tied = KernelFFNConfig(rows="tied")
    student, _ = convert(tiny_teacher("llama"), tied, calibration_ids=ids, calibration_tokens=256)
    student.save_pretrained(made / TIED)
    return made


def shard(folder):
    files = sorted(folder.glob("*.safetensors"))
    return files[len(files) // 2]


def cut(share):
    def change(folder):
        file = shard(folder)
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return change


def flip(at):
    """Flip a bit of the byte at ``at(header length, size)``."""

    def change(folder):
        file = shard(folder)
        content = bytearray(file.read_bytes())
        content[at(int.from_bytes(content[:8], "little"), len(content))] ^= 4
        file.write_bytes(content)

    return change


def tensors(change):
    def changed(folder):
        file = shard(folder)
        found = load_file(file)
        change(found)
        save_file(found, file, metadata={"format": "pt"})

    return changed


def an_ffn(found, end="prototypes.weight"):
    return next(name for name in found if name.endswith(end))


def retyped(end, dtype):
    return tensors(
        lambda found: found.update({(name := an_ffn(found, end)): found[name].to(dtype)})
    )


def reshaped(end, change):
    return tensors(
        lambda found: found.update({(name := an_ffn(found, end)): change(found[name]).contiguous()})
    )


def header(change):
    """Rewrite the header of a shard, data as it is."""

    def changed(folder):
        file = shard(folder)
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        written = json.dumps(entries).encode()
        file.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])

    return changed


def first(entries):
    return entries[next(name for name in entries if name != "__metadata__")]


def in_json(name, change):
    def changed(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return changed


def raw(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def config(change):
    return in_json("config.json", change)


def entry(change):
    return in_json("config.json", lambda c: change(c["kernel_ffn"]))


def layer(change):
    return entry(lambda e: change(next(iter(e["layers"].values()))))


def index(change):
    return in_json("model.safetensors.index.json", change)


def first_file(content, name):
    content["weight_map"][next(iter(content["weight_map"]))] = name


def renamed_layer(path):
    return entry(lambda e: e["layers"].update({path: e["layers"].pop(next(iter(e["layers"])))}))


CODE = "__import__('pathlib').Path('executed').touch()"
HUGE = 10**12
INDEX = "model.safetensors.index.json"
DAMAGE = {
    # truncated
    "cut to nothing": (PLAIN, cut(0)),
    "cut in the length": (PLAIN, cut(0.00005)),
    "cut in the header": (PLAIN, cut(0.01)),
    "cut in the data": (PLAIN, cut(0.6)),
    "cut at the end": (PLAIN, cut(0.9999)),
    "a shard cut": (SHARDED, cut(0.5)),
    # flipped bytes in a header
    "length flipped": (PLAIN, flip(lambda header, size: 1)),
    "length enormous": (PLAIN, flip(lambda header, size: 7)),
    "first byte of the header": (PLAIN, flip(lambda header, size: 8)),
    "last byte of the header": (SHARDED, flip(lambda header, size: 7 + header - 8)),
    "offsets overlap": (PLAIN, header(lambda e: first(e).update(data_offsets=[0, 4]))),
    "offsets negative": (PLAIN, header(lambda e: first(e).update(data_offsets=[-8, 4]))),
    "shape enormous": (PLAIN, header(lambda e: first(e).update(shape=[HUGE, HUGE]))),
    "many dimensions": (PLAIN, header(lambda e: first(e).update(shape=[2] * 100_000))),
    "shape of strings": (PLAIN, header(lambda e: first(e).update(shape=["2", "3"]))),
    "dtype unknown": (PLAIN, header(lambda e: first(e).update(dtype="PICKLE"))),
    "header a list": (PLAIN, lambda f: shard(f).write_bytes((4).to_bytes(8, "little") + b"[1] ")),
    "header deeply nested": (
        PLAIN,
        lambda f: shard(f).write_bytes((90_000).to_bytes(8, "little") + b"[" * 90_000),
    ),
    # the index
    "index cut": (SHARDED, raw(INDEX, b'{"weight_map": {')),
    "index no mapping": (SHARDED, raw(INDEX, b"[]")),
    "index empty": (SHARDED, index(lambda c: c.update(weight_map={}))),
    "index names no file": (SHARDED, index(lambda c: first_file(c, "gone.safetensors"))),
    "index leads out": (SHARDED, index(lambda c: first_file(c, "../plain/model.safetensors"))),
    "index absolute": (SHARDED, index(lambda c: first_file(c, "/etc/passwd"))),
    "index names a pickle": (SHARDED, index(lambda c: first_file(c, "pytorch_model.bin"))),
    "index a number": (SHARDED, index(lambda c: first_file(c, 5))),
    "index of another tensor": (
        SHARDED,
        index(lambda c: c["weight_map"].update(ghost=shard_name(c))),
    ),
    "a shard missing": (SHARDED, lambda f: shard(f).unlink()),
    "no weights": (PLAIN, lambda f: shard(f).unlink()),
    "pickles only": (PLAIN, lambda f: shard(f).rename(f / "pytorch_model.bin")),
    # tensors
    "FFN tensor missing": (PLAIN, tensors(lambda t: t.pop(an_ffn(t)))),
    "units missing": (PLAIN, tensors(lambda t: t.pop(an_ffn(t, "units")))),
    "log-ratio missing": (PLAIN, tensors(lambda t: t.pop(an_ffn(t, "log_ratio.scale")))),
    "embedding missing": (PLAIN, tensors(lambda t: t.pop(an_ffn(t, "embed_tokens.weight")))),
    "attention missing": (PLAIN, tensors(lambda t: t.pop(an_ffn(t, "q_proj.weight")))),
    "norm missing": (PLAIN, tensors(lambda t: t.pop(an_ffn(t, "model.norm.weight")))),
    "one too many": (
        PLAIN,
        tensors(lambda t: t.update({"model.layers.0.mlp.extra": torch.zeros(2)})),
    ),
    "a layer too many": (
        PLAIN,
        tensors(
            lambda t: t.update({"model.layers.9.mlp.units": torch.zeros(2, dtype=torch.int32)})
        ),
    ),
    "the stock FFN too": (
        PLAIN,
        tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)})),
    ),
    "FFN too short": (PLAIN, reshaped("input_prototypes.weight", lambda t: t[::2])),
    "FFN transposed": (PLAIN, reshaped("output_prototypes.weight", lambda t: t.T)),
    "FFN flat": (PLAIN, reshaped("input_prototypes.weight", lambda t: t.flatten())),
    "embedding too short": (PLAIN, reshaped("embed_tokens.weight", lambda t: t[:7])),
    "units too short": (PLAIN, reshaped("units", lambda t: t[:3])),
    "FFN in integers": (PLAIN, retyped("input_prototypes.weight", torch.int64)),
    "FFN in bytes": (PLAIN, retyped("output_prototypes.weight", torch.uint8)),
    "embedding in integers": (PLAIN, retyped("embed_tokens.weight", torch.int32)),
    "units in floats": (PLAIN, retyped("units", torch.float32)),
    # the kernel_ffn entry
    "newer format": (PLAIN, entry(lambda e: e.update(format=2, package_version="9.9"))),
    "format a string": (PLAIN, entry(lambda e: e.update(format="1"))),
    "unknown key": (PLAIN, entry(lambda e: e.update(lazers={}))),
    "unknown key of a layer": (PLAIN, layer(lambda y: y.update(heads=3))),
    "unknown setting": (PLAIN, layer(lambda y: y["settings"].update(exec=CODE))),
    "entry a list": (PLAIN, config(lambda c: c.update(kernel_ffn=[1]))),
    "entry a string": (PLAIN, config(lambda c: c.update(kernel_ffn=CODE))),
    "entry empty": (PLAIN, config(lambda c: c.update(kernel_ffn={}))),
    "entry gone": (PLAIN, config(lambda c: c.pop("kernel_ffn"))),
    "no layers": (PLAIN, entry(lambda e: e.update(layers={}))),
    "layers of strings": (
        PLAIN,
        entry(lambda e: e.update(layers=dict.fromkeys(e["layers"], CODE))),
    ),
    "activation a list": (PLAIN, entry(lambda e: e.update(activation=[]))),
    "prototypes huge": (PLAIN, layer(lambda y: y.update(prototypes=2**31 - 1))),
    "prototypes huger": (PLAIN, layer(lambda y: y.update(prototypes=HUGE**4))),
    "hidden size huge": (PLAIN, layer(lambda y: y.update(hidden_size=2**31 - 1))),
    "prototypes a string": (PLAIN, layer(lambda y: y.update(prototypes="96"))),
    "vocabulary huge": (PLAIN, config(lambda c: c.update(vocab_size=HUGE))),
    "layers huge": (PLAIN, config(lambda c: c.update(num_hidden_layers=HUGE))),
    "attention huge": (PLAIN, config(lambda c: c.update(head_dim=10**9))),
    "model width huge": (PLAIN, config(lambda c: c.update(hidden_size=2**40))),
    "path leads out": (PLAIN, renamed_layer("../../etc/passwd")),
    "path absolute": (PLAIN, renamed_layer("/etc/passwd")),
    "path of dunders": (PLAIN, renamed_layer("layers.0.__class__")),
    "path of another module": (PLAIN, renamed_layer("layers.0.self_attn")),
    "path of nothing": (PLAIN, renamed_layer("layers.77.mlp")),
    "path empty": (PLAIN, renamed_layer("")),
    "kernel is code": (PLAIN, layer(lambda y: y["settings"].update(kernel=CODE))),
    "simplex is code": (PLAIN, layer(lambda y: y["settings"].update(simplex=CODE))),
    "kernel a list": (PLAIN, layer(lambda y: y["settings"].update(kernel=["yat"]))),
    "top_k a string": (PLAIN, layer(lambda y: y["settings"].update(simplex="top-k", top_k="5"))),
    "scale a string": (PLAIN, layer(lambda y: y["reference"].update(scale=CODE))),
    "scale infinite": (PLAIN, layer(lambda y: y["reference"].update(scale=float("inf")))),
    "class is code": (PLAIN, config(lambda c: c.update(architectures=[CODE]))),
    "class of another library": (PLAIN, config(lambda c: c.update(architectures=["AutoModel"]))),
    "class a number": (PLAIN, config(lambda c: c.update(architectures=5))),
    "family a list": (PLAIN, entry(lambda e: e.update(family=["llama"]))),
    "family leads out": (PLAIN, entry(lambda e: e.update(family="../llama"))),
    "config cut": (
        PLAIN,
        lambda f: (f / "config.json").write_bytes((f / "config.json").read_bytes()[:200]),
    ),
    "config no text": (PLAIN, raw("config.json", b"\xff\xfe\x00")),
    "config deeply nested": (PLAIN, raw("config.json", b"[" * 200_000)),
    "config a list": (PLAIN, raw("config.json", b"[]")),
}
DAMAGE_OF_TIED = {
    "knots missing": tensors(lambda t: t.pop(an_ffn(t, "pieces.knot"))),
    "amounts missing": tensors(lambda t: t.pop(an_ffn(t, "pieces.amount"))),
    "second rows missing": tensors(lambda t: t.pop(an_ffn(t, "value_proj.weight"))),
    "knots too few": reshaped("pieces.knot", lambda t: t[1:]),
    "amounts transposed": reshaped("pieces.amount", lambda t: t.T),
    "second rows too short": reshaped("value_proj.weight", lambda t: t[:, 1:]),
    "knots in integers": retyped("pieces.knot", torch.int64),
    "knots in bytes": retyped("pieces.knot", torch.uint8),
    "a piece too many": tensors(
        lambda t: t.update({"model.layers.0.mlp.pieces.alpha": torch.zeros(8, 48)})
    ),
    "pieces huge": layer(lambda y: y["settings"].update(pieces=2**31 - 1)),
    "pieces huger": layer(lambda y: y["settings"].update(pieces=HUGE**4)),
    "pieces none": layer(lambda y: y["settings"].update(pieces=0)),
    "pieces a string": layer(lambda y: y["settings"].update(pieces="8")),
    "pieces a float": layer(lambda y: y["settings"].update(pieces=8.0)),
    "pieces true": layer(lambda y: y["settings"].update(pieces=True)),
    "rows are free": layer(lambda y: y["settings"].update(rows="free")),
    "rows a list": layer(lambda y: y["settings"].update(rows=["tied"])),
    "rows are code": layer(lambda y: y["settings"].update(rows=CODE)),
    "values of free rows": layer(lambda y: y["settings"].update(values="gated")),
    "values without second rows": layer(lambda y: y.update(gated=False)),
    "gated a string": layer(lambda y: y.update(gated="yes")),
    "far gone": layer(lambda y: y["reference"].pop("far")),
    "far infinite": layer(lambda y: y["reference"].update(far=float("inf"))),
    "far negative": layer(lambda y: y["reference"].update(far=-1.0)),
    "far not a number": layer(lambda y: y["reference"].update(far=float("nan"))),
    "far a string": layer(lambda y: y["reference"].update(far=CODE)),
    "a kernel without knots": layer(lambda y: y["settings"].update(kernel="half-yat")),
    "sparsemax of tied rows": layer(lambda y: y["settings"].update(simplex="sparsemax")),
    "threshold without one": layer(lambda y: y["settings"].update(simplex="threshold", top_k=5)),
    "top-k without a number": layer(lambda y: y["settings"].update(simplex="top-k")),
    "a linear map without weights": layer(lambda y: y["settings"].update(skip=True)),
    "a linear map that is a word": layer(lambda y: y["settings"].update(skip="yes")),
}
DAMAGE.update((f"tied: {name}", (TIED, change)) for name, change in DAMAGE_OF_TIED.items())
ONLY_FREE = ("units", "log-ratio")
"""Beginnings of the names of what does not stand in a checkpoint of tied rows."""
BOTH = {
    name: (TIED, change)
    for name, (kind, change) in DAMAGE.items()
    if kind == PLAIN and not name.startswith(ONLY_FREE)
}
"""What is done to the one as to the other."""
SILENT = {
    "class is code",
    "class of another library",
    "class a number",
    "family a list",
    "family leads out",
}
"""Keys that the checkpoint's own code does not read: loaded by it, these are the same model."""


def shard_name(content):
    return next(iter(content["weight_map"].values()))


@pytest.fixture
def damaged(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def damage(kind, change):
        folder = Path(shutil.copytree(whole / kind, tmp_path / "damaged"))
        change(folder)
        return folder

    yield damage
    assert not list(tmp_path.rglob("executed"))


def bounded(action):
    """Run ``action`` within 60 seconds and 2 GiB more memory than before; what it raised."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    start = time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, limit[1]))
    try:
        action()
    except Exception as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
        assert time.monotonic() - start < 60
    return None


def assert_refused(error):
    assert isinstance(error, InputError), repr(error)
    assert "\n" not in str(error) and len(str(error)) < 1500
    assert not any(
        word in str(error).lower() for word in ("can't allocate", "memoryerror", "out of memory")
    ), error


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused(damaged, name):
    folder = damaged(*DAMAGE[name])
    assert_refused(bounded(lambda: load_student(str(folder))))


@pytest.mark.parametrize("name", BOTH)
def test_a_damaged_checkpoint_of_tied_rows_is_refused(damaged, name):
    folder = damaged(*BOTH[name])
    assert_refused(bounded(lambda: load_student(str(folder))))


@pytest.mark.parametrize("name", [name for name in DAMAGE if name not in SILENT])
def test_it_is_no_model_by_its_own_code_either(damaged, name):
    folder = damaged(*DAMAGE[name])
    error = bounded(lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))
    assert error is not None, "it loaded"
    assert not isinstance(error, MemoryError) and "allocate" not in str(error)


@pytest.mark.parametrize(
    "name", ["entry gone", "cut in the data", "prototypes huge", "kernel is code", "config cut"]
)
def test_the_command_line_says_it_in_one_line(damaged, name, monkeypatch, capsys):
    folder = damaged(*DAMAGE[name])
    monkeypatch.setattr(sys, "argv", ["hf-kernel-ffn", "verify", str(folder)])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


# verify


def bad(folder):
    return {finding.what: finding.found for finding in verify_folder(folder) if not finding.good}


@pytest.mark.parametrize("kind", [PLAIN, SHARDED, TIED])
def test_what_is_whole_is_found_whole(whole, kind):
    assert bad(whole / kind) == {}
    load_student(str(whole / kind))


@pytest.mark.parametrize(
    "name, what, said",
    [
        ("model.safetensors", "checksums", "model.safetensors"),
        ("config.json", "checksums", "config.json"),
        ("kernels.py", "code", "kernels.py"),
        ("modeling_kernel_llama.py", "code", "modeling_kernel_llama.py"),
    ],
)
def test_a_changed_byte_is_found(damaged, name, what, said):
    """In the data of a weight file nothing else can tell."""
    folder = damaged(PLAIN, lambda folder: None)
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    if name == "config.json":
        content = (folder / name).read_bytes().replace(b'"use_cache": true', b'"use_cache": false')
    (folder / name).write_bytes(content)
    assert said in bad(folder)[what] and len(bad(folder)) == 1


@pytest.mark.parametrize(
    "change, what, said",
    [
        (raw("evil.py", CODE.encode()), "code", "evil.py"),
        (raw("pytorch_model.bin", b"\x80\x04"), "pickles", "pytorch_model.bin"),
        (raw(CHECKSUMS, b'{"sha256": 3}'), "checksums", "damaged"),
        (lambda folder: (folder / CHECKSUMS).unlink(), "checksums", "none recorded"),
        (lambda folder: (folder / "simplex.py").unlink(), "code", "simplex.py"),
        (raw("extra.safetensors", b"x"), "checksums", "extra.safetensors"),
        (
            config(lambda c: c["auto_map"].update(AutoModel="someone/else--modeling.Evil")),
            "auto_map",
            "other code",
        ),
    ],
)
def test_what_does_not_belong_is_found(damaged, change, what, said):
    folder = damaged(PLAIN, change)
    assert said in bad(folder)[what]


def test_an_authors_own_kernel_is_listed_apart(damaged):
    folder = damaged(PLAIN, raw("custom_kernel.py", CODE.encode()))
    found = {finding.what: finding for finding in verify_folder(folder)}
    assert found["code"].good and "custom_kernel.py" in found["own kernel"].found
    with pytest.raises(InputError, match="trust-remote-code"):
        load_student(str(folder))


def test_other_versions_are_named(damaged):
    folder = damaged(PLAIN, entry(lambda e: e.update(package_version="0.0.7")))
    (folder / "kernels.py").write_text("# older")
    assert "written by 0.0.7, installed is" in bad(folder)["code"]


# recipes

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)
)
YAML = {
    "alias bomb": BOMB,
    "alias bomb of merges": MERGES,
    "alias of itself": "teacher: &a [*a]",
    "alias of nothing": "teacher: *a",
    "too long": "teacher: " + "x" * 10**6,
    "deeply nested": "[" * 20_000,
    "deeply nested maps": "{a: " * 20_000,
    "python object": "teacher: !!python/object/apply:os.system ['touch executed']",
    "python name": "!!python/name:os.system",
    "an odd tag": "teacher: !mine x",
    "two documents": "teacher: x\n---\nteacher: y",
    "tabs": "teacher:\tx\n\tdata: y",
    "binary": "teacher: !!binary =",
    "a long number": "seed: " + "9" * 10_000,
    "a date that is none": "teacher: 2020-99-99",
    "unhashable key": "? [a]\n: b",
    "a list": "- a",
    "nothing": "",
    "control characters": "teacher: \x00\x01",
    "wrong types": "{teacher: 1, data: [], stages: {}, output_dir: null}",
    "wrong types within": "{teacher: x, data: {train: {a: b}}, stages: [[]], output_dir: [1]}",
}


@pytest.mark.parametrize("name", YAML)
def test_a_bad_recipe_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(YAML[name])
    assert_refused(bounded(lambda: load_recipe("recipe.yaml")))
    assert not Path("executed").exists()


# the fuzzer


def mutate(rng, folder):
    """Change a few bytes, or a few values of a JSON file, in one file; its name."""
    file = rng.choice(
        sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    )
    if file.suffix == ".json" and rng.random() < 0.6:
        content = json.loads(file.read_text())
        for _ in range(rng.choice((1, 1, 3))):
            node = content
            while (
                isinstance(node, dict)
                and node
                and (deeper := [k for k in node if isinstance(node[k], dict) and node[k]])
            ):
                if rng.random() < 0.3:
                    break
                node = node[rng.choice(deeper)]
            if isinstance(node, dict) and node:
                values = (
                    None,
                    -1,
                    0,
                    HUGE,
                    1e400,
                    "",
                    CODE,
                    [],
                    {},
                    [[]],
                    True,
                    "../..",
                    10**30,
                    "1",
                    [None] * 3,
                )
                if rng.random() < 0.2:
                    node.pop(rng.choice(list(node)))
                else:
                    node[rng.choice(list(node))] = rng.choice(values)
        file.write_text(json.dumps(content))
        return file.name
    content = bytearray(file.read_bytes())
    way = rng.random()
    start = 0 if file.suffix == ".json" or rng.random() < 0.8 else len(content) // 2
    end = len(content) if file.suffix == ".json" or start else min(len(content), 3000)
    if way < 0.2:
        del content[rng.randrange(start, end) :]
    elif way < 0.3:
        at = rng.randrange(start, end)
        content[at:at] = rng.randbytes(rng.randrange(1, 50))
    else:
        for _ in range(rng.choice((1, 2, 10))):
            content[rng.randrange(start, end)] = rng.randrange(256)
    file.write_bytes(content)
    return file.name


def fuzz(whole, scratch, seed, count, kinds=(PLAIN, SHARDED)):
    """How often the mutations were refused, found by verify, harmless, or no change."""
    rng, ends = random.Random(seed), Counter()
    for number in range(count):
        folder = Path(shutil.copytree(whole / rng.choice(kinds), scratch / str(number)))
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        name = mutate(rng, folder)
        error = bounded(lambda folder=folder: load_student(str(folder)))
        if error is not None:
            assert_refused(error)
            ends["refused when loaded"] += 1
        elif (folder / name).read_bytes() == before[name]:
            ends["no change"] += 1
        else:
            # A value of a weight, of a setting or of a file that loading does not read: verify
            # finds it, or it does not count.
            odd: dict = {}
            error = bounded(lambda folder=folder, odd=odd: odd.update(bad(folder)))
            if error is not None:
                assert_refused(error)
            ends["found by verify" if error or odd else "harmless"] += 1
            assert error or odd or name in ("generation_config.json", CHECKSUMS), name
        shutil.rmtree(folder)
    assert not list(scratch.rglob("executed"))
    print(dict(ends))
    return ends


def test_mutations_are_refused_or_found(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = fuzz(whole, tmp_path, 0, 60)
    assert ends["refused when loaded"] > 20


def test_mutations_of_tied_rows_are_refused_or_found(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = fuzz(whole, tmp_path, 3, 60, kinds=(TIED,))
    assert ends["refused when loaded"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [(PLAIN, SHARDED), (TIED,)], ids=["free", "tied"])
def test_many_mutations_are_refused_or_found(whole, tmp_path, monkeypatch, kinds):
    monkeypatch.chdir(tmp_path)
    fuzz(whole, tmp_path, 1, 1500, kinds)


@pytest.mark.slow
def test_many_broken_recipes_are_refused_or_valid(tmp_path):
    text = (Path(__file__).parents[2] / "recipes" / "llama-readable.yaml").read_text()
    rng, file = random.Random(2), tmp_path / "recipe.yaml"
    for _ in range(1500):
        content = list(text)
        for _ in range(rng.choice((1, 3, 10))):
            at = rng.randrange(len(content))
            content[at : at + rng.choice((0, 1, 1, 20))] = rng.choice(
                ("&a ", "*a", "[", "{", "- ", ": ", "!!", "\t", "9" * 40, "'", "\n", "")
            )
        file.write_text("".join(content))
        error = bounded(lambda: load_recipe(file))
        if error is not None:
            assert_refused(error)
