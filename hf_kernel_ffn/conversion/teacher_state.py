"""A teacher that is worked on and comes out as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

REGISTERED = ("_modules", "_buffers")
"""Where a module keeps its children and buffers: readouts take the place of children, and some
models grow their rotary frequencies with the text."""


@contextmanager
def keep_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back, on leaving, what the modules of ``model`` consist of.

    That is children, buffers and public attributes, training flags and replaced ``forward`` methods
    among them. Numbers that were changed in place stay changed.
    """
    before = [(module, _copy_attributes(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            _restore_attributes(module, attributes)


def _copy_attributes(module: nn.Module) -> dict[str, object]:
    """Public attributes of the instance by name, and shallow copies of what is registered."""
    attributes = {name: value for name, value in vars(module).items() if _is_public(name)}
    registered = {name: dict(vars(module)[name]) for name in REGISTERED}
    return {**attributes, **registered}


def _restore_attributes(module: nn.Module, attributes: dict[str, object]) -> None:
    """Give ``module`` what :func:`_copy_attributes` found in it, and nothing else of that kind."""
    present = vars(module)
    for name in [name for name in present if _is_public(name) and name not in attributes]:
        del present[name]
    for name, value in attributes.items():
        if name not in REGISTERED:
            present[name] = value
            continue
        assert isinstance(value, dict)
        present[name].clear()
        present[name].update(value)


def _is_public(name: str) -> bool:
    return not name.startswith("_")
