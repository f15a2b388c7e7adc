"""What a family's config class adds to the stock one: the ``kernel_ffn`` entry of config.json.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

import copy
import re
from pathlib import Path
from typing import Any

from .carried_code import code_files, get_custom_kernel_file
from .errors import InputError
from .settings import ENTRY, FORMAT, STOCK_GUARD, LayerConfig, reject_unknown_keys, require_mapping


class KernelConfigMixin:
    """What a family's config class adds to the stock one: it reads, guards and writes the ``kernel_ffn`` entry.

    A subclass gives ``auto_classes``, the classes of its own file by Auto class name.
    """

    auto_classes: dict = {}
    _auto_class = None  # of a stock class that came with code of its own: save_pretrained() below saves the code
    kernel_ffn: Any

    def __post_init__(self, **kwargs):
        entry = (
            require_mapping("kernel_ffn entry of config.json", self.kernel_ffn)
            if self.kernel_ffn is not None
            else None
        )
        if entry is not None:
            if entry.get("format") != FORMAT:
                raise InputError(
                    f"found kernel_ffn format {entry.get('format')!r}, expected {FORMAT}: install the hf_kernel_ffn that wrote it, "
                    f"version {entry.get('package_version')!r}"
                )
            reject_unknown_keys(ENTRY, entry, "kernel_ffn entry")
            for name, value in require_mapping(
                "kernel_ffn activation", entry.get("activation")
            ).items():
                if "." not in name and getattr(self, name, kwargs.get(name)) == STOCK_GUARD:
                    setattr(self, name, value)
                    kwargs.pop(name, None)
            self.kernel_ffn_layers()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As the stock method. The guard is taken out first: where it stands for a number, no config would accept it."""
        config_dict = copy.deepcopy(config_dict)
        entry = config_dict.get("kernel_ffn")
        for name, value in (
            entry.get("activation") or {} if isinstance(entry, dict) else {}
        ).items():
            _put(config_dict, name, value, only=STOCK_GUARD)
        return super().from_dict(config_dict, **kwargs)

    def kernel_ffn_layers(self) -> dict:
        """LayerConfig of every converted FFN by its path under the base model, in layer order."""
        layers = require_mapping("kernel_ffn layers", (self.kernel_ffn or {}).get("layers"))
        for path in layers:
            if not re.fullmatch(
                r"(?!.*__)\w+(\.\w+)*", path
            ):  # it is looked up as attributes of the model
                raise InputError(
                    f"found {path!r} in the kernel_ffn layers, expected the path of an FFN: config.json is damaged"
                )
        found = {path: LayerConfig.from_dict(layer) for path, layer in layers.items()}

        # By number, not as it stands: config.json is written with its keys in alphabetical order, 10 before 2.
        def place(path):
            return found[path].number, [
                (part.isdigit(), int(part) if part.isdigit() else part) for part in path.split(".")
            ]

        return {path: found[path] for path in sorted(found, key=place)}

    def to_dict(self):
        output = super().to_dict()
        if self.kernel_ffn is not None:
            for name in self.kernel_ffn["activation"]:
                _put(output, name, STOCK_GUARD)
        return output

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As the stock method; also writes the code that loads the checkpoint, and an auto_map for every head."""
        custom = get_custom_kernel_file(self)  # before anything is written: it may refuse
        files = code_files(type(self))
        stem = type(self).__module__.rpartition(".")[2]
        self.auto_map = {auto: f"{stem}.{name}" for auto, name in self.auto_classes.items()}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for file, source in files.items():
            Path(save_directory, file).write_text(source, encoding="utf-8")
        if custom is not None:
            Path(save_directory, "custom_kernel.py").write_text(custom, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _put(mapping, path, value, only=None):
    """Set ``value`` at a dotted ``path`` of nested dicts, as far as it exists; only over the value ``only``, if that is given."""
    *parents, name = path.split(".")
    for parent in parents:
        mapping = mapping.get(parent) if isinstance(mapping, dict) else None
    if isinstance(mapping, dict) and (only is None or mapping.get(name) == only):
        mapping[name] = value
