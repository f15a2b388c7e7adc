"""The command line against whatever it may be given: it ends with a result, or in one line.

Every option of every command is drawn, those that are added later too, since they are taken from
the commands themselves. Paths are of every kind, and inputs are broken.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import stat
import sys
import threading
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import typer
import yaml
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from safetensors import safe_open
from teachers import tiny_teacher
from tiny_families import tiny

from hf_kernel_ffn.cli.app import app, main
from hf_kernel_ffn.storage.verification import verify_folder

LONGEST = 120
"""Seconds that a call may take on a busy machine; nearly all take less than one."""
FEW = 256
VOCABULARY = {"vocab_size": 4160, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
"""Of models that are not made by the fixtures: the shipped tokenizer's, and a mask token."""

# what the arguments may be

TEACHERS = ("teacher", "teacher", "teacher", "gpt2", "bare", "mixture", "shared")
VALID = {
    "model": (*TEACHERS, "student", "mixed"),
    "teacher": TEACHERS,
    "student": ("student", "student", "mixed"),
    "folder": ("student", "mixed"),
    "explain": TEACHERS,
    "check": TEACHERS,
    "recipe": ("recipe.yaml",),
    "file": ("ffns.safetensors",),  # of apply; of export it is an output
    "text": ("text.txt", "rows.jsonl"),
    "calibration_text": ("text.txt", "rows.jsonl"),
    "report": ("report.json",),
    "calibration_tokens": ("0", "256", "300"),
    "max_tokens": ("256",),
    "sequence_length": ("32", "64"),
    "batch_tokens": ("64", "2048"),
    "prompts": ("0", "1"),
    "alternatives": ("0", "1"),
    "position": ("-1", "0"),
    "top": ("1", "5"),
    "top_k": ("1", "4"),
    "start": ("student", "teacher"),
    "layers": ("0", "0-1", "1,2"),
    "rows": ("tied", "free"),
    "pieces": ("2", "8"),
    "kernel": ("brownian", "half-yat", "yat"),
    "values": ("fixed", "gated", "product"),
    "simplex": ("softmax", "sparsemax", "top-k", "threshold"),
    "intensity": ("none", "mass", "gate"),
    "init": ("single", "polarised", "data-scale"),
    "expansion": ("1", "1.5"),
    "temperature": ("1", "0.5"),
    "bos": ("auto", "never"),
    "dtype": ("float32", "bfloat16"),
    "device": ("cpu",),
    "seed": ("0", "7"),
    "processes": ("1", "2"),
    "text_field": ("text",),
    "prompt": ("A whale", "naïve 模型 😀"),
    "repo": ("me/student",),
    "base_model": ("someone/llama",),
    "overrides": ("seed=3", "stages.0.tokens=128", "kernel_ffn.layers=1", "dtype=bfloat16"),
}
"""What a command takes, by the parameter's name; of one that is not here, anything is drawn."""
OUTPUTS = {"out_dir", "json_file", "html"}
NUMBERS = ("0", "1", "2", "-1", "3", "1000000", "99999999999999999999", "x", "", "1.5", "nan")
FLOATS = ("0", "-1", "1e-300", "1e300", "nan", "inf", "8.5", "x", "")
WORDS = (
    "",
    " ",
    "-",
    "a\nb",
    "\x1b[31m",
    "é",
    os.fsdecode(b"caf\xe9"),
    "x" * 1000,
    "../..",
    "/",
    "nowhere/at-all",
    "a/b/c",
    "0-99",
    "meta",
    "cuda:7",
    "cpu:0",
    "float8",
    "int32",
    "nowhere.py:mine",
    "text.txt:mine",
    "text.txt",
    "[",
    "a=b",
    "stages.0.name=x",
    "stages.9.tokens=1",
    "data.train=[]",
    "output_dir=text.txt",
    "teacher=student",
    "trackers=[x]",
    "seed=99999999999999999999999",
    "data.sequence_length=100000",
    "stages.0.learning_rate=1e30",
    "{{}}",
    "%s",
)
PATHS = (
    "absent",
    "text.txt",
    "teacher",
    "student",
    "empty",
    "full",
    "loop",
    "dangling",
    "link",
    "pipe",
    "null",
    "text.txt/under",
    "/proc/nowhere",
    "x" * 300,
    "модель",
    "naïve 模型 😀.json",
    ".",
    "..",
    "",
    os.fsdecode(b"caf\xe9"),
)


class Parameter:
    """One argument or option of a command, as its function declares it."""

    def __init__(self, name, hint, default):
        self.name = name
        base, *details = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        options = [type(None), *get_args(base)] if get_args(base) else [base]
        self.kind = next(kind for kind in options if kind is not type(None))
        self.is_list = get_origin(base) is list or any(get_origin(o) is list for o in options)
        info = next(
            (d for d in details if isinstance(d, typer.models.ParameterInfo)), typer.Option()
        )
        self.is_argument = isinstance(info, typer.models.ArgumentInfo)
        declared = [flag for flag in info.param_decls or () if flag.startswith("-")]
        self.flag = (declared or [f"--{name.replace('_', '-')}"])[0]
        self.required = default is NOTHING

    def is_output(self, command):
        """Whether it names what is written."""
        return self.name in OUTPUTS or (command == "export" and self.name == "file")


NOTHING = object()


def read_commands():
    """Parameters by the name of each command."""
    found = {}
    for command in app.registered_commands:
        function = command.callback
        hints = get_type_hints(function, include_extras=True)
        hints.pop("return", None)
        count = len(function.__defaults__ or ())
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        defaults = [NOTHING] * (len(names) - count) + list(function.__defaults__ or ())
        found[command.name or function.__name__] = [
            Parameter(name, hints[name], default)
            for name, default in zip(names, defaults, strict=True)
        ]
    return found


COMMANDS = read_commands()


def usual_values(parameter, command):
    """What a parameter is given by somebody who has read the manual; empty: nothing is known."""
    if parameter.is_output(command):
        return ("absent", "absent", "deep/er/absent", "модель", "empty", "link", "pipe", "null")
    return VALID.get(parameter.name, ())


def odd_values(parameter, command):
    """What it may be given by mistake."""
    if parameter.is_output(command):
        return PATHS
    return {int: NUMBERS, float: FLOATS}.get(parameter.kind, WORDS + PATHS)


def draw_option(draw, parameter, command, is_odd):
    """The words that a parameter adds to a call: a flag and a value, a value, or a flag."""
    if parameter.kind is bool:
        return [parameter.flag]
    usual = usual_values(parameter, command)
    value = draw(st.sampled_from(odd_values(parameter, command) if is_odd or not usual else usual))
    return [value] if parameter.is_argument else [parameter.flag, value]


@st.composite
def calls(draw):
    """A command with its arguments, and which of its inputs is broken how.

    In most calls at most one thing is odd, so that they get far.
    """
    command = draw(st.sampled_from(WEIGHTED))
    parameters = COMMANDS[command]
    optional = [parameter for parameter in parameters if not parameter.required]
    some = draw(st.lists(st.sampled_from(optional), max_size=4, unique=True)) if optional else []
    given = [parameter for parameter in parameters if parameter.required or parameter in some]
    odd = draw(st.sampled_from([None, "value", "value", "values", "file", "file", "words"]))
    at = draw(st.integers(0, max(0, len(given) - 1)))

    arguments, options = [], []
    for number, parameter in enumerate(given):
        is_odd = odd == "values" or (odd == "value" and number == at)
        words = draw_option(draw, parameter, command, is_odd)
        (arguments if parameter.is_argument else options).extend(words)
    if odd == "words":
        options += draw(st.sampled_from([["--odd"], ["--help"], ["more", "and more"], ["--"]]))
    for flag, value in LEAST.items():
        known = any(parameter.flag == flag for parameter in parameters)
        if known and flag not in options:
            options += [flag, value]
    is_dashed = any(value.startswith("-") for value in arguments)
    line = [command, *options, *(["--"] if is_dashed else []), *arguments]
    return line, draw(damages()) if odd == "file" else None


LEAST = {"--calibration-tokens": str(FEW), "--max-tokens": str(FEW), "--sequence-length": "32"}
"""The least that a command does, unless more is asked for."""
WEIGHTED = sorted(COMMANDS) + ["convert", "convert", "evaluate", "read", "distill", "apply"]
"""Commands to draw from, those that do more several times."""

FILES = (
    "student/config.json",
    "student/model.safetensors",
    "student/tokenizer.json",
    "student/tokenizer_config.json",
    "student/generation_config.json",
    "student/checksums.json",
    "student/README.md",
    "student/kernels.py",
    "teacher/config.json",
    "teacher/model.safetensors",
    "teacher/tokenizer.json",
    "teacher/tokenizer_config.json",
    "teacher/generation_config.json",
    "recipe.yaml",
    "text.txt",
    "rows.jsonl",
    "report.json",
    "ffns.safetensors",
)


def damages():
    """(file, way, two numbers in 0 … 1) of something that is done to an input."""
    ways = ["cut", "flip", "flip", "odd bytes", "empty", "gone", "folder", "loop", "json"]
    share = st.floats(0, 1, exclude_max=True)
    return st.tuples(st.sampled_from(FILES), st.sampled_from(ways), share, share)


JUNK = (None, -1, 0, 10**12, 1e400, "", "x", [], {}, [[]], True, "../..", [None] * 3)


def change_json(content, at, other):
    """Put junk at one place of a JSON value."""
    node = content
    while isinstance(node, dict) and node:
        names = sorted(node)
        name = names[int(at * len(names))]
        at = at * len(names) % 1
        if not isinstance(node[name], dict) or not node[name] or other < 0.3:
            node[name] = JUNK[int(other * len(JUNK))]
            return
        node = node[name]


def damage(root, name, way, at, other):
    """Break the file ``name`` in one ``way``."""
    file = root / name
    content = bytearray(file.read_bytes())
    place = int(at * len(content))
    if way == "cut":
        file.write_bytes(content[:place])
    elif way == "flip":
        content[place] ^= 1 << int(other * 8)
        file.write_bytes(content)
    elif way == "odd bytes":
        content[place:place] = b"\x00\xff\xfe\xed\xa0\x80\r\x1b" * (1 + int(other * 9))
        file.write_bytes(content)
    elif way == "empty":
        file.write_bytes(b"")
    elif way == "json":
        try:
            value = json.loads(content)
        except ValueError:
            return
        change_json(value, at, other)
        file.write_text(json.dumps(value))
    else:
        file.unlink()
        if way == "folder":
            file.mkdir()
        elif way == "loop":
            file.symlink_to(file)


# the world


def call(*line):
    """Exit code, stdout and stderr; whatever else ends the call comes through."""
    out, error = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["hf-kernel-ffn", *map(str, line)]
    try:
        with redirect_stdout(out), redirect_stderr(error):
            main()
    except SystemExit as stopped:
        return stopped.code, out.getvalue(), error.getvalue()
    finally:
        sys.argv = before
    return 0, out.getvalue(), error.getvalue()


@pytest.fixture(scope="module")
def world(teacher_folder, tokenizer, text_file, tmp_path_factory):
    """A folder with every kind of input, all whole."""
    root = tmp_path_factory.mktemp("world")
    for name in ("llama", "gpt2"):
        target = root / {"llama": "teacher"}.get(name, name)
        shutil.copytree(teacher_folder(name), target)
    bare = tiny_teacher("mistral", "base", vocab_size=4096, pad_token_id=None)
    bare.save_pretrained(root / "bare")
    tokenizer.save_pretrained(root / "bare")
    tiny("mixtral", "AutoModelForCausalLM", **VOCABULARY).save_pretrained(root / "mixture")
    tokenizer.save_pretrained(root / "mixture")
    tiny("albert", "AutoModelForMaskedLM", **VOCABULARY).save_pretrained(root / "shared")
    masking = deepcopy(tokenizer)
    masking.add_special_tokens({"mask_token": "<mask>"})
    masking.save_pretrained(root / "shared")
    text = text_file.read_text(encoding="utf-8")
    (root / "text.txt").write_text(text, encoding="utf-8")
    rows = [json.dumps({"text": line, "id": 1}) for line in text.splitlines() if line]
    (root / "rows.jsonl").write_text("\n".join(rows) + "\n")
    teacher, student = root / "teacher", root / "student"
    assert call("convert", teacher, student, "--calibration-tokens", FEW)[0] == 0
    assert call("convert", root / "mixture", root / "mixed", "--calibration-tokens", FEW)[0] == 0
    assert call("export", student, root / "ffns.safetensors")[0] == 0
    least = ("--max-tokens", FEW, "--sequence-length", 32)
    evaluation = ("evaluate", student, "--teacher", teacher, "--text", root / "text.txt")
    assert call(*evaluation, *least, "--json", root / "report.json")[0] == 0
    stage = {"name": "layer-wise", "tokens": 64, "learning_rate": 0.01, "batch_size": 2}
    recipe = {
        "teacher": "teacher",
        "student": "student",
        "data": {"train": "text.txt", "sequence_length": 32},
        "stages": [stage, {**stage, "name": "logits"}],
        "output_dir": "distilled",
        "calibration_tokens": FEW,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def furnish(root):
    """Add paths of every kind."""
    (root / "empty").mkdir()
    (root / "full").mkdir()
    (root / "full" / "mine").write_text("mine")
    (root / "loop").symlink_to(root / "loop")
    (root / "dangling").symlink_to(root / "nowhere" / "at-all")
    (root / "target").mkdir()
    (root / "link").symlink_to(root / "target")
    os.mkfifo(root / "pipe")
    try:
        # never the system's own: a fault would replace it
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (root / "null").write_bytes(b"x")
    except OSError:
        (root / "null").unlink(missing_ok=True)
        os.mkfifo(root / "null")


def state_of(root):
    """Kind and content of everything in a folder, by its path."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_file():
            found[name] = ("file", hashlib.sha256(path.read_bytes()).hexdigest())
        else:
            found[name] = ("other", stat.S_IFMT(path.lstat().st_mode))
    return found


@contextmanager
def readers(*pipes):
    """Read what comes through pipes, so that nobody waits for a reader."""
    threads, stop = [], threading.Event()

    def drain(pipe):
        descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        while not stop.wait(0.01):
            try:
                while os.read(descriptor, 2**16):
                    pass
            except BlockingIOError:
                pass
        os.close(descriptor)

    for pipe in pipes:
        threads.append(threading.Thread(target=drain, args=(pipe,)))
        threads[-1].start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextmanager
def alarm(seconds):
    """TimeoutError after so many ``seconds``."""

    def late(*_):
        raise TimeoutError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outputs_of(line, recipe):
    """The paths that a call may write to."""
    command = line[0]
    written = []
    positional = []
    at = 1
    flags = {parameter.flag: parameter for parameter in COMMANDS[command]}
    while at < len(line):
        parameter = flags.get(line[at])
        if parameter is None:
            positional += [line[at]] if line[at] != "--" else []
            at += 1
        elif parameter.kind is bool:
            at += 1
        else:
            if parameter.is_output(command):
                written.append(line[at + 1])
            at += 2
    arguments = [parameter for parameter in COMMANDS[command] if parameter.is_argument]
    for parameter, value in zip(arguments, positional, strict=False):
        if parameter.is_output(command):
            written.append(value)
    if command == "distill":
        written += [recipe, *(part.partition("=")[2] for part in line if "output_dir=" in part)]
    return written


def check_whole(root, command, path):
    """A result is there whole."""
    target = Path(path)
    if not target.exists() or not (target.is_file() or target.is_dir()):
        return  # a pipe, a device
    if command in ("convert", "apply", "distill"):
        bad = [finding for finding in verify_folder(target) if not finding.good]
        assert not bad, bad
    elif command == "record":
        assert json.loads((target / "record.json").read_text())["shards"] >= 1
    elif command == "export":
        with safe_open(target, "pt") as tensors:
            assert tensors.metadata()["kernel_ffn"]
    else:
        text = target.read_text(encoding="utf-8")
        assert text.startswith("<!") or json.loads(text)


def check(world, scratch, line, broken):
    """Make one call in a copy of the world, and see how it ends; the exit code."""
    root = Path(shutil.copytree(world, scratch))
    furnish(root)
    if broken is not None:
        damage(root, *broken)
    before = state_of(root)
    here = Path.cwd()
    os.chdir(root)
    pipes = [path for path in (root / "pipe", root / "null") if stat.S_ISFIFO(path.stat().st_mode)]
    try:
        with readers(*pipes), alarm(LONGEST):
            code, out, error = call(*line)
        assert code in (0, 2), (code, out, error)
        if code == 2:
            assert error.startswith("error: ") and error.count("\n") == 1, error
            assert error.endswith("\n") and len(error) < 5000, error
        check_files(root, line, before, code)
    finally:
        os.chdir(here)
    return code


def check_files(root, line, before, code):
    """What was there is as it was, but for what a call that ended well has written."""
    after = state_of(root)
    allowed = []
    for path in outputs_of(line, "distilled"):
        try:
            allowed.append(Path(path).resolve().relative_to(root.resolve()).as_posix())
        except (ValueError, OSError, RuntimeError):
            continue  # outside, or no path

    def is_written(name):
        return any(
            name == path
            or path == "."
            or name.startswith(f"{path}/")
            or path.startswith(f"{name}/")
            for path in allowed
        )

    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    if code == 2 and line[0] == "distill":  # the state to go on from stays
        kept = {name for name in changed if name not in before and is_written(name)}
        assert not any(name.endswith("/config.json") for name in kept), kept
        changed -= kept
    if code == 2:
        assert not changed, changed
        return
    assert not {name for name in changed if not is_written(name)}, changed
    assert not [name for name in after if ".hf_kernel_ffn." in name]
    if "--help" not in line:
        for path in outputs_of(line, "distilled"):
            check_whole(root, line[0], path)


QUICK, MANY = 40, 500
OPTIONS = dict(
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def fuzz(world, tmp_path_factory):
    """Checks a call, and counts how calls end by command."""
    ends = Counter()

    def run(drawn):
        line, broken = drawn
        note(f"{line} {broken}")
        scratch = tmp_path_factory.mktemp("call")
        try:
            code = check(world, scratch / "w", line, broken)
        except BaseException as error:
            raise AssertionError(f"{line!r} with {broken!r} broken: {error!r}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        ends[line[0], code] += 1

    yield run
    print(dict(sorted(ends.items())), sum(ends.values()))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked at the terminal"))


def test_every_command_is_drawn():
    assert {"convert", "distill", "verify", "read"} <= COMMANDS.keys()
    everything = [parameter for command in COMMANDS.values() for parameter in command]
    assert any(parameter.is_list for parameter in everything)
    assert {parameter.kind for parameter in everything} >= {bool, int, float, str, Path}


@settings(max_examples=QUICK, **OPTIONS)
@given(drawn=calls())
def test_a_call_ends_with_a_result_or_in_one_line(fuzz, drawn):
    fuzz(drawn)


@pytest.mark.slow
@settings(max_examples=MANY, **OPTIONS)
@given(drawn=calls())
def test_many_calls_end_with_a_result_or_in_one_line(fuzz, drawn):
    fuzz(drawn)
