"""Which code a checkpoint carries: everything in this folder, its family's file, a user's kernel.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError
from .kernels import get_kernel

if TYPE_CHECKING:
    from .config_mixin import KernelConfigMixin

KERNEL_API = ("Kernel", "register_kernel", "KERNELS", "get_kernel")
"""What a user's kernel file may import of the package: names of kernels.py."""
PACKAGE = "hf_kernel_ffn"


def carried_file_names() -> list[str]:
    """Names of the files that every checkpoint carries beside its family's own.

    In the package these are all files of this folder.
    """
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.name for file in files if file.name != "__init__.py")


def code_files(config_class: type) -> dict[str, str]:
    """Source by file name of the code that a checkpoint of ``config_class`` carries.

    In the package that is everything in this folder, and the family's own files, which are made
    when they are needed. In a checkpoint it is whatever the file of ``config_class`` imports.
    """
    module = sys.modules[config_class.__module__]
    family_files = getattr(module, "CODE_FILES", None)
    if family_files is not None:
        return {name: _read(name) for name in carried_file_names()} | family_files

    sources: dict[str, str] = {}
    waiting = [Path(str(module.__file__)).name]
    while waiting:
        name = waiting.pop()
        sources[name] = _read(name)
        imported = re.findall(r"^from \.(\w+) import", sources[name], flags=re.MULTILINE)
        waiting += [f"{stem}.py" for stem in imported if f"{stem}.py" not in sources]
    return sources


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def get_custom_kernel_file(config: KernelConfigMixin) -> str | None:
    """Source of the one file that registers the user's own kernels, as a checkpoint carries it.

    Returns:
        None if every kernel that ``config`` uses is the package's.

    Raises:
        InputError: the kernels stand in several files, or in none that could travel.
    """
    files = _find_custom_kernel_files(config)
    if not files:
        return None
    if len(files) > 1:
        raise InputError(
            f"found kernels of your own in {len(files)} files, expected one: "
            f"put {', '.join(sorted(files))} together"
        )

    source = _read_kernel_file(Path(files.pop()))
    # The package does not exist where the checkpoint is loaded without it.
    source = re.sub(
        rf"^from {PACKAGE}(\.checkpoint_code\.kernels)? import",
        "from .kernels import",
        source,
        flags=re.MULTILINE,
    )
    refused = _find_package_imports(source)
    if refused:
        raise InputError(
            f"found {refused[0]} imported in a kernel's file, which a checkpoint does not carry: "
            f"write 'from {PACKAGE} import Kernel, register_kernel' and import nothing else of "
            "the package"
        )
    return source


def _read_kernel_file(file: Path) -> str:
    """Source of a user's file, without a byte order mark; InputError if it is no UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"found {file} in another encoding than UTF-8 ({error}), which cannot travel with a "
            "checkpoint: save it as UTF-8"
        ) from error


def _find_custom_kernel_files(config: KernelConfigMixin) -> set[str]:
    """Files of the kernels that are not the package's; InputError if one cannot travel."""
    files = set()
    for layer in config.kernel_ffn_layers().values():
        kernel_class = type(get_kernel(layer.settings.kernel))
        module = kernel_class.__module__
        if module == get_kernel.__module__:
            continue
        try:
            file = inspect.getsourcefile(kernel_class)
        except TypeError:
            file = None
        if file is None or module == "__main__" or not Path(file).is_file():
            raise InputError(
                f"kernel {layer.settings.kernel!r} stands in {module!r}, which cannot travel "
                "with a checkpoint: put its class and its registration into a .py file of their "
                "own and import that"
            )
        files.add(file)
    return files


def _find_package_imports(source: str) -> list[str]:
    """What ``source`` imports of the package beyond the names of KERNEL_API."""
    refused = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            refused += [name for name in names if _is_of_the_package(name)]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if _is_of_the_package(node.module or ""):
                refused.append(str(node.module))
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.module == "kernels":
            names = [alias.name for alias in node.names]
            refused += [f"{PACKAGE}.{name}" for name in names if name not in KERNEL_API]
    return refused


def _is_of_the_package(module: str) -> bool:
    return module.split(".")[0] == PACKAGE
