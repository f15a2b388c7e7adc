"""Which architectures there are: those of the table, registered ones, those of other packages."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from .table import FAMILIES, Architecture

ARCHITECTURES: dict[str, Architecture] = {family.model_type: family for family in FAMILIES}
ENTRY_POINTS = "hf_kernel_ffn.architectures"
"""Group of entry points by which other packages bring architectures: the name is the model_type, the object an Architecture."""


def register_architecture(architecture: Architecture) -> Architecture:
    """Add a family to the table; InputError if its model_type is taken."""
    if architecture.model_type in ARCHITECTURES:
        raise InputError(f"an architecture for {architecture.model_type!r} is already registered")
    ARCHITECTURES[architecture.model_type] = architecture
    return architecture


def get_architecture(model_type: Any) -> Architecture:
    """The entry for ``model_type``: registered, or from another package's entry point; InputError if there is none."""
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        for point in entry_points(group=ENTRY_POINTS, name=str(model_type)):
            found = point.load()
            if not isinstance(found, Architecture) or found.model_type != model_type:
                raise InputError(
                    f"found {point.value} as the entry point for {model_type!r}, expected an Architecture of that model_type: "
                    "mend the package that declares it"
                )
            return register_architecture(found)
        raise InputError(
            f"found model type {model_type!r}, expected one of {', '.join(ARCHITECTURES)}: "
            "describe yours by hf_kernel_ffn.register_architecture(Architecture(...))"
        )
    return ARCHITECTURES[model_type]


def get_architecture_of_model(model: PreTrainedModel) -> Architecture:
    """The table's entry for ``model``; InputError if it is converted already, quantised or of no known family."""
    model_type = model.config.model_type
    if getattr(model.config, "kernel_ffn", None) is not None:
        raise InputError(
            f"found a model that is converted already ({model_type}), expected a stock one: convert its teacher instead"
        )
    architecture = get_architecture(model_type)
    if (
        getattr(model, "hf_quantizer", None) is not None
        or getattr(model.config, "quantization_config", None) is not None
    ):
        raise InputError(
            f"found a quantised model ({model_type}), expected floating-point weights: load the model unquantised"
        )
    for name, value in architecture.refuse:
        if getattr(model.config, name, None) == value:
            raise InputError(
                f"found {name}={value!r} in a {model_type}, expected another value: its FFN is not described then"
            )
    return architecture
