"""Kernel-readout FFNs for pretrained transformers: convert, distil, evaluate and read."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint_code.errors import InputError
    from .checkpoint_code.ffn import KernelFFN
    from .checkpoint_code.kernels import Kernel, register_kernel
    from .checkpoint_code.record import Readout
    from .checkpoint_code.settings import KernelFFNConfig
    from .checkpoint_code.simplex import register_simplex_map
    from .conversion.convert import ConversionReport, convert
    from .distillation import distill
    from .evaluation.report import evaluate_student
    from .families.registry import register_architecture
    from .families.student import restore
    from .families.table import Architecture
    from .reading.tracing import Trace, trace
    from .storage.loading import load_student, load_teacher, load_tokenizer

__version__ = "0.2.0.dev0"

__all__ = [
    "Architecture",
    "ConversionReport",
    "InputError",
    "Kernel",
    "KernelFFN",
    "KernelFFNConfig",
    "Readout",
    "Trace",
    "__version__",
    "convert",
    "distill",
    "evaluate_student",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "register_architecture",
    "register_kernel",
    "register_simplex_map",
    "restore",
    "trace",
]

# Imported on first use: `import hf_kernel_ffn` costs nothing.
_MODULES = {
    "Architecture": "families.table",
    "ConversionReport": "conversion.convert",
    "InputError": "checkpoint_code.errors",
    "Kernel": "checkpoint_code.kernels",
    "KernelFFN": "checkpoint_code.ffn",
    "KernelFFNConfig": "checkpoint_code.settings",
    "Readout": "checkpoint_code.record",
    "Trace": "reading.tracing",
    "convert": "conversion.convert",
    "distill": "distillation",
    "evaluate_student": "evaluation.report",
    "load_student": "storage.loading",
    "load_teacher": "storage.loading",
    "load_tokenizer": "storage.loading",
    "register_architecture": "families.registry",
    "register_kernel": "checkpoint_code.kernels",
    "register_simplex_map": "checkpoint_code.simplex",
    "restore": "families.student",
    "trace": "reading.tracing",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ImportError as error:  # as when transformers has moved something
        from .versions import describe_unsupported_version

        reason = describe_unsupported_version()
        if reason is None:
            raise
        raise ImportError(f"{reason} ({error})") from error
