"""Triton where it is installed, and whether it runs kernels on the CPU."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # readouts then compute the same without it
    triton = tl = None  # type: ignore[assignment]


def jit(function: Any) -> Any:
    """Decorate a kernel as ``triton.jit`` does; without Triton leave it as it is."""
    return triton.jit(function) if triton else function


@jit
def _do_nothing():
    """A kernel that shows what becomes of kernels here."""


INTERPRETED = triton is not None and not isinstance(_do_nothing, triton.JITFunction)
"""Triton was told (TRITON_INTERPRET=1) to run kernels on the CPU: for tests."""
