"""Closed-form calibration: output prototypes, output bias and temperature of a readout from a sample of tokens.

The output prototypes are re-solved by ridge regression toward where they start (the scaled columns of W_out), with
the strength of the pull chosen on tokens that the solution has not seen. Tokens are seen batch by batch, and only sums over
them are kept; under torch.distributed each process reads a share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint_code.ffn import KernelFFN
from .sampling import is_distributed

PULLS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the pull toward the initial dictionary, in units of a prototype's mean squared coefficient."""
TEMPERATURES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Candidates for τ, in standard deviations of the log kernel over prototypes."""
CHUNK = 2048
"""Tokens whose coefficients are held at once."""


class Moments:
    """Sums that a ridge regression of outputs on coefficients needs, accumulated chunk by chunk, and over processes."""

    def __init__(self, prototypes: int, size: int, device: torch.device):
        self.count = 0.0
        self.cc = torch.zeros(
            prototypes + 1, prototypes + 1, device=device
        )  # the last coefficient is a constant 1
        self.cy = torch.zeros(prototypes + 1, size, device=device)
        self.yy = 0.0

    def add(self, coefficients: Tensor, outputs: Tensor) -> None:
        """``coefficients`` (tokens, prototypes), ``outputs`` (tokens, size)."""
        extended = torch.cat([coefficients, coefficients.new_ones(len(coefficients), 1)], 1)
        self.count += len(outputs)
        self.cc.addmm_(extended.T, extended)
        self.cy.addmm_(extended.T, outputs)
        self.yy += outputs.double().square().sum().item()

    def all_reduce(self) -> None:
        """Make every sum that over all processes of torch.distributed, if it is initialised."""
        if is_distributed():
            scalars = torch.tensor(
                [self.count, self.yy], dtype=torch.float64, device=self.cc.device
            )
            for sums in (scalars, self.cc, self.cy):
                dist.all_reduce(sums)
            self.count, self.yy = scalars.tolist()

    def error(self, dictionary: Tensor) -> float:
        """Mean squared error of ``dictionary`` (prototypes + 1, size; the last row is the output bias)."""
        cross = (dictionary * self.cy).sum(dtype=torch.float64).item()
        square = (dictionary * (self.cc @ dictionary)).sum(dtype=torch.float64).item()
        return (self.yy - 2 * cross + square) / max(self.count, 1)

    def solve(self, start: Tensor, pull: float) -> Tensor:
        """Minimiser of the squared error plus ``pull`` times the squared change from ``start`` (prototypes + 1, size),
        the change of a prototype measured in what it writes."""
        size = self.cc.diagonal().sqrt().clamp_min(1e-12)
        gram = self.cc / size[:, None] / size
        penalty = torch.full_like(size, pull)
        penalty[-1] = 1e-6  # the output bias is free
        gram.diagonal().add_(penalty)
        residual = (self.cy - self.cc @ start) / size[:, None]
        return (
            start
            + torch.linalg.solve(gram.double(), residual.double()).to(start.dtype) / size[:, None]
        )


@torch.no_grad()
def calibrate_ffn(
    ffn: KernelFFN,
    teacher: Callable[[Tensor], Tensor],
    sample: Tensor,
    fitted: Iterable[Tensor],
    held: Iterable[Tensor],
    temperature: float | None,
) -> dict[str, float]:
    """Fit the output prototypes and output bias of ``ffn`` (float32) to ``teacher``, in place.

    Args:
        sample: (tokens, hidden_size) inputs, the same on every process, whose spread gives the candidates for the temperature.
        fitted: batches (tokens, hidden_size) of inputs on which the solution is found, this process's share.
        held: batches that choose the pull, and the temperature where ``temperature`` is None and the readout has one.

    Returns:
        ``fvu_start`` and ``fvu``: fraction of variance unexplained on the tokens held out, before and after;
        ``pull``; ``dictionary_growth``: norm of the dictionary over that of the initial one at its best scale.
    """
    weight, bias = ffn.output_prototypes.weight, ffn.output_prototypes.bias
    start = torch.cat([weight.T, bias[None]])
    choices: list[float | None] = [None]
    if "temperature" in ffn.log_ratio and temperature is None:
        spread = _log_kernel_spread(ffn, sample)
        choices = [share * spread for share in TEMPERATURES]
    best: tuple | None = None
    for tau, train, test in zip(
        choices, _moments(ffn, teacher, fitted, choices), _moments(ffn, teacher, held, choices)
    ):
        mean = test.cy[-1] / test.count
        variance = test.yy / test.count - mean.square().sum().item()
        origin = _scaled(train, start)
        for pull in PULLS:
            solution = train.solve(origin, pull)
            error = test.error(solution) / variance
            if best is None or error < best[0]:
                best = (error, tau, pull, solution, test.error(origin) / variance, origin)
    assert best is not None
    error, tau, pull, solution, error_start, origin = best
    if tau is not None:
        ffn.set_reference("temperature", tau)
    weight.copy_(solution[:-1].T)
    bias.copy_(solution[-1])
    return {
        "fvu_start": error_start, "fvu": error, "pull": pull,
        "dictionary_growth": (weight.norm() / origin[:-1].norm()).item(),
    }  # fmt: skip


def _moments(ffn, teacher, batches, temperatures) -> list[Moments]:
    """Those of every temperature, gathered side by side: inputs are seen once."""
    found = [
        Moments(ffn.config.prototypes, ffn.config.hidden_size, ffn.units.device)
        for _ in temperatures
    ]
    for batch in batches:
        for chunk in batch.split(CHUNK):
            outputs = teacher(chunk).float()
            for moments, temperature in zip(found, temperatures):
                if temperature is not None:
                    ffn.set_reference("temperature", temperature)
                moments.add(ffn.coefficients(chunk.float()), outputs)
    for moments in found:
        moments.all_reduce()
    return found


def _scaled(moments: Moments, start: Tensor) -> Tensor:
    """``start`` times the one scalar, and with the one bias, that fit best."""
    mean_c, mean_y = moments.cc[-1, :-1] / moments.count, moments.cy[-1] / moments.count
    written = start[:-1]
    square = (written * (moments.cc[:-1, :-1] @ written)).sum() / moments.count - (
        mean_c @ written
    ).square().sum()
    cross = (written * moments.cy[:-1]).sum() / moments.count - (mean_c @ written) @ mean_y
    scalar = cross / square.clamp_min(1e-30)
    return torch.cat([written * scalar, (mean_y - mean_c @ written * scalar)[None]])


def _log_kernel_spread(ffn, inputs) -> float:
    log_kernel = ffn.kernel.log(*ffn.scores(inputs.float()), **ffn.kernel_parameters())
    fires = torch.isfinite(log_kernel)
    return max(log_kernel[fires].std().item(), 1e-3) if fires.sum() > 1 else 1.0
