"""What modules read and write during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .lookup import StockFFN


@contextmanager
def capture_inputs_and_outputs(
    modules: dict[str, nn.Module],
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of each module at its next call, by its name."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(
        path: str,
    ) -> Callable:  # a copy, since some blocks add to what their FFN returned, in place
        return lambda module, args, output: seen.update(
            {path: (args[0], output.clone() if isinstance(output, Tensor) else output)}
        )

    with _hooked(modules, keep):
        yield seen


@contextmanager
def capture_all_inputs_and_outputs(
    modules: Mapping[str, nn.Module],
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collect what each module reads and writes, (tokens, size) each, by its name.

    Calls follow one another in one tensor: a module that several layers share (ALBERT's FFN) has
    the tokens of all of them. A module that is not called has no entry.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def collect(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            inputs = args[0].flatten(0, -2)
            # A copy, since some blocks add to what their FFN returned, in place.
            outputs = output.flatten(0, -2).clone()
            if path in seen:
                inputs = torch.cat([seen[path][0], inputs])
                outputs = torch.cat([seen[path][1], outputs])
            seen[path] = (inputs, outputs)

        return hook

    with _hooked(dict(modules), collect):
        yield seen


def watch_ffn_input(base: nn.Module, path: str, see: Callable[[Tensor], None]) -> Any:
    """Call ``see`` with the input (tokens, hidden_size) of the FFN at ``path`` under ``base`` whenever it runs; returns the hook.
    The FFN may be a stock mixture's expert: then it is the tokens routed to that one."""
    parent, _, name = path.rpartition(".")
    if name not in dict(base.get_submodule(parent).named_children()):  # experts stacked in tensors
        number = int(name)
        return base.get_submodule(parent).register_forward_pre_hook(
            lambda module, args: see(_select_routed_tokens(args, number))
        )
    return base.get_submodule(path).register_forward_pre_hook(
        lambda module, args: see(args[0].flatten(0, -2))
    )


@contextmanager
def watch_ffns(
    base: nn.Module, ffns: Mapping[str, StockFFN], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call ``see`` with path, input and output (tokens, hidden_size) of every FFN of ``ffns`` whenever it runs in the stock model
    ``base``, while the context is open."""
    hooks, waiting = [], {}

    def keep(path: str) -> Callable:
        return lambda module, args: waiting.update({path: args[0].flatten(0, -2)})

    def whole(path: str) -> Callable:
        return lambda module, args, output: see(path, waiting.pop(path), output.flatten(0, -2))

    def expert(path: str, ffn: StockFFN) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            x = _select_routed_tokens(args, int(ffn.expert or 0))
            if len(x):
                see(path, x, ffn(x))

        return hook

    try:
        for path, ffn in ffns.items():
            if ffn.expert is not None:
                hooks.append(ffn.host.register_forward_hook(expert(path, ffn)))
            else:
                hooks.append(base.get_submodule(path).register_forward_pre_hook(keep(path)))
                hooks.append(base.get_submodule(ffn.output_path).register_forward_hook(whole(path)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _select_routed_tokens(args: tuple, expert: int) -> Tensor:
    """Of the arguments of a mixture's experts, the tokens that go to one of them."""
    hidden_states, chosen = args[:2]
    return hidden_states[(chosen == expert).any(-1)]


@contextmanager
def capture_ffn_inputs_and_outputs(
    base: nn.Module, ffns: Mapping[str, StockFFN]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output (tokens, hidden_size) of every FFN of ``ffns`` while the context is open, by path; a path is missing if its FFN
    was given nothing."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(path: str, x: Tensor, y: Tensor) -> None:
        before = seen.get(
            path
        )  # a copy, since some blocks add to what their FFN returned, in place
        seen[path] = (
            (x, y.clone())
            if before is None
            else (torch.cat([before[0], x]), torch.cat([before[1], y]))
        )

    with watch_ffns(base, ffns, see):
        yield seen


@contextmanager
def replace_ffn_outputs(
    base: nn.Module, ffns: Mapping[str, StockFFN], outputs: dict[str, Tensor]
) -> Iterator[None]:
    """The output of every FFN of ``ffns`` in the stock model ``base`` replaced by one constant (hidden_size,) for every token."""
    hooks = []

    def constant(path: str) -> Callable:
        return lambda module, args, output: outputs[path].to(output.dtype).expand_as(output)

    def mixed(path: str, ffn: StockFFN) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            hidden_states, chosen, weights = args
            share = (weights * (chosen == ffn.expert)).sum(-1, keepdim=True)
            return output + share * (outputs[path].to(output.dtype) - ffn(hidden_states))

        return hook

    try:
        for path, ffn in ffns.items():
            if ffn.expert is not None:
                hooks.append(ffn.host.register_forward_hook(mixed(path, ffn)))
            else:
                hooks.append(
                    base.get_submodule(ffn.output_path).register_forward_hook(constant(path))
                )
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _hooked(modules: dict[str, nn.Module], make: Callable[[str], Callable]) -> Iterator[None]:
    hooks = [module.register_forward_hook(make(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
