"""How config.json records a converted FFN: the ``kernel_ffn`` entry and its layers.

This file travels inside converted checkpoints: it imports nothing but torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .checks import (
    DAMAGED,
    reject_unknown_fields,
    require_count,
    require_mapping,
    require_module_path,
    require_number,
    require_positive_number,
    require_size,
)
from .errors import InputError
from .kernels import get_kernel
from .settings import KernelFFNConfig

FORMAT = 1
"""Version of the ``kernel_ffn`` entry that this code writes and reads."""
ENTRY = ("format", "package_version", "family", "teacher_class", "activation", "layers")
"""Keys of the ``kernel_ffn`` entry."""
STOCK_GUARD = (
    "kernel_ffn checkpoint: load it by an Auto class with trust_remote_code=True, "
    "or with hf_kernel_ffn installed"
)
"""Stands in config.json where the teacher's activation name was.

Stock classes, which know no such activation, then refuse the checkpoint.
"""


@dataclass(frozen=True)
class LayerConfig:
    """One converted FFN as config.json records it: everything needed to rebuild the module."""

    settings: KernelFFNConfig
    """What was asked for, with all that was left open chosen."""
    hidden_size: int
    """Width of the residual stream."""
    prototypes: int
    """Input prototypes: rows of the dictionary, or the units that pieces are tied to."""
    reference: Mapping[str, float] = field(default_factory=dict)
    """What conversion found for this layer, exact.

    ``scale`` of the intensity, ``temperature``, ``threshold`` of κ, ``far`` where the products of
    knotted kernels stand, and the kernel's parameters.
    The weights hold learned log-ratios to these, zero at conversion, so that half precision loses
    nothing.
    """
    dropout: float = 0.0
    """The teacher FFN's dropout on its output."""
    hidden_dropout: float = 0.0
    """The teacher FFN's dropout on its hidden units, here on the coefficients."""
    number: int = 0
    """The block's number, counted over all stacks."""
    absorbed: tuple[str, ...] = ()
    """Paths under the base model of what the readout makes needless.

    There are some where the FFN was no module of its own: modules there become the identity,
    numbers zero.
    """
    experts: int = 0
    """If this is one expert of a mixture, how many there are."""
    gated: bool = False
    """Where rows are tied, whether the teacher's units have two rows."""

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json."""
        return {**asdict(self), "absorbed": list(self.absorbed)}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> LayerConfig:
        """The layer that ``entry`` of config.json describes.

        Raises:
            InputError: a key is unknown or missing, or a value of another type or out of range.
        """
        entry = dict(require_mapping("kernel_ffn layer", entry))
        reject_unknown_fields(cls, entry, "kernel_ffn layer")
        settings_entry = require_mapping("kernel_ffn settings", entry.pop("settings", None))
        reject_unknown_fields(KernelFFNConfig, settings_entry, "kernel_ffn settings")
        _check_resolved(settings_entry)
        for name in ("hidden_size", "prototypes"):
            require_size(name, entry.get(name))

        settings = KernelFFNConfig(**settings_entry)
        reference = require_mapping("kernel_ffn reference", entry.get("reference"))
        _check_reference(reference, settings)
        entry["absorbed"] = _check_absorbed(entry.get("absorbed", ()))
        for name in ("dropout", "hidden_dropout"):
            expected = f"a number from 0 to 1: {DAMAGED}"
            require_number(name, entry.get(name, 0.0), expected, least=0, most=1)
        for name in ("number", "experts"):
            require_count(name, entry.get(name, 0))
        if not isinstance(entry.get("gated", False), bool):
            raise InputError(
                f"found gated={entry['gated']!r} in the kernel_ffn entry, expected true or false: "
                f"{DAMAGED}"
            )
        return cls(settings=settings, **entry)


def name_reference_values(settings: KernelFFNConfig) -> list[str]:
    """The names of all reference values that a layer with resolved ``settings`` needs."""
    kernel = get_kernel(settings.kernel)
    names = [*kernel.parameters]
    if settings.intensity != "none":
        names.append("scale")
    if settings.values == "product" and kernel.uses_knot:
        names.append("far")
    if not settings.coefficients_are_kernel:
        names.append("temperature")
    if settings.simplex == "threshold":
        names.append("threshold")
    return names


def _check_resolved(settings_entry: Mapping[str, Any]) -> None:
    """InputError where settings leave open what a conversion has chosen."""
    for name in ("kernel", "values"):
        if not settings_entry.get(name):
            raise InputError(
                f"found {name}={settings_entry.get(name)!r} in the kernel_ffn settings, expected "
                f"a name: {DAMAGED}"
            )


def _check_reference(reference: dict[str, Any], settings: KernelFFNConfig) -> None:
    """InputError unless ``reference`` has a positive number for all that ``settings`` need."""
    for name in name_reference_values(settings):
        value = reference.get(name)
        if value is None:
            raise InputError(
                f"found no reference value {name!r} in the kernel_ffn entry, "
                f"expected one: {DAMAGED}"
            )
        require_positive_number(f"reference {name}", value, f"a positive number: {DAMAGED}")


def _check_absorbed(paths: object) -> tuple[str, ...]:
    """``paths`` as a tuple; InputError unless it is a list of paths under the base model."""
    if not isinstance(paths, (list, tuple)):
        raise InputError(
            f"found absorbed={paths!r} in the kernel_ffn entry, expected a list of paths: {DAMAGED}"
        )
    for path in paths:
        require_module_path("absorbed paths of the kernel_ffn entry", path)
    return tuple(paths)
