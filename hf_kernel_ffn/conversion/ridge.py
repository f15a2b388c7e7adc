"""Closed-form calibration of a readout: output prototypes, output bias and temperature.

The output prototypes are solved for anew by ridge regression toward where they start, the scaled
columns of W_out. The strength of the pull is chosen on tokens that the solution has not seen.
A spike token counts as one whose output is as long as an ordinary one may be.
Tokens are seen batch by batch, and only sums over them are kept; under torch.distributed each
process reads a share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.tied import AnyKernelFFN, TiedKernelFFN
from .calibration_set import is_distributed
from .figures import shrink_spikes

PULLS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the pull toward the initial dictionary, in units of a prototype's mean squared
coefficient."""
TEMPERATURES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Candidates for τ, in standard deviations of the log kernel over prototypes."""
CHUNK = 2048
"""Tokens whose coefficients are held at once."""
BIAS_PULL = 1e-6
"""The pull on the output bias, which is all but free."""
SMALLEST_SIZE = 1e-12
"""Root mean square coefficients below this are taken as this where they divide."""
SMALLEST_VARIANCE = 1e-30
"""The same of the variance of what the initial dictionary writes."""
SMALLEST_SPREAD = 1e-3
"""The log kernel's spread is taken to be at least this: it may be all but constant."""


class Moments:
    """Sums that a ridge regression of outputs on coefficients needs.

    They are accumulated chunk by chunk, and over processes.
    """

    def __init__(self, prototypes: int, size: int, device: torch.device):
        """Begin with no tokens; ``size``: of an output."""
        self.count = 0.0
        # The last coefficient is a constant 1.
        self.cc = torch.zeros(prototypes + 1, prototypes + 1, device=device)
        self.cy = torch.zeros(prototypes + 1, size, device=device)
        self.yy = 0.0

    def add(self, coefficients: Tensor, outputs: Tensor, longest: float = torch.inf) -> None:
        """Add tokens by ``coefficients`` (tokens, prototypes) and ``outputs`` (tokens, size).

        Where an output is longer than ``longest``, the token's errors are scaled down as if its
        output were that long.
        """
        shrink = shrink_spikes(outputs, longest)
        outputs = outputs * shrink
        extended = torch.cat([coefficients * shrink, shrink], 1)
        self.count += shrink.square().sum().item()
        self.cc.addmm_(extended.T, extended)
        self.cy.addmm_(extended.T, outputs)
        self.yy += outputs.double().square().sum().item()

    def all_reduce(self) -> None:
        """Make every sum that over all processes of torch.distributed, if it is initialised."""
        if not is_distributed():
            return
        scalars = torch.tensor([self.count, self.yy], dtype=torch.float64, device=self.cc.device)
        for sums in (scalars, self.cc, self.cy):
            dist.all_reduce(sums)
        self.count, self.yy = scalars.tolist()

    def error(self, dictionary: Tensor) -> float:
        """Compute the mean squared error of ``dictionary``.

        It is (prototypes + 1, size); the last row is the output bias.
        """
        cross = (dictionary * self.cy).sum(dtype=torch.float64).item()
        square = (dictionary * (self.cc @ dictionary)).sum(dtype=torch.float64).item()
        return (self.yy - 2 * cross + square) / max(self.count, 1)

    def solve(self, start: Tensor, pull: float) -> Tensor:
        """Minimise the squared error plus ``pull`` times the squared change from ``start``.

        The change of a prototype is measured in what it writes. Both ``start`` and the minimiser
        are (prototypes + 1, size).
        """
        size = self.cc.diagonal().sqrt().clamp_min(SMALLEST_SIZE)
        gram = self.cc / size[:, None] / size
        penalty = torch.full_like(size, pull)
        penalty[-1] = BIAS_PULL
        gram.diagonal().add_(penalty)
        residual = (self.cy - self.cc @ start) / size[:, None]
        change = torch.linalg.solve(gram.double(), residual.double()).to(start.dtype)
        return start + change / size[:, None]


@torch.no_grad()
def calibrate_ffn(
    ffn: AnyKernelFFN,
    teacher: Callable[[Tensor], Tensor],
    sample: Tensor,
    *,
    fitted: Iterable[Tensor],
    held: Iterable[Tensor],
    temperature: float | None,
    longest: float = torch.inf,
) -> dict[str, float | None]:
    """Fit the output prototypes and output bias of ``ffn`` (float32) to ``teacher``, in place.

    The linear map of a layer with ``skip`` is fitted with them, pulled to zero.

    Args:
        sample: (tokens, hidden_size) inputs, the same on every process, whose spread gives the
            candidates for the temperature.
        fitted: batches (tokens, hidden_size) of inputs on which the solution is found, this
            process's share.
        held: batches that choose the pull, and the temperature where ``temperature`` is None and
            the readout has one.
        temperature: of the settings; None: to be fitted.
        longest: tokens with longer outputs than this, spikes, count as ones of that length.

    Returns:
        ``fvu_start`` and ``fvu``: fraction of variance unexplained on the tokens held out, before
        and after; ``pull``; ``dictionary_growth``: norm of the dictionary over that of the initial
        one at its best scale. All are None, and nothing is fitted, where no token was read to fit
        or to hold out, as in an expert of a mixture.
    """
    weight = ffn.output_prototypes.weight
    bias = ffn.output_prototypes.bias
    start = torch.cat([weight.T, bias[None]])
    if ffn.config.settings.skip:
        start = torch.cat([weight.T, weight.new_zeros(len(weight), len(weight)), bias[None]])
    temperatures: list[float | None] = [None]
    if isinstance(ffn, KernelFFN) and "temperature" in ffn.log_ratio and temperature is None:
        spread = _log_kernel_spread(ffn, sample)
        temperatures = [share * spread for share in TEMPERATURES]

    fitted_moments = _gather_moments(ffn, teacher, fitted, temperatures, longest)
    held_moments = _gather_moments(ffn, teacher, held, temperatures, longest)
    if not (fitted_moments[0].count and held_moments[0].count):
        typical = temperatures[len(temperatures) // 2]
        if typical is not None:
            ffn.set_reference("temperature", typical)
        return dict.fromkeys(("fvu_start", "fvu", "pull", "dictionary_growth"))

    best: Solution | None = None
    for tau, train, test in zip(temperatures, fitted_moments, held_moments, strict=True):
        for solution in _solve_for_pulls(train, test, start, tau):
            if best is None or solution.error < best.error:
                best = solution
    assert best is not None

    if best.temperature is not None:
        ffn.set_reference("temperature", best.temperature)
    prototypes = weight.shape[1]
    weight.copy_(best.dictionary[:prototypes].T)
    bias.copy_(best.dictionary[-1])
    if isinstance(ffn, TiedKernelFFN) and ffn.config.settings.skip:
        ffn.skip.weight.copy_(best.dictionary[prototypes:-1].T)
    return {
        "fvu_start": best.error_start,
        "fvu": best.error,
        "pull": best.pull,
        "dictionary_growth": (weight.norm() / best.start[:prototypes].norm()).item(),
    }


class Solution(NamedTuple):
    """Output prototypes for one temperature and pull; errors are shares of the variance."""

    error: float
    """On the tokens held out."""
    temperature: float | None
    pull: float
    dictionary: Tensor
    """(prototypes + 1, size); the last row is the output bias."""
    error_start: float
    """On the tokens held out, of ``start``."""
    start: Tensor
    """What it was pulled to, of the same shape."""


def _solve_for_pulls(
    train: Moments, test: Moments, start: Tensor, temperature: float | None
) -> Iterator[Solution]:
    """The solution for every pull toward ``start`` at its best scale."""
    mean = test.cy[-1] / test.count
    variance = test.yy / test.count - mean.square().sum().item()
    scaled_start = _scale_start(train, start)
    error_start = test.error(scaled_start) / variance
    for pull in PULLS:
        dictionary = train.solve(scaled_start, pull)
        error = test.error(dictionary) / variance
        yield Solution(error, temperature, pull, dictionary, error_start, scaled_start)


def _gather_moments(
    ffn: AnyKernelFFN,
    teacher: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    temperatures: Sequence[float | None],
    longest: float,
) -> list[Moments]:
    """The moments for every temperature, gathered side by side: inputs are seen once."""
    size = ffn.config.hidden_size
    features = ffn.config.prototypes + (size if ffn.config.settings.skip else 0)
    device = ffn.output_prototypes.weight.device
    all_moments = [Moments(features, size, device) for _ in temperatures]
    for batch in batches:
        for chunk in batch.split(CHUNK):
            outputs = teacher(chunk).float()
            for moments, temperature in zip(all_moments, temperatures, strict=True):
                if temperature is not None:
                    ffn.set_reference("temperature", temperature)
                coefficients = ffn.coefficients(chunk.float())
                if ffn.config.settings.skip:
                    coefficients = torch.cat([coefficients, chunk.float()], 1)
                moments.add(coefficients, outputs, longest)
    for moments in all_moments:
        moments.all_reduce()
    return all_moments


def _scale_start(moments: Moments, start: Tensor) -> Tensor:
    """``start`` times the one scalar, and with the one bias, that fit best."""
    mean_c = moments.cc[-1, :-1] / moments.count
    mean_y = moments.cy[-1] / moments.count
    written = start[:-1]
    mean_written = mean_c @ written
    mean_square = (written * (moments.cc[:-1, :-1] @ written)).sum() / moments.count
    square = mean_square - mean_written.square().sum()
    cross = (written * moments.cy[:-1]).sum() / moments.count - mean_written @ mean_y
    scalar = cross / square.clamp_min(SMALLEST_VARIANCE)
    return torch.cat([written * scalar, (mean_y - mean_c @ written * scalar)[None]])


def _log_kernel_spread(ffn: KernelFFN, inputs: Tensor) -> float:
    """Standard deviation of the log kernel where it fires at ``inputs`` (tokens, hidden_size)."""
    log_kernel = ffn.kernel.log(*ffn.scores(inputs.float()), **ffn.kernel_parameters())
    fires = torch.isfinite(log_kernel)
    if fires.sum() <= 1:
        return 1.0
    return max(log_kernel[fires].std().item(), SMALLEST_SPREAD)
