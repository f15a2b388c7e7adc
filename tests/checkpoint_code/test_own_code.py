"""No code but ours: what travels imports nothing but torch and transformers and writes nothing;
nothing anywhere reads a pickle."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_kernel_ffn
from hf_kernel_ffn import KernelFFNConfig, convert, versions

PACKAGE = Path(hf_kernel_ffn.__file__).parent
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "numpy.load",
    "np.load",
    "runpy.run_path",
}
WATCH = """
import json, os, sys
folder, package, out = sys.argv[1:]
events = []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def hook(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES and str(arguments[0]) != os.devnull:
        events.append(f"open {arguments[0]}")
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "shutil.copyfile"):
        events.append(f"{event} {arguments[0]} {arguments[1] if len(arguments) > 1 else ''}")
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
        events.append(f"{event} {arguments}")

import torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification
transformers.logging.set_verbosity_error()
sys.path.insert(0, package)
sys.addaudithook(hook)
import carried.modeling_kernel_llama as module
model = module.KernelLlamaForCausalLM.from_pretrained(folder)
model(torch.arange(5)[None], output_readouts=True)
first, events[:] = list(events), []
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
print(json.dumps({"ours": first, "by transformers": list(events)}))
"""


def source_files():
    return sorted(PACKAGE.rglob("*.py"))


def dotted(node):
    return (
        f"{dotted(node.value)}.{node.attr}"
        if isinstance(node, ast.Attribute)
        else getattr(node, "id", "")
    )


@pytest.mark.parametrize(
    "file", source_files(), ids=lambda file: file.relative_to(PACKAGE).as_posix()
)
def test_nothing_reads_pickles_or_runs_strings(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not FORBIDDEN_IMPORTS & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_IMPORTS
        elif isinstance(node, ast.Call):
            assert dotted(node.func) not in FORBIDDEN_CALLS, dotted(node.func)
        elif isinstance(node, ast.keyword):
            assert node.arg not in ("allow_pickle", "weights_only")


@pytest.fixture(scope="module")
def folder(make_teacher, ids, tmp_path_factory):
    out = tmp_path_factory.mktemp("carried") / "student"
    convert(make_teacher("llama"), KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256)[
        0
    ].save_pretrained(out)
    return out


def test_what_travels_imports_nothing_but_torch_and_transformers(folder):
    files = sorted(folder.glob("*.py"))
    assert len(files) > 6
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module).split(".")[0]]
            elif isinstance(node, ast.ImportFrom):
                assert (
                    node.level == 1 and node.module and (folder / f"{node.module}.py").is_file()
                ), file.name
                continue
            else:
                continue
            for name in names:
                assert name in ("torch", "transformers") or name in sys.stdlib_module_names, (
                    f"{name} in {file.name}"
                )


def test_what_travels_writes_nothing_when_it_is_loaded(folder, tmp_path):
    """Bytecode aside; and transformers copies the code to its own cache, where alone something may
    appear."""
    carried, cache = tmp_path / "package" / "carried", tmp_path / "modules"
    carried.mkdir(parents=True)
    for file in folder.glob("*.py"):
        (carried / file.name).write_bytes(file.read_bytes())
    (carried / "__init__.py").touch()
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.iterdir()}
    environment = dict(
        os.environ, HF_MODULES_CACHE=str(cache), PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=""
    )
    command = [sys.executable, "-c", WATCH, folder, carried.parent, tmp_path / "events.json"]
    done = subprocess.run(
        list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    events = json.loads(done.stdout)
    assert events["ours"] == []
    assert events["by transformers"] and all(
        str(cache) in event for event in events["by transformers"]
    )
    assert before == {
        file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.iterdir()
    }


@pytest.mark.parametrize(
    "found, said",
    [
        ("6.0.0", "found transformers 6.0.0, expected <6,>=5.17"),
        ("4.57.6", "4.57.6"),
        ("none", "none"),
    ],
)
def test_versions_out_of_range_are_named(monkeypatch, found, said):
    original = versions.version

    def other(name):
        if name != "transformers":
            return original(name)
        if found == "none":
            raise versions.PackageNotFoundError
        return found

    monkeypatch.setattr(versions, "version", other)
    assert said in versions.describe_unsupported_version()


def test_these_versions_are_supported():
    assert versions.describe_unsupported_version() is None


def test_a_break_under_another_version_is_one_line(monkeypatch, capsys):
    from hf_kernel_ffn.cli import app as cli

    def broken(**options):
        raise AttributeError("transformers has moved something")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(AttributeError):
        cli.main()
    monkeypatch.setattr(versions, "version", lambda name: "99.0")
    with pytest.raises(SystemExit):
        cli.main()
    error = capsys.readouterr().err
    assert "expected >=2.11" in error or "expected <6,>=5.17" in error
