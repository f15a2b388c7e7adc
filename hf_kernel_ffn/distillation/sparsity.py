"""What a stage does for sparse readouts: thresholds that follow, a price on write mass, and prototypes that never fire put to
use again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..readout import KernelFFN
from .objectives import at_least_float32, mean_over_processes
from .recipe import Stage

SEEN = 256
"""Tokens per layer and step on which a threshold is fitted."""
RATE = 0.05
"""Share of the way to the threshold that fits a step's tokens; larger in the first steps, which count as a mean."""
REVIVALS_END = 0.8
"""Share of a stage after which no prototype is revived any more: it would not be trained to its end."""
REVIVED_APART = 0.05
"""How far a revived row is moved from the one it copies, as a share of its length."""


class Watch:
    """Looks into the FFNs of a stage (by path) while they run: their inputs and their coefficients. Use it as a context."""

    def __init__(self, ffns: dict[str, Any], stage: Stage, fired: dict[str, Tensor]):
        """``fired``: by path, how often each prototype (prototypes,) has fired since the last revival; counted on in place."""
        self.stage, self.ffns, self.fired = stage, ffns, fired
        self.coefficients: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.hooks: list = []

    def __enter__(self) -> Watch:
        for path, ffn in self.ffns.items():
            if ffn.config.settings.simplex == "threshold":
                self.hooks.append(ffn.register_forward_pre_hook(self._see_input(path)))
            if self.stage.write_mass or self._revives(path):
                self.hooks.append(ffn.output_prototypes.register_forward_hook(self._see_mixture(path)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _see_input(self, path: str):
        def hook(module: nn.Module, args: tuple) -> None:
            tokens = args[0].detach().flatten(0, -2)
            self.inputs[path] = tokens[:: max(1, len(tokens) // SEEN)]

        return hook

    def _see_mixture(self, path: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if self.stage.write_mass:
                self.coefficients[path], self.outputs[path] = args[0], output.detach()
            if self._revives(path):
                self.fired[path] += (args[0].detach() != 0).flatten(0, -2).sum(0)

        return hook

    def _revives(self, path: str) -> bool:
        ffn = self.ffns[path]
        return self.stage.revive_after is not None and isinstance(ffn, KernelFFN) and ffn.config.settings.sparse

    def price(self, path: str) -> Tensor | float:
        """``write_mass`` times Σ|c_i|‖v_i‖ over the length of the output around its mean, averaged over the tokens that the
        FFN at ``path`` has just seen: the reciprocal of its coherence, but for the mean write. 0 where nothing is asked."""
        if not self.stage.write_mass:
            return 0.0
        coefficients, output = self.coefficients.pop(path), at_least_float32(self.outputs.pop(path)).flatten(0, -2)
        length = at_least_float32(self.ffns[path].output_prototypes.weight).norm(dim=0)
        mass = (at_least_float32(coefficients.flatten(0, -2)).abs() @ length).mean()
        apart = (output - mean_over_processes(output.mean(0))).norm(dim=-1).mean()
        return self.stage.write_mass * mass / mean_over_processes(apart).clamp_min(1e-12)

    def after(self, step: int, steps: int, tokens_per_step: int, reduce: Callable[[Tensor], None]) -> None:
        """Move the thresholds toward where the step's tokens keep as many prototypes as they should, and revive dead prototypes
        if it is time; ``reduce`` averages a tensor over processes, in place."""
        for path, tokens in self.inputs.items():
            ffn = self.ffns[path]
            ffn.fit_threshold(tokens, max(RATE, 1 / (step + 1)))
            reduce(ffn.threshold_log_ratio)
        self.inputs.clear()
        every = max(1, (self.stage.revive_after or 0) // tokens_per_step)
        if (step + 1) % every == 0 and step + 1 <= REVIVALS_END * steps:
            for path in filter(self._revives, self.ffns):
                fired = self.fired[path].float()
                reduce(fired)
                revive(self.ffns[path], fired)
                self.fired[path].zero_()


@torch.no_grad()
def revive(ffn: KernelFFN, fired: Tensor) -> int:
    """Give each prototype of ``ffn`` that has not fired (``fired`` (prototypes,), counts) half of one that fires most: its row, moved
    a little, and half of its output prototype, which keeps the other half: a threshold lets both pass, so that the layer's function
    hardly changes; with top-k the copies take the places of others.

    Returns:
        how many were dead.
    """
    dead = (fired == 0).nonzero()[:, 0]
    dead = dead[: int((fired > 0).sum())]
    busy = fired.argsort(descending=True, stable=True)[: len(dead)]
    generator = torch.Generator().manual_seed(len(dead))  # the same on every process
    rows = [ffn.input_prototypes] + ([ffn.value_proj] if ffn.config.settings.values == "gated" else [])
    for linear in rows:
        row = linear.weight[busy]
        noise = torch.randn(row.shape, generator=generator).to(row) * row.norm(dim=-1, keepdim=True) / row.shape[1] ** 0.5
        linear.weight[dead] = row + REVIVED_APART * noise
        if linear.bias is not None:
            linear.bias[dead] = linear.bias[busy]
    written = ffn.output_prototypes.weight
    written[:, busy] = written[:, busy] / 2
    written[:, dead] = written[:, busy]
    ffn.units[dead] = ffn.units[busy]
    return len(dead)
