"""What modules read and write during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of each module at its next call, by its name."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with _hooked(modules, lambda path: lambda module, args, output: seen.update({path: (args[0], output)})):
        yield seen


def replaced(modules: dict[str, nn.Module], outputs: dict[str, Tensor]) -> AbstractContextManager[None]:
    """Each module's output replaced by one constant (hidden_size,) for every token."""
    return _hooked(modules, lambda path: lambda module, args, output: outputs[path].to(output.dtype).expand_as(output))


@contextmanager
def _hooked(modules: dict[str, nn.Module], make: Callable[[str], Callable]) -> Iterator[None]:
    hooks = [module.register_forward_hook(make(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
