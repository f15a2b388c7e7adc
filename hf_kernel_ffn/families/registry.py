"""Which architectures there are: the table's, registered ones, those of other packages."""

from __future__ import annotations

from importlib.metadata import entry_points

from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from .table import FAMILIES, Architecture

ARCHITECTURES: dict[str, Architecture] = {family.model_type: family for family in FAMILIES}
"""Every architecture that is known, by its model_type."""
ENTRY_POINTS = "hf_kernel_ffn.architectures"
"""Group of entry points by which other packages bring architectures.

An entry point's name is the model_type, its object an Architecture.
"""


def register_architecture(architecture: Architecture) -> Architecture:
    """Add a family to the table.

    Raises:
        InputError: its model_type is taken.
    """
    if architecture.model_type in ARCHITECTURES:
        raise InputError(f"an architecture for {architecture.model_type!r} is already registered")
    ARCHITECTURES[architecture.model_type] = architecture
    return architecture


def get_architecture(model_type: object) -> Architecture:
    """Return the entry for ``model_type``: a registered one, or another package's.

    Raises:
        InputError: there is none, or the other package's is no Architecture of that model_type.
    """
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]

    for point in entry_points(group=ENTRY_POINTS, name=str(model_type)):
        architecture = point.load()
        if not isinstance(architecture, Architecture) or architecture.model_type != model_type:
            raise InputError(
                f"found {point.value} as the entry point for {model_type!r}, "
                "expected an Architecture of that model_type: mend the package that declares it"
            )
        return register_architecture(architecture)

    raise InputError(
        f"found model type {model_type!r}, expected one of {', '.join(ARCHITECTURES)}: "
        "describe yours by hf_kernel_ffn.register_architecture(Architecture(...))"
    )


def get_architecture_of_model(model: PreTrainedModel) -> Architecture:
    """Return the table's entry for a stock ``model``.

    Raises:
        InputError: the model is converted already, quantised or of no known family, or its config
            has a value with which its FFN is another than the entry's.
    """
    config = model.config
    model_type = config.model_type
    if getattr(config, "kernel_ffn", None) is not None:
        raise InputError(
            f"found a model that is converted already ({model_type}), "
            "expected a stock one: convert its teacher instead"
        )

    architecture = get_architecture(model_type)
    has_quantizer = getattr(model, "hf_quantizer", None) is not None
    if has_quantizer or getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"found a quantised model ({model_type}), "
            "expected floating-point weights: load the model unquantised"
        )
    for name, value in architecture.refuse:
        if getattr(config, name, None) == value:
            raise InputError(
                f"found {name}={value!r} in a {model_type}, "
                "expected another value: its FFN is not described then"
            )
    return architecture
