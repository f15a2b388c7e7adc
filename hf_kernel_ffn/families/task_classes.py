"""A family's own modelling file: what travels in its checkpoints, and the module that this package makes of the same text.

One template serves every family. Filled in, it names the family's stock classes and nothing else, so that a checkpoint imports
the one stock model that it needs.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.abc import InspectLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import modeling_auto

from ..checkpoint_code.carried_code import carried_file_names
from ..checkpoint_code.errors import InputError

CHECKPOINT_CODE = carried_file_names.__module__.rpartition(".")[0]
"""The package of the files that travel."""
TEMPLATE = '''"""{config} and its models with kernel-readout FFNs. Travels inside converted checkpoints."""

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
# The stock classification heads build their base model through AutoModel; the key is this very class.
AutoModel.register(Kernel{config}, Kernel{base})
'''
CLASS = """
class Kernel{name}(KernelModelMixin, {name}):
    config_class = Kernel{config}

"""


def write_modeling_source(
    model_type: str, heads: dict[str, str], stock: dict[str, str], package: str = ""
) -> str:
    """The text of ``modeling_kernel_<model_type>.py``.

    Args:
        heads: stock class by Auto class name, AutoConfig and AutoModel among them.
        stock: module of each stock class.
        package: where the travelling files are: nothing in a checkpoint, this package's name here.
    """
    names = list(dict.fromkeys(heads.values()))
    modules = {
        module: sorted(name for name in names if stock[name] == module)
        for module in dict.fromkeys(stock.values())
    }
    return TEMPLATE.format(
        model_type=model_type,
        config=heads["AutoConfig"],
        base=heads["AutoModel"],
        package=package,
        imports="\n".join(
            f"from {module} import {', '.join(some)}" for module, some in modules.items() if some
        ),
        auto_classes="\n".join(
            f'        "{auto}": "Kernel{name}",' for auto, name in heads.items()
        ),
        classes="\n".join(
            CLASS.format(name=name, config=heads["AutoConfig"]) for name in names[1:]
        ),
    )


@cache
def get_stock_heads(model_type: str) -> dict[str, str]:
    """Stock class by Auto class name of every head that the installed transformers has for ``model_type``, config first; empty
    if it has none."""
    if model_type not in CONFIG_MAPPING:
        return {}
    config = CONFIG_MAPPING[model_type]
    heads = {"AutoConfig": config.__name__}
    for auto in sorted(name for name in vars(modeling_auto) if name.startswith("AutoModel")):
        mapping: Any = getattr(getattr(modeling_auto, auto), "_model_mapping", None)
        name = None if mapping is None else mapping._model_mapping.get(model_type)
        name = name[0] if isinstance(name, tuple) else name
        # A name may be of another family's model, of which this one is a part.
        if (
            name is not None
            and getattr(getattr(transformers, name, None), "config_class", None) is config
        ):
            heads[auto] = name
    return heads


def get_task_classes(model_type: str, teacher: Any = None) -> ModuleType:
    """The module with a family's converted classes, ``Kernel`` + the stock class's name.

    Args:
        teacher: a model of the family; needed if its code is not transformers' own.

    Raises:
        InputError: the family's code is neither in transformers nor beside the ``teacher``, or its files cannot travel.
    """
    heads = get_stock_heads(model_type)
    if heads:
        return _make_module(
            f"{CHECKPOINT_CODE}.modeling_kernel_{model_type}",
            model_type,
            heads,
            dict.fromkeys(heads.values(), "transformers"),
            {},
        )
    auto_map = {} if teacher is None else {
        auto: ref.rpartition("--")[2] for auto, ref in (getattr(teacher.config, "auto_map", None) or {}).items() if isinstance(ref, str)
    }  # fmt: skip
    if "AutoConfig" not in auto_map or "AutoModel" not in auto_map:
        raise InputError(
            f"found a {model_type!r}, which transformers does not have, expected an auto_map with AutoConfig and AutoModel in its "
            "config: load it by from_pretrained(..., trust_remote_code=True) from a folder that has both"
        )
    order = sorted(auto_map, key=lambda auto: (auto != "AutoConfig", auto != "AutoModel", auto))
    heads = {auto: auto_map[auto].rpartition(".")[2] for auto in order}
    files = {heads[auto]: auto_map[auto].rpartition(".")[0] for auto in order}
    package = type(teacher).__module__.rpartition(".")[0]
    if not package:
        raise InputError(
            f"found {type(teacher).__name__} in a module of its own, {type(teacher).__module__!r}, expected a package: load the teacher "
            "by an Auto class with trust_remote_code=True"
        )
    sources: dict[str, str] = {}
    for file in set(files.values()):
        module = importlib.import_module(f"{package}.{file}")
        for path in (str(module.__file__), *get_relative_import_files(str(module.__file__))):
            sources[Path(path).name] = Path(path).read_text(encoding="utf-8")
    taken = sorted({*sources} & {*carried_file_names()})
    if taken:
        raise InputError(
            f"found {taken[0]} among the code of {model_type!r}, which a checkpoint has a file of: rename it"
        )
    return _make_module(
        f"{package}.modeling_kernel_{model_type}",
        model_type,
        heads,
        {n: f".{f}" for n, f in files.items()},
        sources,
    )


def _make_module(
    name: str,
    model_type: str,
    heads: dict[str, str],
    stock: dict[str, str],
    sources: dict[str, str],
) -> ModuleType:
    """The module called ``name``, made once; ``sources`` are other files that a checkpoint needs."""
    if name not in sys.modules:
        loader = _Text(write_modeling_source(model_type, heads, stock, CHECKPOINT_CODE))
        spec = spec_from_loader(name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        files = {
            f"{name.rpartition('.')[2]}.py": write_modeling_source(model_type, heads, stock),
            **sources,
        }
        vars(module)["CODE_FILES"] = files
        sys.modules[name] = module
        try:
            loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


class _Text(InspectLoader):
    """A module made from text, by the machinery that makes them from files."""

    def __init__(self, source: str):
        self.source = source

    def get_source(self, fullname: str) -> str:
        return self.source
