"""What a family's config class adds to the stock one: the ``kernel_ffn`` entry of config.json.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .carried_code import code_files, get_custom_kernel_file
from .checks import reject_unknown_keys, require_mapping, require_module_path
from .errors import InputError
from .layer_config import ENTRY, FORMAT, STOCK_GUARD, LayerConfig

if TYPE_CHECKING:  # it is put before a stock config class
    from transformers import PreTrainedConfig as _StockConfig
else:
    _StockConfig = object


class KernelConfigMixin(_StockConfig):
    """Put before a stock config class: reads, guards and writes the ``kernel_ffn`` entry."""

    auto_classes: ClassVar[dict[str, str]] = {}
    """The classes of the subclass's own file by Auto class name."""
    _auto_class = None  # a stock class that came with code of its own may set it: not needed here
    kernel_ffn: Any

    def __post_init__(self, **kwargs: Any) -> None:
        if self.kernel_ffn is not None:
            self._restore_activation(kwargs)
            self.kernel_ffn_layers()
        super().__post_init__(**kwargs)

    def _restore_activation(self, kwargs: dict[str, Any]) -> None:
        """Put the teacher's activation back where the guard stands; InputError for a bad entry."""
        entry = require_mapping("kernel_ffn entry of config.json", self.kernel_ffn)
        if entry.get("format") != FORMAT:
            raise InputError(
                f"found kernel_ffn format {entry.get('format')!r}, expected {FORMAT}: install "
                f"the hf_kernel_ffn that wrote it, version {entry.get('package_version')!r}"
            )
        reject_unknown_keys(ENTRY, entry, "kernel_ffn entry")

        activation = require_mapping("kernel_ffn activation", entry.get("activation"))
        for name, value in activation.items():
            is_own = "." not in name  # from_dict() has seen to those of nested configs
            if is_own and getattr(self, name, kwargs.get(name)) == STOCK_GUARD:
                setattr(self, name, value)
                kwargs.pop(name, None)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the stock method.

        The guard is taken out first: where it stands for a number, no config would accept it.
        """
        config_dict = copy.deepcopy(config_dict)
        entry = config_dict.get("kernel_ffn")
        activation = entry.get("activation") if isinstance(entry, dict) else None
        if isinstance(activation, dict):
            for name, value in activation.items():
                _put(config_dict, name, value, only=STOCK_GUARD)
        return super().from_dict(config_dict, **kwargs)

    def kernel_ffn_layers(self) -> dict[str, LayerConfig]:
        """LayerConfig of every converted FFN by its path under the base model, in layer order."""
        entries = require_mapping("kernel_ffn layers", (self.kernel_ffn or {}).get("layers"))
        for path in entries:
            require_module_path("kernel_ffn layers", path)
        layers = {path: LayerConfig.from_dict(entry) for path, entry in entries.items()}
        # By number, not as it stands: config.json is written with its keys in alphabetical order,
        # 10 before 2.
        return dict(sorted(layers.items(), key=lambda item: _sort_key(*item)))

    def to_dict(self) -> dict[str, Any]:
        """As the stock method, with the guard where the activation's name was."""
        output = super().to_dict()
        if self.kernel_ffn is not None:
            for name in self.kernel_ffn["activation"]:
                _put(output, name, STOCK_GUARD)
        return output

    def save_pretrained(
        self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As the stock method; also writes the code that loads the checkpoint, and an auto_map.

        Raises:
            InputError: a kernel of the user's own cannot travel; then nothing is written.
        """
        custom_kernel = get_custom_kernel_file(self)
        sources = code_files(type(self))
        if custom_kernel is not None:
            sources["custom_kernel.py"] = custom_kernel
        stem = type(self).__module__.rpartition(".")[2]
        self.auto_map = {auto: f"{stem}.{name}" for auto, name in self.auto_classes.items()}

        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name, source in sources.items():
            Path(save_directory, name).write_text(source, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _sort_key(path: str, layer: LayerConfig) -> tuple:
    """By the block's number, then by the path, in which numbers count as numbers."""
    names = [
        (name.isdigit(), int(name) if name.isdigit() else name)  # no number beside a word
        for name in path.split(".")
    ]
    return layer.number, names


def _put(mapping: Any, path: str, value: object, only: object = None) -> None:
    """Set ``value`` at a dotted ``path`` of nested dicts, if all that leads there exists.

    ``only``: replace no other value than this; None to replace any.
    """
    *parents, name = path.split(".")
    for parent in parents:
        mapping = mapping.get(parent) if isinstance(mapping, dict) else None
    if isinstance(mapping, dict) and (only is None or mapping.get(name) == only):
        mapping[name] = value
