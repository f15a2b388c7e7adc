"""What a stage does for sparse readouts: thresholds that follow, and a price on write mass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checkpoint_code.parameters import to_at_least_float32
from ..checkpoint_code.tied import AnyKernelFFN
from .collectives import count_processes, mean_over_processes, sum_over_processes
from .recipe import Stage

SEEN = 256
"""Tokens per layer and step on which a threshold is fitted: enough for a quantile."""
RATE = 0.05
"""Share of the way to the threshold that fits a step's tokens, so that some twenty steps count;
larger in the first steps, which count as a mean."""
LEAST_LENGTH = 1e-12
"""A price is over the length of what is written, or over this if it is longer."""


class Watch:
    """Looks into the FFNs of a stage (by path) while they run: at inputs and coefficients.

    Use it as a context; outside of it no hook is left.
    """

    def __init__(self, ffns: Mapping[str, AnyKernelFFN], stage: Stage):
        self.stage = stage
        self.ffns = ffns
        self.looking = True
        self.coefficients: dict[str, Tensor] = {}
        """By path, (…, prototypes), until a price is made of them."""
        self.outputs: dict[str, Tensor] = {}
        """By path, (…, hidden_size), until a price is made of them."""
        self.inputs: dict[str, dict[int, Tensor]] = {}
        """By path and number of the batch in the step, a sample (tokens, hidden_size)."""
        self.batch = 0
        """Number of the batch in the step, set by :meth:`begin_batch`."""
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> Watch:
        for path, ffn in self.ffns.items():
            if ffn.config.settings.simplex == "threshold":
                self.hooks.append(ffn.register_forward_pre_hook(self._see_input(path)))
            if self.stage.write_mass:
                mixture = ffn.output_prototypes
                self.hooks.append(mixture.register_forward_hook(self._see_mixture(path)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def begin_batch(self, number: int) -> None:
        """What runs from now on reads the batch of that ``number`` in the step; 0 is a new step."""
        self.batch = number
        if number == 0:
            self.inputs.clear()

    @contextmanager
    def look_away(self) -> Iterator[None]:
        """Take no notice of what runs while the context is open: it is no part of training."""
        self.looking = False
        try:
            yield
        finally:
            self.looking = True

    def price(self, path: str) -> Tensor | float:
        """The price of the contributions that cancelled in the FFN at ``path``, which has just run.

        ``write_mass`` times Σ|c_i|‖v_i‖ over the length of the output around its mean, both
        averaged over the tokens of all processes: the reciprocal of its coherence, but for the mean
        output.
        0 where nothing is asked, or where an expert was given no tokens.
        """
        if not self.stage.write_mass:
            return 0.0
        weight = self.ffns[path].output_prototypes.weight
        coefficients = self.coefficients.pop(path, weight.new_zeros(0, weight.shape[1]))
        output = self.outputs.pop(path, weight.new_zeros(0, weight.shape[0]))
        coefficients = to_at_least_float32(coefficients.flatten(0, -2))
        output = to_at_least_float32(output.detach()).flatten(0, -2)

        total = sum_over_processes(output.new_tensor(float(len(output))))
        # Of the tokens that a process has on average; 1 but for the experts of a mixture.
        share = len(output) * count_processes() / total.clamp_min(1)
        center = mean_over_processes(share * _mean(output))
        spread = mean_over_processes(share * _mean((output - center).norm(dim=-1)))
        spread = torch.where(total < 2, center.norm(), spread)  # one token is its own mean
        if not len(output):
            return 0.0
        lengths = to_at_least_float32(weight).norm(dim=0)
        mass = (coefficients.abs() @ lengths).mean() * share
        return self.stage.write_mass * mass / spread.clamp_min(LEAST_LENGTH)

    def after(self, step: int, reduce: Callable[[Tensor], None]) -> None:
        """Move the thresholds toward where the tokens of ``step`` keep as many prototypes as they
        should; ``reduce`` averages a tensor over processes, in place."""
        for path, ffn in self.ffns.items():
            if ffn.config.settings.simplex != "threshold":
                continue
            samples = self.inputs.pop(path, {})
            if samples:
                tokens = torch.cat([samples[number] for number in sorted(samples)])
                ffn.fit_threshold(tokens, max(RATE, 1 / (step + 1)))
            reduce(ffn.threshold_log_ratio)

    def _see_input(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not self.looking:
                return
            tokens = args[0].detach().flatten(0, -2)
            wanted = SEEN // self.stage.gradient_accumulation_steps
            stride = max(1, len(tokens) // max(1, wanted))
            self.inputs.setdefault(path, {})[self.batch] = tokens[::stride]

        return hook

    def _see_mixture(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.looking:
                self.coefficients[path] = args[0]
                self.outputs[path] = output.detach()

        return hook


def _mean(values: Tensor) -> Tensor:
    """The mean of ``values`` over the first dimension; zeros if there are none."""
    return values.mean(0) if len(values) else values.new_zeros(values.shape[1:])
