"""A family's own modelling file: what travels in its checkpoints, and a module of the same text.

One template serves every family. Filled in, it names the family's stock classes and nothing else,
so that a checkpoint imports the one stock model that it needs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.abc import InspectLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel

from ..checkpoint_code.carried_code import carried_file_names
from ..checkpoint_code.errors import InputError
from ..compat import find_class_names, find_relative_imports

CHECKPOINT_CODE = carried_file_names.__module__.rpartition(".")[0]
"""The package of the files that travel."""
TEMPLATE = '''\
"""{config} and its models with kernel-readout FFNs. Travels inside converted checkpoints."""

from transformers import AutoModel
{imports}
from {package}.config_mixin import KernelConfigMixin
from {package}.modeling import KernelModelMixin


class Kernel{config}(KernelConfigMixin, {config}):
    model_type = "kernel_{model_type}"
    auto_classes = {{
{auto_classes}
    }}
    kernel_ffn: dict | None = None

{classes}
# The stock classification heads build their base model through AutoModel; the key is this very
# class.
AutoModel.register(Kernel{config}, Kernel{base})
'''
CLASS = """
class Kernel{name}(KernelModelMixin, {name}):
    config_class = Kernel{config}

"""


@dataclass(frozen=True)
class _FamilyCode:
    """Where a family's stock classes are, and what else its checkpoints need."""

    package: str
    """Where the module with the converted classes is put."""
    heads: dict[str, str]
    """Stock class by Auto class name, AutoConfig first, then AutoModel."""
    stock: dict[str, str]
    """Module of each stock class, as it is imported there."""
    sources: dict[str, str] = field(default_factory=dict)
    """Source by name of the family's own files, if transformers does not have it."""


def write_modeling_source(
    model_type: str, heads: Mapping[str, str], stock: Mapping[str, str], package: str = ""
) -> str:
    """Return the text of ``modeling_kernel_<model_type>.py``.

    Args:
        heads: stock class by Auto class name, AutoConfig and AutoModel among them, config first.
        stock: module of each stock class.
        package: where the travelling files are: nothing in a checkpoint, this package's name here.
    """
    config, *models = dict.fromkeys(heads.values())
    names_by_module: dict[str, list[str]] = {}
    for name in sorted(stock):
        names_by_module.setdefault(stock[name], []).append(name)
    imports = [
        f"from {module} import {', '.join(names_by_module[module])}"
        for module in dict.fromkeys(stock.values())
    ]
    auto_classes = [f'        "{auto}": "Kernel{name}",' for auto, name in heads.items()]
    classes = [CLASS.format(name=name, config=config) for name in models]
    return TEMPLATE.format(
        model_type=model_type,
        config=config,
        base=heads["AutoModel"],
        package=package,
        imports="\n".join(imports),
        auto_classes="\n".join(auto_classes),
        classes="\n".join(classes),
    )


@cache
def get_stock_heads(model_type: str) -> dict[str, str]:
    """Return every head that the installed transformers has for ``model_type``.

    Returns:
        the stock class by Auto class name, AutoConfig first; empty if the family is not there.
    """
    if model_type not in CONFIG_MAPPING:
        return {}
    config_class = CONFIG_MAPPING[model_type]
    heads = {"AutoConfig": config_class.__name__}
    for auto, name in find_class_names(model_type).items():
        # A name may be of another family's model, of which this one is a part.
        stock_class = getattr(transformers, name, None)
        if getattr(stock_class, "config_class", None) is config_class:
            heads[auto] = name
    return heads


def get_task_classes(model_type: str, teacher: PreTrainedModel | None = None) -> ModuleType:
    """Return the module with a family's converted classes, ``Kernel`` + the stock class's name.

    Args:
        teacher: a model of the family; needed if its code is not transformers' own.

    Raises:
        InputError: the family's code is neither in transformers nor beside the ``teacher``, or its
            files cannot travel.
    """
    heads = get_stock_heads(model_type)
    if heads:
        stock = dict.fromkeys(heads.values(), "transformers")
        return _get_module(model_type, _FamilyCode(CHECKPOINT_CODE, heads, stock))
    return _get_module(model_type, _find_own_code(model_type, teacher))


def _find_own_code(model_type: str, teacher: PreTrainedModel | None) -> _FamilyCode:
    """Find the code of a family that transformers does not have, beside its ``teacher``'s class."""
    auto_map = _read_auto_map(teacher)
    if teacher is None or "AutoConfig" not in auto_map or "AutoModel" not in auto_map:
        raise InputError(
            f"found a {model_type!r}, which transformers does not have, "
            "expected an auto_map with AutoConfig and AutoModel in its config: load it by "
            "from_pretrained(..., trust_remote_code=True) from a folder that has both"
        )
    package = type(teacher).__module__.rpartition(".")[0]
    if not package:
        raise InputError(
            f"found {type(teacher).__name__} in a module of its own, "
            f"{type(teacher).__module__!r}, expected a package: "
            "load the teacher by an Auto class with trust_remote_code=True"
        )

    heads: dict[str, str] = {}
    files: dict[str, str] = {}
    for auto in sorted(auto_map, key=lambda a: (a != "AutoConfig", a != "AutoModel", a)):
        file, _, name = auto_map[auto].rpartition(".")
        heads[auto] = name
        files[name] = file

    return _FamilyCode(
        package=package,
        heads=heads,
        stock={name: f".{file}" for name, file in files.items()},
        sources=_read_sources(model_type, package, set(files.values())),
    )


def _read_auto_map(teacher: PreTrainedModel | None) -> dict[str, str]:
    """Return ``file.Class`` by Auto class name, as the config of ``teacher`` has it."""
    auto_map = None if teacher is None else getattr(teacher.config, "auto_map", None)
    return {
        auto: reference.rpartition("--")[2]  # before that the repository may stand
        for auto, reference in (auto_map or {}).items()
        if isinstance(reference, str)
    }


def _read_sources(model_type: str, package: str, files: set[str]) -> dict[str, str]:
    """Return the source by name of ``files`` in ``package`` and of what they import beside them.

    Raises:
        InputError: one has the name of a file that every checkpoint carries.
    """
    sources: dict[str, str] = {}
    for file in files:
        module = importlib.import_module(f"{package}.{file}")
        path = Path(str(module.__file__))
        for needed in (path, *find_relative_imports(path)):
            sources[needed.name] = needed.read_text(encoding="utf-8")

    taken = sorted({*sources} & {*carried_file_names()})
    if taken:
        raise InputError(
            f"found {taken[0]} among the code of {model_type!r}, "
            "which a checkpoint has a file of: rename it"
        )
    return sources


def _get_module(model_type: str, code: _FamilyCode) -> ModuleType:
    """Return the module with the family's converted classes, made once."""
    stem = f"modeling_kernel_{model_type}"
    name = f"{code.package}.{stem}"
    if name in sys.modules:
        return sys.modules[name]

    here = write_modeling_source(model_type, code.heads, code.stock, CHECKPOINT_CODE)
    in_a_checkpoint = write_modeling_source(model_type, code.heads, code.stock)
    loader = _TextLoader(here)
    spec = spec_from_loader(name, loader)
    assert spec is not None

    module = module_from_spec(spec)
    vars(module)["CODE_FILES"] = {f"{stem}.py": in_a_checkpoint, **code.sources}
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _TextLoader(InspectLoader):
    """Makes a module from text, by the machinery that makes them from files."""

    def __init__(self, source: str) -> None:
        self.source = source

    def get_source(self, fullname: str) -> str:
        """Return the text, whatever the module is called."""
        return self.source
