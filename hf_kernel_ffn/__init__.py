"""Kernel-readout FFNs for pretrained transformers: convert, distil, evaluate and read."""

from importlib import import_module

__version__ = "0.1.0"

# Imported on first use: `import hf_kernel_ffn` costs nothing.
_WHERE = {
    "Architecture": "families.table",
    "InputError": "checkpoint_code.errors",
    "Kernel": "checkpoint_code.kernels",
    "KernelFFN": "checkpoint_code.ffn",
    "KernelFFNConfig": "checkpoint_code.settings",
    "Readout": "checkpoint_code.record",
    "convert": "conversion.convert",
    "distill": "distillation",
    "evaluate_student": "evaluation.report",
    "register_architecture": "families.registry",
    "register_kernel": "checkpoint_code.kernels",
    "register_simplex_map": "checkpoint_code.simplex",
    "restore": "families.student",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    except ImportError as error:  # as when transformers has moved something
        from .versions import unsupported

        reason = unsupported()
        if reason is None:
            raise
        raise ImportError(f"{reason} ({error})") from error
