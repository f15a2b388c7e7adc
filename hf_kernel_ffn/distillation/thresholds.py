"""What a stage does for sparse readouts: thresholds that follow, and a price on write mass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .objectives import mean_over_processes, to_at_least_float32
from .recipe import Stage

SEEN = 256
"""Tokens per layer and step on which a threshold is fitted."""
RATE = 0.05
"""Share of the way to the threshold that fits a step's tokens; larger in the first steps, which count as a mean."""


class Watch:
    """Looks into the FFNs of a stage (by path) while they run: their inputs and their coefficients. Use it as a context."""

    def __init__(self, ffns: dict[str, Any], stage: Stage):
        self.stage, self.ffns = stage, ffns
        self.coefficients: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.hooks: list = []

    def __enter__(self) -> Watch:
        for path, ffn in self.ffns.items():
            if ffn.config.settings.simplex == "threshold":
                self.hooks.append(ffn.register_forward_pre_hook(self._see_input(path)))
            if self.stage.write_mass:
                self.hooks.append(
                    ffn.output_prototypes.register_forward_hook(self._see_mixture(path))
                )
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
            self.coefficients[path], self.outputs[path] = args[0], output.detach()

        return hook

    def price(self, path: str) -> Tensor | float:
        """``write_mass`` times Σ|c_i|‖v_i‖ over the length of the output around its mean, averaged over the tokens that the
        FFN at ``path`` has just seen: the reciprocal of its coherence, but for the mean write. 0 where nothing is asked."""
        if not self.stage.write_mass:
            return 0.0
        coefficients, output = (
            self.coefficients.pop(path),
            to_at_least_float32(self.outputs.pop(path)).flatten(0, -2),
        )
        length = to_at_least_float32(self.ffns[path].output_prototypes.weight).norm(dim=0)
        mass = (to_at_least_float32(coefficients.flatten(0, -2)).abs() @ length).mean()
        apart = (output - mean_over_processes(output.mean(0))).norm(dim=-1).mean()
        return self.stage.write_mass * mass / mean_over_processes(apart).clamp_min(1e-12)

    def after(self, step: int, reduce: Callable[[Tensor], None]) -> None:
        """Move the thresholds toward where the step's tokens keep as many prototypes as they should; ``reduce`` averages a tensor over
        processes, in place."""
        for path, tokens in self.inputs.items():
            ffn = self.ffns[path]
            ffn.fit_threshold(tokens, max(RATE, 1 / (step + 1)))
            reduce(ffn.threshold_log_ratio)
        self.inputs.clear()
