"""Outputs of every kind: folders and files are made whole or not at all, and refused beforehand."""

import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from hf_kernel_ffn import InputError
from hf_kernel_ffn.storage.files import (
    new_folder,
    replace_file,
    require_empty,
    require_place,
    save_tensors,
    write_text,
)

NAMES = ("café", "модель", "模型", "a b'c\"d", "-dash", "😀", "x" * 255)


def fill(folder):
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_text("w")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["absent", "deep", "empty", "link", "here", *NAMES])
def place(request, tmp_path, monkeypatch):
    """A place to make a folder at, and where that is."""
    kind = request.param
    target = tmp_path / "target"
    if kind in ("empty", "link", "here"):
        target.mkdir(mode=0o750)
    if kind == "link":
        (tmp_path / "link").symlink_to(target)
        return tmp_path / "link", target
    if kind == "here":
        monkeypatch.chdir(target)
        return Path(), target
    if kind == "deep":
        return tmp_path / "a" / "b" / "target", tmp_path / "a" / "b" / "target"
    return (target, target) if kind in ("absent", "empty") else (tmp_path / kind,) * 2


def test_a_folder_is_made_wherever_one_can_be(place):
    given, target = place
    before = target.stat() if target.exists() else None
    require_empty(given)
    with new_folder(given) as folder:
        fill(folder)
        assert folder.name == target.name
    assert names(target) == ["config.json", "weights"]
    if before is not None:  # it is the same folder: of a mount, of a shell that stands in it
        after = target.stat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert not [path for path in target.parent.iterdir() if path.name.startswith(".")]


def test_a_folder_that_fails_leaves_nothing(place):
    given, target = place
    was_there = target.exists()
    with pytest.raises(KeyboardInterrupt), new_folder(given) as folder:
        fill(folder)
        raise KeyboardInterrupt
    assert target.exists() == was_there
    assert not was_there or names(target) == []
    assert not (target.parent / "a").exists() and not (target.parents[1] / "a").exists()


def test_a_file_that_fails_leaves_no_folders(tmp_path):
    with pytest.raises(KeyboardInterrupt), replace_file(tmp_path / "a" / "b" / "file") as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_filled_is_left_empty(tmp_path, monkeypatch):
    """As where the disk is gone between two files."""
    rename, calls = os.rename, []

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("no more")
        rename(*arguments)

    monkeypatch.setattr(os, "rename", fail_at_the_second)
    with pytest.raises(InputError, match="no more"), new_folder(tmp_path) as folder:
        fill(folder)
    assert calls[-1][1].name == "config.json"  # the last: without it nobody takes it for a model
    assert names(tmp_path) == []


def loop(folder):
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def dangling(folder):
    (folder / "dangling").symlink_to(folder / "nowhere" / "at all")
    return folder / "dangling"


def pipe(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def file(folder):
    (folder / "file").write_text("mine")
    return folder / "file"


NO_PLACES = {
    "a file": file,
    "under a file": lambda folder: file(folder) / "out",
    "a full folder": lambda folder: file(folder).parent,
    "a pipe": pipe,
    "a link to itself": loop,
    "under a link to itself": lambda folder: loop(folder) / "out",
    "a link to nothing": dangling,
    "under a link to nothing": lambda folder: dangling(folder) / "out",
    "too long a name": lambda folder: folder / ("x" * 256),
    "too long a path": lambda folder: Path(folder, *["x" * 200] * 30),
    "a zero byte": lambda folder: folder / "a\0b",
    "where nothing can be made": lambda folder: Path("/proc/out"),
}


@pytest.mark.parametrize("kind", NO_PLACES)
def test_a_folder_is_refused_before_the_work(kind, tmp_path):
    path = NO_PLACES[kind](tmp_path)
    with pytest.raises(InputError) as refusal:
        require_empty(path)
    assert "\n" not in str(refusal.value)


NO_FILES = {
    "a folder": lambda folder: folder,
    "under a file": lambda folder: file(folder) / "out",
    "a link to itself": loop,
    "too long a name": lambda folder: folder / ("x" * 256),
    "too long with what is added": lambda folder: folder / ("x" * 254),
    "a zero byte": lambda folder: folder / "a\0b",
    "where nothing can be made": lambda folder: Path("/proc/out"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_file_is_refused_before_the_work(kind, tmp_path):
    path = NO_FILES[kind](tmp_path)
    with pytest.raises(InputError) as refusal:
        require_place(path)
    assert "\n" not in str(refusal.value)


def test_an_input_is_not_written_over(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "report.json", "text.txt"):
        (model / name).write_text("mine")
    for name in ("config.json", "model.safetensors", "text.txt"):
        with pytest.raises(InputError, match="belongs to"):
            require_place(model / name, "a/hub-id", None, model)
    with pytest.raises(InputError, match="belongs to"):
        require_place(model / "report.json", model / "report.json")
    require_place(model / "report.json", model)  # of an evaluation that is made again
    require_place(model / "new.json", model)


def test_a_pipe_is_written_into(tmp_path):
    path = pipe(tmp_path)
    require_place(path)
    read = []
    reader = threading.Thread(target=lambda: read.append(path.read_text(encoding="utf-8")))
    reader.start()
    write_text(path, "häppy")
    reader.join(10)
    assert read == ["häppy"] and stat.S_ISFIFO(path.stat().st_mode)
    assert names(tmp_path) == ["pipe"]


def test_a_device_is_written_into(tmp_path):
    """A device of the test's own: what replaces the system's breaks the system."""
    null = tmp_path / "null"
    try:
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        null.write_text("x")
    except OSError:
        pytest.skip("devices cannot be made here")
    before = null.stat()
    require_place(null)
    write_text(null, "x")
    assert null.stat().st_ino == before.st_ino and stat.S_ISCHR(null.stat().st_mode)


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    target = file(tmp_path)
    target.chmod(0o640)
    (tmp_path / "link").symlink_to(target)
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    (tmp_path / "other").symlink_to(tmp_path / "made")
    write_text(tmp_path / "other", "new")
    assert (tmp_path / "made").read_text() == "new"


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_file_may_have_any_name(tmp_path, name):
    require_place(tmp_path / name)
    write_text(tmp_path / name, "x")
    assert names(tmp_path) == [name]


def test_a_text_with_half_a_pair_is_written(tmp_path):
    write_text(tmp_path / "file", "a\udce9b")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "a\\udce9b"


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_are_those_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as folder:
            save_tensors({"x": torch.zeros(2)}, folder / "x.safetensors")
            write_text(folder / "y.json", "{}")
        with replace_file(tmp_path / "z.safetensors") as beside:
            save_tensors({"x": torch.zeros(2)}, beside)
    finally:
        os.umask(before)
    files = [*(tmp_path / "out").iterdir(), tmp_path / "z.safetensors"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
