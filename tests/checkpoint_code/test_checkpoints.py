"""Checkpoints: bit-equal where the package does not exist, and never a model with random FFNs."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_kernel_ffn import Kernel, KernelFFN, KernelFFNConfig, convert, register_kernel
from hf_kernel_ffn.checkpoint_code.kernels import KERNELS
from hf_kernel_ffn.checkpoint_code.settings import ROWS

FAMILIES = ("llama", "gpt2", "mistral")
OWN_KERNEL = '''
"""A kernel of the user's own."""

from hf_kernel_ffn import Kernel, register_kernel


class {cls}(Kernel):
    """κ = 1 / (1 + ‖x − w‖² / γ)."""

    def value(self, score, distance2, gamma):
        return 1 / (1 + distance2 / gamma)


register_kernel(
    {cls}("{name}", nonnegative=True, positive_definite=True, uses_distance=True, parameters={{"gamma": "distance"}})
)
'''


def output(model, ids):
    with torch.no_grad():
        return model(ids)[0]


def load(folder, auto=AutoModelForCausalLM, **kwargs):
    """By the folder's own code, as a user does."""
    return auto.from_pretrained(folder, trust_remote_code=True, **kwargs)


@pytest.fixture
def own_kernel(tmp_path, monkeypatch, registry):
    """Import a user's kernel file, written with these names, from a folder on sys.path."""

    def make(module="my_kernel", cls="Cauchy", name="cauchy", source=OWN_KERNEL):
        folder = tmp_path / "users_code"
        folder.mkdir(exist_ok=True)
        (folder / f"{module}.py").write_text(source.format(cls=cls, name=name))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()
        importlib.import_module(module)
        return KernelFFNConfig(kernel=name, simplex="entmax-1.5", intensity="gate", init="single")

    return make


@pytest.fixture(scope="module")
def students(make_teacher, ids):
    """A converted causal LM of every family."""
    return {
        family: convert(
            make_teacher(family), KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256
        )[0]
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def folders(students, tmp_path_factory):
    made = {}
    for family, student in students.items():
        made[family] = (
            tmp_path_factory.mktemp(family) / "student"
        )  # one base name: the code cache must keep them apart
        student.save_pretrained(made[family])
    return made


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def student(students, family):
    return students[family]


@pytest.fixture
def folder(folders, family):
    return folders[family]


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of the checkpoint, to be broken."""
    return Path(shutil.copytree(folder, tmp_path / "damaged"))


def rewrite_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def rewrite_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["kernel_ffn"])
    file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def elsewhere(students, folders, make_teacher, ids, run_elsewhere, tmp_path_factory):
    """What one interpreter without the package computes from many checkpoints, and what it should
    have."""
    scratch, jobs, expected = tmp_path_factory.mktemp("elsewhere"), [], {}

    def add(name, auto, folder, out, **more):
        jobs.append(dict(name=name, auto=auto, folder=str(folder), **more))
        expected[name] = out

    for family, student in students.items():
        logits = output(student, ids)
        add(f"{family}-causal", "AutoModelForCausalLM", folders[family], logits)
        add(f"{family}-base", "AutoModel", folders[family], output(student.base_model, ids))
        add(
            f"{family}-resaved",
            "AutoModelForCausalLM",
            folders[family],
            logits,
            resave=str(scratch / family / "again"),
        )
        add(
            f"{family}-untrusted",
            "AutoModelForCausalLM",
            folders[family],
            None,
            trust_remote_code=False,
        )

        teacher = make_teacher(family, "classify")
        classifier, _ = convert(
            teacher, KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256
        )
        folder = scratch / f"{family}-classify" / "student"
        classifier.save_pretrained(folder)
        add(
            f"{family}-classify",
            "AutoModelForSequenceClassification",
            folder,
            output(classifier, ids),
        )

        settings = {
            0: KernelFFNConfig(simplex="top-k", top_k=5),
            2: KernelFFNConfig(kernel="imq", simplex="sparsemax", intensity="gate"),
        }
        partial, _ = convert(
            make_teacher(family), settings, calibration_ids=ids, calibration_tokens=256
        )
        folder = scratch / f"{family}-partial" / "student"
        partial.save_pretrained(folder, max_shard_size="30KB")
        assert (folder / "model.safetensors.index.json").exists()
        add(f"{family}-partial-sharded", "AutoModelForCausalLM", folder, output(partial, ids))
    results, errors = run_elsewhere(jobs, ids, scratch)
    return results, errors, expected


@pytest.mark.parametrize("what", ["causal", "base", "classify", "partial-sharded", "resaved"])
def test_bit_equal_where_the_package_is_not_installed(elsewhere, family, what):
    results, errors, expected = elsewhere
    name = f"{family}-{what}"
    assert name not in errors, errors[name]
    assert torch.equal(results[name], expected[name])


def test_nothing_loads_without_trust(elsewhere, family):
    assert "trust_remote_code=True" in elsewhere[1][f"{family}-untrusted"]


def test_stock_classes_refuse(folder, make_teacher, family):
    for head in ("base", "causal", "classify"):
        with pytest.raises(Exception, match="trust_remote_code=True"):
            type(make_teacher(family, head)).from_pretrained(folder)


def test_the_packages_own_classes_load_it_too(student, folder, ids):
    again = type(student).from_pretrained(folder)
    assert torch.equal(output(again, ids), output(student, ids))
    assert again.config.kernel_ffn == student.config.kernel_ffn


def test_config_json_rebuilds_without_the_registry(student, folder, family):
    written = json.loads((folder / "config.json").read_text())
    activation = "activation_function" if family == "gpt2" else "hidden_act"
    assert written["model_type"] == f"kernel_{family}"
    assert "trust_remote_code=True" in written[activation]
    assert {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
    } <= set(written["auto_map"])
    assert list(written["kernel_ffn"]["layers"]) == list(student.kernel_ffns())
    assert (
        getattr(load(folder).config, activation) == written["kernel_ffn"]["activation"][activation]
    )
    code = {file.stem for file in folder.glob("*.py")}
    assert {name for name in code if name.startswith("modeling_kernel_")} == {
        f"modeling_kernel_{family}"
    }


def test_ties_are_kept(student, folder, family):
    tied = family != "mistral"
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (not tied)
    for model in (student, load(folder)):
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(
    "tensor", ["input_prototypes.weight", "output_prototypes.bias", "log_ratio.epsilon", "units"]
)
@pytest.mark.parametrize(
    "auto", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification]
)
def test_missing_ffn_tensors_are_named(damaged, student, tensor, auto):
    path = list(student.kernel_ffns())[1]
    rewrite_tensors(
        damaged,
        lambda tensors: [
            tensors.pop(key) for key in list(tensors) if key.endswith(f"{path}.{tensor}")
        ],
    )
    with pytest.raises(ValueError, match=f"{path}.{tensor}".replace(".", r"\.")):
        load(damaged, auto)


def test_misshapen_ffn_tensors_are_refused(damaged, student):
    path = list(student.kernel_ffns())[0]

    def halve(tensors):
        [key] = [key for key in tensors if key.endswith(f"{path}.input_prototypes.weight")]
        tensors[key] = tensors[key][::2].contiguous()

    rewrite_tensors(damaged, halve)
    with pytest.raises((RuntimeError, ValueError), match="mismatched|input_prototypes"):
        load(damaged)
    with pytest.raises(ValueError, match=r"input_prototypes\.weight"):
        load(damaged, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_weights_say_what_to_do(damaged, keep):
    file = damaged / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="copy|convert"):
        load(damaged)


def test_a_missing_shard_is_refused(student, tmp_path):
    student.save_pretrained(tmp_path, max_shard_size="30KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(Exception, match="safetensors"):
        load(tmp_path)


def _first(entry):
    return next(iter(entry["layers"].values()))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda e: e.update(format=99), "format 99, expected 1"),
        (lambda e: e.update(layers={}), "kernel_ffn"),
        (lambda e: e.update(layers=[]), "layers"),
        (lambda e: e["layers"].update({"blocks.0.ffn": _first(e)}), "'blocks.0.ffn'"),
        (lambda e: _first(e).update(hidden_sise=1), "'hidden_sise'.*'hidden_size'"),
        (lambda e: _first(e).update(prototypes=-1), "prototypes=-1"),
        (lambda e: _first(e).pop("prototypes"), "prototypes"),
        (lambda e: _first(e)["settings"].update(kernel="gone"), "'gone'"),
        (lambda e: _first(e)["settings"].update(kernal="yat"), "'kernal'.*'kernel'"),
        (lambda e: _first(e).pop("reference"), "reference"),
        (lambda e: _first(e)["reference"].pop("epsilon"), "epsilon"),
        (lambda e: _first(e)["reference"].update(scale=-1.0), "scale"),
        (lambda e: _first(e)["reference"].update(epsilon=float("nan")), "epsilon"),
        (lambda e: _first(e).update(dropout=5), "dropout=5, expected a number from 0 to 1"),
        (lambda e: _first(e).update(dropout="x"), "dropout='x', expected a number from 0 to 1"),
        (lambda e: _first(e).update(dropout=None), "dropout=None"),
        (lambda e: _first(e).update(hidden_dropout=-0.1), "hidden_dropout=-0.1"),
        (lambda e: _first(e).update(hidden_dropout=True), "hidden_dropout=True"),
        (lambda e: _first(e).update(number=-1), "number=-1 .*expected an integer from 0 on"),
        (lambda e: _first(e).update(number="0"), "number='0'"),
        (lambda e: _first(e).update(experts=2.0), "experts=2.0 .*expected an integer from 0 on"),
        (lambda e: _first(e).update(absorbed="layers.0"), "absorbed='layers.0'.*list of paths"),
        (lambda e: _first(e).update(absorbed=None), "absorbed=None"),
        (lambda e: _first(e).update(absorbed=[3]), "3 in the absorbed paths"),
        (lambda e: _first(e).update(absorbed=["a.__class__"]), "'a.__class__' in the absorbed"),
    ],
)
def test_a_damaged_config_is_refused_by_name(folders, tmp_path, change, reason):
    damaged = Path(shutil.copytree(folders["llama"], tmp_path / "damaged"))
    rewrite_config(damaged, change)
    with pytest.raises(ValueError, match=reason):
        load(damaged)


def test_generation_with_and_without_cache_agrees(folder, ids):
    model = load(folder)
    prompt = ids[:2, :12]  # longer than Mistral's window
    runs = [
        model.generate(
            prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False, use_cache=cache
        )
        for cache in (True, False)
    ]
    assert runs[0].shape == (2, 28)
    assert torch.equal(*runs)


def test_low_level_meta_device(student):
    with torch.device("meta"):
        empty = type(student)(student.config).eval()
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    empty.load_state_dict(student.state_dict(), assign=True)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for path, ffn in student.kernel_ffns().items():
        with torch.no_grad():
            assert torch.equal(empty.base_model.get_submodule(path)(x), ffn(x))


def test_device_map(student, folder, ids):
    assert torch.equal(output(load(folder, device_map="cpu"), ids), output(student, ids))


def test_bfloat16(student, folder, ids):
    half = load(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    [ffn, *_] = half.kernel_ffns().values()
    [exact, *_] = student.kernel_ffns().values()
    assert (
        ffn.positive("scale").item() == exact.positive("scale").item()
    )  # the reference values stay exact
    expected, found = output(student, ids), output(half, ids).float()
    assert torch.isfinite(found).all()
    assert (found - expected).square().mean() < 0.02 * expected.var()


def test_gradient_checkpointing_gives_the_same_gradients(folder, ids):
    gradients = []
    for checkpointing in (False, True):
        model = load(folder).train()
        if checkpointing:
            # Called gradient_checkpointing_enable until transformers 5.24.
            new = hasattr(model, "activation_checkpointing_enable")
            getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")()
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        torch.manual_seed(0)  # GPT-2 drops out
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if ".mlp." in n})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert all(
        g.abs().sum() > 0 for n, g in gradients[0].items() if n.endswith("prototypes.weight")
    )


def assert_compiles_as_one_graph(student, ids, backend):
    torch._dynamo.reset()
    compiled = torch.compile(student, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(ids, use_cache=False).logits, student(ids).logits, rtol=1e-4, atol=1e-4
        )
    torch._dynamo.reset()


# Inductor's own modules decorate with what torch itself deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", ROWS)
def test_compiles_as_one_graph(student, make_teacher, family, ids, rows, backend):
    if rows == "tied":
        student, _ = convert(make_teacher(family), calibration_ids=ids, calibration_tokens=256)
    assert_compiles_as_one_graph(student, ids, backend)


@pytest.mark.parametrize(
    "settings",
    [{"values": "gated"}, {"kernel": "gaussian", "simplex": "entmax-1.5", "intensity": "gate"}],
    ids=str,
)
def test_other_forms_compile_as_one_graph(llama, ids, settings):
    student, _ = convert(
        llama, KernelFFNConfig(**settings), layers="1", calibration_ids=ids, calibration_tokens=256
    )
    assert_compiles_as_one_graph(student, ids, "eager")


@pytest.mark.parametrize(
    "auto", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification]
)
def test_one_record_per_converted_layer(folder, ids, auto):
    model, written = load(folder, auto), []
    ffns = [module for module in model.modules() if type(module).__name__ == KernelFFN.__name__]
    hooks = [
        ffn.register_forward_hook(lambda module, args, out: written.append(out)) for ffn in ffns
    ]
    with torch.no_grad():
        out = model(ids, output_readouts=True)
        as_tuple = model(ids, output_readouts=True, return_dict=False)
    for hook in hooks:
        hook.remove()
    assert len(out.readouts) == len(as_tuple[-1]) == len(ffns) == 3
    for record, again, y in zip(out.readouts, as_tuple[-1], written):
        assert record.coefficients.shape[:-1] == ids.shape
        torch.testing.assert_close(record.output(), y, rtol=1e-4, atol=1e-5)
        assert torch.equal(record.coefficients, again.coefficients)
    plain = model(ids)
    assert "readouts" not in plain
    assert torch.equal(plain[0], out[0])


def test_a_users_own_kernel_travels_as_its_own_file(
    own_kernel, llama, students, folders, ids, run_elsewhere, tmp_path
):
    student, _ = convert(llama, own_kernel(), calibration_ids=ids, calibration_tokens=256)
    folder = tmp_path / "mine" / "student"
    student.save_pretrained(folder)
    assert "class Cauchy" in (folder / "custom_kernel.py").read_text()
    jobs = [
        {
            "name": "plain",
            "auto": "AutoModelForCausalLM",
            "folder": str(folders["llama"]),
        },  # the same base name, without the kernel
        {"name": "mine", "auto": "AutoModelForCausalLM", "folder": str(folder)},
        {
            "name": "resaved",
            "auto": "AutoModelForCausalLM",
            "folder": str(folder),
            "resave": str(tmp_path / "again" / "student"),
        },
    ]
    results, errors = run_elsewhere(jobs, ids, tmp_path)
    assert not errors
    assert torch.equal(results["mine"], output(student, ids))
    assert torch.equal(results["resaved"], output(student, ids))
    assert torch.equal(results["plain"], output(students["llama"], ids))


def refused_at_save(student, folder, reason):
    with pytest.raises(ValueError, match=reason):
        student.save_pretrained(folder)
    assert not folder.exists() or not list(folder.iterdir())  # nothing half-written


def test_kernels_in_two_files_do_not_travel(own_kernel, llama, ids, tmp_path):
    settings = {0: own_kernel(), 1: own_kernel("my_other_kernel", "Lorentz", "lorentz")}
    student, _ = convert(llama, settings, calibration_ids=ids, calibration_tokens=256)
    refused_at_save(student, tmp_path / "out", "2 files, expected one")


def test_a_kernel_of_the_main_script_does_not_travel(registry, llama, ids, tmp_path):
    def value(self, score, distance2):
        return 1 / (1 + distance2)

    kernel_class = type("Scratch", (Kernel,), {"value": value, "__module__": "__main__"})
    register_kernel(
        kernel_class("scratch", nonnegative=True, positive_definite=True, uses_distance=True)
    )
    student, _ = convert(
        llama,
        KernelFFNConfig(kernel="scratch"),
        layers="0",
        calibration_ids=ids,
        calibration_tokens=256,
    )
    refused_at_save(student, tmp_path / "out", "'scratch' stands in '__main__'.*file of their own")
    assert "scratch" in KERNELS


@pytest.mark.parametrize(
    "line",
    [
        "import hf_kernel_ffn as k",
        "from hf_kernel_ffn.checkpoint_code.simplex import compute_shares",
        "from hf_kernel_ffn import KernelFFNConfig",
    ],
)
def test_a_kernel_file_that_needs_more_of_the_package_does_not_travel(
    own_kernel, llama, ids, tmp_path, line
):
    settings = own_kernel(
        source=OWN_KERNEL.replace("from hf_kernel_ffn", f"{line}\nfrom hf_kernel_ffn", 1)
    )
    student, _ = convert(llama, settings, layers="0", calibration_ids=ids, calibration_tokens=256)
    refused_at_save(student, tmp_path / "out", "hf_kernel_ffn")
