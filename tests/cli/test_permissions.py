"""What a user may not read or write, and a disk that is full: one line, nothing half-written.

Where the tests run as root, the commands run as root without the right to pass permissions by.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from teachers import SUPPORT

ROOT = SUPPORT.parents[1]
RIGHTS = "-dac_override,-dac_read_search"
"""Root's rights to read and write what nobody may."""
AS_USER = ["setpriv", f"--bounding-set={RIGHTS}", f"--inh-caps={RIGHTS}"]
SHORT = ("--max-tokens", "256", "--sequence-length", "32")
FEW = ("--calibration-tokens", "256")
STAGE = {"tokens": 64, "learning_rate": 0.01, "batch_size": 2}


pytestmark = pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None,
    reason="root without setpriv: permissions do not bind it",
)


def run_as_user(commands, cwd, *, largest_file=None, **environment):
    """Exit code, stdout and stderr of every command, run in one process that permissions bind."""
    work = {"commands": [list(map(str, line)) for line in commands], "largest_file": largest_file}
    file = cwd / "commands.json"
    file.write_text(json.dumps(work))
    before = AS_USER if os.geteuid() == 0 else []
    done = subprocess.run(
        [*before, sys.executable, SUPPORT / "commands.py", file],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_HOME": str(cwd / "out" / ".cache"),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **{name: str(value) for name, value in environment.items()},
        },
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_refused(command, result):
    code, _, error = result
    assert code == 2, (command, result)
    assert error.splitlines()[-1].startswith("error: "), (command, error)
    assert "Traceback" not in error, (command, error)


@pytest.fixture(scope="module")
def whole(cli_module, teacher_folder, text_file):
    """A folder that everybody may read, with every kind of input."""
    root = Path(tempfile.mkdtemp(prefix="permissions_"))
    shutil.copytree(teacher_folder("llama"), root / "teacher")
    shutil.copy(text_file, root / "text.txt")
    cli_module("convert", root / "teacher", root / "student", *FEW)
    cli_module("export", root / "student", root / "ffns.safetensors")
    recipe = {
        "teacher": "teacher",
        "student": "student",
        "data": {"train": "text.txt", "sequence_length": 32},
        "stages": [{"name": "layer-wise", **STAGE}, {"name": "logits", **STAGE}],
        "output_dir": "out/distilled",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (root / "out").mkdir()
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def cli_module():
    from hf_kernel_ffn.cli.app import main

    def run(*arguments):
        before = sys.argv
        sys.argv = ["hf-kernel-ffn", *map(str, arguments)]
        try:
            main()
        except SystemExit as stopped:
            assert stopped.code == 0
        finally:
            sys.argv = before

    return run


@pytest.fixture
def world(whole):
    """A copy of it, whose ``out`` anybody may write to."""
    root = Path(tempfile.mkdtemp(prefix="permissions_")) / "world"
    shutil.copytree(whole, root)
    root.parent.chmod(0o755)
    (root / "out").chmod(0o777)
    yield root
    subprocess.run(["chmod", "-R", "u+rwX", root.parent], check=True)
    shutil.rmtree(root.parent)


READERS = {
    "teacher": [
        ("convert", "teacher", "out/made", *FEW),
        ("convert", "teacher", "out/made", *FEW, "--calibration-text", "text.txt"),
        ("convert", "teacher", "out/made", "--calibration-tokens", "0", "--stream"),
        ("evaluate", "student", "--teacher", "teacher", "--text", "text.txt", *SHORT),
        ("read", "teacher", "--prompt", "A whale"),
        ("read", "student", "--prompt", "A whale", "--teacher", "teacher", "--html", "out/p.html"),
        ("graph", "teacher", "--prompt", "A whale"),
        ("families", "--check", "teacher"),
        ("families", "--explain", "teacher"),
        ("apply", "ffns.safetensors", "teacher", "out/applied"),
        ("record", "recipe.yaml", "out/record"),
        ("distill", "recipe.yaml"),
    ],
    "student": [
        ("evaluate", "student", "--teacher", "teacher", "--text", "text.txt", *SHORT),
        ("read", "student", "--prompt", "A whale"),
        ("graph", "student", "--prompt", "A whale"),
        ("verify", "student"),
        ("export", "student", "out/ffns.safetensors"),
        ("push", "student", "me/student", "--base-model", "me/teacher"),
        ("record", "recipe.yaml", "out/record"),
        ("distill", "recipe.yaml"),
    ],
    "text.txt": [
        ("convert", "teacher", "out/made", *FEW, "--calibration-text", "text.txt"),
        ("evaluate", "student", "--teacher", "teacher", "--text", "text.txt", *SHORT),
        ("read", "student", "--prompt", "A whale", "--text", "text.txt"),
        ("graph", "student", "--prompt", "A whale", "--text", "text.txt"),
        ("record", "recipe.yaml", "out/record"),
        ("distill", "recipe.yaml"),
    ],
    "recipe.yaml": [("record", "recipe.yaml", "out/record"), ("distill", "recipe.yaml")],
    "ffns.safetensors": [("apply", "ffns.safetensors", "teacher", "out/applied")],
}
"""Commands by what they read."""
FILES = {
    "teacher": (
        "",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
    ),
    "student": ("", "config.json", "model.safetensors"),
}
"""What of it is unreadable; "" is the folder itself."""
UNREADABLE = [(what, file) for what in READERS for file in FILES.get(what, ("",))]


@pytest.mark.parametrize("what, file", UNREADABLE)
def test_what_cannot_be_read_is_said_and_nothing_is_left(world, what, file):
    (world / what / file).chmod(0)
    commands = READERS[what]
    for command, result in zip(commands, run_as_user(commands, world), strict=True):
        assert_refused(command, result)
        assert not result[1], (command, result)  # before the work
        assert file in result[2], (command, result)
    assert not any((world / "out").iterdir())


WRITERS = [
    ("convert", "teacher", "{}/made", *FEW),
    ("convert", "teacher", "{}/streamed", "--calibration-tokens", "0", "--stream"),
    ("export", "student", "{}/ffns.safetensors"),
    ("apply", "ffns.safetensors", "teacher", "{}/applied"),
    ("record", "recipe.yaml", "{}/record"),
    ("distill", "recipe.yaml", "output_dir={}/distilled"),
    ("evaluate", "student", "--teacher", "teacher", "--text", "text.txt", *SHORT)
    + ("--json", "{}/report.json"),
    ("read", "student", "--prompt", "A whale", "--json", "{}/r.json"),
    ("read", "student", "--prompt", "A whale", "--html", "{}/r.html"),
    ("graph", "student", "--prompt", "A whale", "--json", "{}/g.json"),
    ("graph", "student", "--prompt", "A whale", "--html", "{}/g.html"),
]
"""Commands that write into the folder {}."""


def write_into(folder):
    return [tuple(part.format(folder) for part in line) for line in WRITERS]


@pytest.mark.parametrize("mode", [0o555, 0o000])
@pytest.mark.parametrize("deep", ["", "/not/there"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(world, mode, deep):
    (world / "locked").mkdir()
    (world / "locked").chmod(mode)
    commands = write_into(f"locked{deep}")
    for command, result in zip(commands, run_as_user(commands, world), strict=True):
        assert_refused(command, result)
        assert "locked" in result[2], (command, result)
        assert not result[1], (command, result)
    (world / "locked").chmod(0o755)
    assert not any((world / "locked").iterdir())


def test_an_unwritable_cache_and_home_end_nothing(world):
    (world / "locked").mkdir(mode=0o555)
    locked = world / "locked"
    commands = write_into("out")
    environment = {
        "HOME": locked,
        "HF_HOME": locked / "hf",
        "XDG_CACHE_HOME": locked / "cache",
    }
    for command, result in zip(commands, run_as_user(commands, world, **environment), strict=True):
        assert result[0] == 0, (command, result)
    (result,) = run_as_user([("verify", "out/distilled")], world, **environment)
    assert result[0] == 0, result


@pytest.mark.parametrize("room", [0, 100, 4096, 65_536])
def test_a_disk_that_is_full_leaves_nothing_half_written(world, room):
    """Files that may grow no longer than ``room``, which the system says as it does of a full
    disk; a report is small enough for some."""
    commands = write_into("out")
    results = run_as_user(commands, world, largest_file=room)
    for command, result in zip(commands, results, strict=True):
        target = world / "out" / next(part.rpartition("/")[2] for part in command if "out/" in part)
        if result[0] == 0:
            whole = target / "record.json" if command[0] == "record" else target
            assert whole.is_file(), (command, result)
            continue
        assert_refused(command, result)
        if command[0] == "distill":  # what is there can be gone on from, or started again
            assert not (target / "config.json").exists()
            continue
        assert not target.exists(), command
    left = {path.name for path in (world / "out").iterdir() if path.name.startswith(".")}
    assert not left
