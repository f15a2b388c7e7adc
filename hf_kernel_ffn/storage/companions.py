"""What lies beside a model's weights and config, and has to come along with its student: tokenizer,
processors, chat templates, the modules of sentence-transformers, a licence."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ..compat import list_hub_files
from .model_files import PICKLES, find_file

OWN_NAMES = {
    "README.md",
    "adapter_config.json",
    "checksums.json",
    "config.json",
    "generation_config.json",
    "trainer_state.json",
}
"""Files that say something of the teacher alone, or that a student has of its own."""
OWN_SUFFIXES = (
    *PICKLES,  # which run code when they are read
    *(".gguf", ".h5", ".mlmodel", ".msgpack", ".npz", ".onnx", ".ot", ".pb", ".tflite"),
    *(".index.json", ".py", ".safetensors"),
)
"""Ends of the names of weights, and of code: a student carries its own."""
SENTENCE_MODULES = "modules.json"
"""The file of sentence-transformers that lists folders of its own."""
TEMPLATES = "additional_chat_templates"
"""The folder of a tokenizer that has several chat templates."""


def copy_companions(source: str, out: Path) -> None:
    """Copy to ``out`` the very files that lie beside the weights and the config of a model.

    Args:
        source: of the model, a local folder or a hub id.
    """
    for name in _list_companions(source):
        file = find_file(source, name)
        if file is not None and not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / name)


def _list_companions(source: str) -> list[str]:
    """The names of the files to copy, folders with ``/``."""
    folders = [TEMPLATES, *_list_module_folders(source)]
    root = Path(source)
    if root.is_dir():
        names = [path.name for path in root.iterdir() if path.is_file()]
        for folder in folders:
            paths = [path for path in (root / folder).rglob("*") if path.is_file()]
            names += [path.relative_to(root).as_posix() for path in paths]
    else:
        names = list_hub_files(source)
    return sorted(name for name in names if _is_companion(PurePosixPath(name), folders))


def _list_module_folders(source: str) -> list[str]:
    """The folders of the modules of a sentence-transformers model; none of another."""
    file = find_file(source, SENTENCE_MODULES)
    if file is None:
        return []
    folders = []
    with suppress(ValueError, TypeError, AttributeError):  # it is not for us to say what is wrong
        for module in json.loads(file.read_text(encoding="utf-8")):
            path = PurePosixPath(module.get("path") or "")
            if path.parts and ".." not in path.parts and not path.is_absolute():
                folders.append(path.as_posix())
    return folders


def _is_companion(name: PurePosixPath, folders: list[str]) -> bool:
    """Whether a file comes along; in ``folders`` its weights do too."""
    if any(part.startswith(".") for part in name.parts):
        return False
    is_inside = any(name.is_relative_to(folder) for folder in folders)
    if is_inside:
        return name.suffix == ".safetensors" or not name.name.endswith(OWN_SUFFIXES)
    return len(name.parts) == 1 and not (name.name in OWN_NAMES or name.name.endswith(OWN_SUFFIXES))
