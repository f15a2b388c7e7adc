"""Which code a checkpoint carries: everything in this folder, its family's file, a user's kernel.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

from .errors import InputError
from .kernels import get_kernel


def carried_file_names() -> list[str]:
    """Names of the files that every checkpoint carries beside its family's own: all that lie here, in the package."""
    return sorted(
        file.name for file in Path(__file__).parent.glob("*.py") if file.name != "__init__.py"
    )


def code_files(config_class) -> dict[str, str]:
    """Source by file name of the code that a checkpoint of ``config_class`` carries.

    In the package that is everything in this folder, and the family's own files, which are made when they are needed. In a
    checkpoint it is whatever the file of ``config_class`` imports.
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


def get_custom_kernel_file(config) -> str | None:
    """Source of the one file that registers the user's own kernels used by ``config``, as it must stand in a
    checkpoint; None if every kernel is the package's.

    Raises:
        InputError: the kernels stand in several files, or in none that could travel.
    """
    files = set()
    for layer in config.kernel_ffn_layers().values():
        kind = type(get_kernel(layer.settings.kernel))
        if kind.__module__ == get_kernel.__module__:
            continue
        try:
            file = inspect.getsourcefile(kind)
        except TypeError:
            file = None
        if file is None or kind.__module__ == "__main__" or not Path(file).is_file():
            raise InputError(
                f"kernel {layer.settings.kernel!r} stands in {kind.__module__!r}, which cannot travel with a checkpoint: "
                "put its class and its registration into a .py file of their own and import that"
            )
        files.add(file)
    if not files:
        return None
    if len(files) > 1:
        raise InputError(
            f"found kernels of your own in {len(files)} files, expected one: put {', '.join(sorted(files))} together"
        )
    source = Path(files.pop()).read_text(encoding="utf-8")
    # Absolute imports of the package do not exist where the checkpoint is loaded without it.
    source = re.sub(
        r"^from hf_kernel_ffn(\.checkpoint_code\.kernels)? import",
        "from .kernels import",
        source,
        flags=re.MULTILINE,
    )
    for node in ast.walk(ast.parse(source)):
        wanted = []
        if isinstance(node, ast.Import):
            wanted = [
                alias.name for alias in node.names if alias.name.split(".")[0] == "hf_kernel_ffn"
            ]
        elif (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and (node.module or "").split(".")[0] == "hf_kernel_ffn"
        ):
            wanted = [str(node.module)]
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.module == "kernels":
            wanted = [
                f"hf_kernel_ffn.{a.name}"
                for a in node.names
                if a.name not in ("Kernel", "register_kernel", "KERNELS", "get_kernel")
            ]
        if wanted:
            raise InputError(
                f"found {wanted[0]} imported in a kernel's file, which a checkpoint does not carry: "
                "write 'from hf_kernel_ffn import Kernel, register_kernel' and import nothing else of the package"
            )
    return source
