"""What modules read and write during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from .lookup import StockFFN

Hook = Callable[[nn.Module, tuple, Tensor], Tensor | None]
"""A forward hook: the module, its arguments and its output, to another output or None."""


@contextmanager
def capture_inputs_and_outputs(
    modules: Mapping[str, nn.Module],
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collect input and output of each of ``modules`` at its last call, by its name."""
    captured: dict[str, tuple[Tensor, Tensor]] = {}

    def make_hook(name: str) -> Hook:
        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            # A copy, since some blocks add to what their FFN returned, in place.
            kept = output.clone() if isinstance(output, Tensor) else output
            captured[name] = (args[0], kept)

        return keep

    handles = [module.register_forward_hook(make_hook(name)) for name, module in modules.items()]
    with _removed_at_the_end(handles):
        yield captured


@contextmanager
def capture_all_inputs_and_outputs(
    modules: Mapping[str, nn.Module],
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collect what each of ``modules`` reads and writes, (tokens, size) each, by its name.

    Calls follow one another in one tensor: a module that several layers share (ALBERT's FFN) has
    the tokens of all of them. A module that is not called has no entry.
    """
    captured: dict[str, tuple[Tensor, Tensor]] = {}

    def make_hook(name: str) -> Hook:
        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            _append_call(captured, name, args[0].flatten(0, -2), output.flatten(0, -2))

        return keep

    handles = [module.register_forward_hook(make_hook(name)) for name, module in modules.items()]
    with _removed_at_the_end(handles):
        yield captured


def watch_ffn_input(base: nn.Module, path: str, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``see`` with the input (tokens, hidden_size) of one FFN whenever it runs.

    Args:
        path: of the FFN under ``base``. It may be a stock mixture's expert: then the input is the
            tokens that are routed to that one.

    Returns:
        the handle that removes the hook.
    """
    parent_path, _, name = path.rpartition(".")
    parent = base.get_submodule(parent_path)

    if name in dict(parent.named_children()):
        ffn = base.get_submodule(path)
        return ffn.register_forward_pre_hook(lambda module, args: see(args[0].flatten(0, -2)))

    expert = int(name)  # the experts are stacked in the parent's tensors
    return parent.register_forward_pre_hook(
        lambda module, args: see(_select_routed_tokens(args, expert))
    )


@contextmanager
def watch_ffns(
    base: nn.Module,
    ffns: Mapping[str, StockFFN],
    see: Callable[[str, Tensor, Tensor], None],
    *,
    idle_experts: bool = False,
) -> Iterator[None]:
    """Call ``see`` with path, input and output of every FFN whenever it runs in the stock model.

    Args:
        ffns: FFNs of ``base``, by path.
        see: called with tensors (tokens, hidden_size).
        idle_experts: whether it is called for an expert that its mixture gives no token, with no
            tokens.
    """
    inputs: dict[str, Tensor] = {}

    def make_input_hook(path: str) -> Callable[[nn.Module, tuple], None]:
        def keep(module: nn.Module, args: tuple) -> None:
            inputs[path] = args[0].flatten(0, -2)

        return keep

    def make_output_hook(path: str) -> Hook:
        def pass_on(module: nn.Module, args: tuple, output: Tensor) -> None:
            see(path, inputs.pop(path), output.flatten(0, -2))

        return pass_on

    def make_expert_hook(path: str, ffn: StockFFN) -> Hook:
        def run_again(module: nn.Module, args: tuple, output: Tensor) -> None:
            x = _select_routed_tokens(args, int(ffn.expert or 0))
            if len(x):
                see(path, x, ffn(x))
            elif idle_experts:
                see(path, x, torch.zeros_like(x))

        return run_again

    handles: list[RemovableHandle] = []
    with _removed_at_the_end(handles):
        for path, ffn in ffns.items():
            if ffn.expert is not None:
                handles.append(ffn.host.register_forward_hook(make_expert_hook(path, ffn)))
                continue
            first = base.get_submodule(path)
            last = base.get_submodule(ffn.output_path)
            handles.append(first.register_forward_pre_hook(make_input_hook(path)))
            handles.append(last.register_forward_hook(make_output_hook(path)))
        yield


@contextmanager
def capture_ffn_inputs_and_outputs(
    base: nn.Module, ffns: Mapping[str, StockFFN]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collect input and output (tokens, hidden_size) of every FFN of the stock model, by path.

    What several calls of one FFN read and wrote stands one after the other. A path is missing if
    its FFN was given nothing.
    """
    captured: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str, x: Tensor, y: Tensor) -> None:
        _append_call(captured, path, x, y)

    with watch_ffns(base, ffns, keep):
        yield captured


@contextmanager
def replace_ffn_outputs(
    base: nn.Module, ffns: Mapping[str, StockFFN], outputs: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let every FFN of the stock model put out one constant (hidden_size,) for every token."""

    def make_constant_hook(path: str) -> Hook:
        def put_out(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            # Memory of its own, since some blocks add to what their FFN returned, in place.
            return outputs[path].to(output.dtype).expand_as(output).clone()

        return put_out

    def make_expert_hook(path: str, ffn: StockFFN) -> Hook:
        def exchange_share(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            hidden_states, experts, weights = args
            share = (weights * (experts == ffn.expert)).sum(-1, keepdim=True)
            change = share * (outputs[path].to(output.dtype) - ffn(hidden_states))
            return output + change.to(output.dtype)  # shares may be of another dtype

        return exchange_share

    handles: list[RemovableHandle] = []
    with _removed_at_the_end(handles):
        for path, ffn in ffns.items():
            if ffn.expert is not None:
                handles.append(ffn.host.register_forward_hook(make_expert_hook(path, ffn)))
            else:
                last = base.get_submodule(ffn.output_path)
                handles.append(last.register_forward_hook(make_constant_hook(path)))
        yield


def _append_call(
    captured: dict[str, tuple[Tensor, Tensor]], name: str, x: Tensor, y: Tensor
) -> None:
    """Add what a call read and wrote, (tokens, size) each, to what earlier calls did."""
    if name not in captured:
        # A copy, since some blocks add to what their FFN returned, in place.
        captured[name] = (x, y.clone())
        return
    earlier_x, earlier_y = captured[name]
    captured[name] = (torch.cat([earlier_x, x]), torch.cat([earlier_y, y]))


def _select_routed_tokens(args: tuple, expert: int) -> Tensor:
    """Return, of the arguments of a mixture's experts, the tokens that go to ``expert``."""
    hidden_states, experts = args[:2]
    return hidden_states[(experts == expert).any(-1)]


@contextmanager
def _removed_at_the_end(handles: list[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks of ``handles``, those added meanwhile too, when the context ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
