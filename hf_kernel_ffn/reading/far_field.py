"""What kernels do far from the data: whether a mixture collapses, and whether its mass vanishes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.kernels import KERNELS, Kernel, get_kernel
from ..conversion.initialization import initial_kernel_parameters
from .geometry import prototypes_of, scores
from .rows import Rows

FACTORS = (1.0, 3.0, 10.0, 100.0)
FEW = 2.0
"""A mixture of an effective number below this has collapsed: it is more one prototype than two."""
VANISHED = 0.01
"""A mass has vanished below this share of the mass at the inputs themselves, and grown above its
inverse."""


class FarField(NamedTuple):
    """One kernel at one distance from the data; means over tokens."""

    kernel: str
    factor: float
    effective: float
    """1/Σπ² of the mixture π = κ/Σκ."""
    largest: float
    """The largest share."""
    nearest: float
    """How often that is the nearest prototype's."""
    log_mass: float
    """log Σκ; −inf if at some token nothing fires."""
    verdict: str
    """``collapses`` (fewer than FEW effective prototypes) or ``stays a smoother``; and ``mass
    vanishes``, ``remains`` or ``grows``, against the inputs themselves."""


@torch.no_grad()
def far_field(
    ffn: KernelFFN,
    inputs: Tensor,
    factors: Sequence[float] = FACTORS,
    kernels: Sequence[str] | None = None,
) -> Rows[FarField]:
    """Set kernel against kernel far from the data, at inputs x̄ + f·(x − x̄).

    All have the same input prototypes (and biases, for kernels that use one). Log-space keeps a
    light tail's shares finite, but they fall to one prototype; heavy tails keep a mixture.

    Args:
        inputs: (tokens, hidden_size) x, with mean x̄.
        factors: how far; 1 is the inputs themselves.
        kernels: registered names; None: all nonnegative ones whose parameters a conversion can
            start. The layer's own kernel has its own parameters, another those a conversion would
            start from at these rows and inputs (bandwidth one: a layer does not remember how far
            its rows were stretched).

    Raises:
        InputError: a kernel is unknown or can be negative, a factor is not finite, or there are no
            inputs.
    """
    if inputs.ndim != 2 or not len(inputs) or not all(math.isfinite(factor) for factor in factors):
        raise InputError(
            f"found inputs of shape {tuple(inputs.shape)} and factors {list(factors)}, expected "
            "(tokens, hidden_size), finite"
        )
    if kernels is None:
        kernels = [
            name
            for name, kernel in KERNELS.items()
            if kernel.nonnegative and _can_start(kernel) and not kernel.uses_knot
        ]
    states = inputs.detach().double()
    table = Rows[FarField]()
    for name in kernels:
        kernel = get_kernel(name)
        if not kernel.nonnegative:
            raise InputError(
                f"found kernel {name!r}, which can be negative, expected a nonnegative one: it "
                "makes no mixture"
            )
        if kernel.uses_knot:
            raise InputError(
                f"found kernel {name!r}, whose prototypes are knots on a line, expected one "
                "between an input and a row: leave it out"
            )
        parameters = _choose_parameters(ffn, kernel, states)
        own_log_mass = _Mixture.measure(ffn, kernel, parameters, states, factor=1.0).log_mass
        for factor in factors:
            mixture = _Mixture.measure(ffn, kernel, parameters, states, factor=factor)
            table.append(mixture.summarise(name, factor, own_log_mass))
    return table


class _Mixture(NamedTuple):
    """What one kernel makes of the inputs at one distance; T tokens, P prototypes."""

    shares: Tensor
    """(T, P)."""
    log_mass: Tensor
    """(T,) log Σκ."""
    nearest: Tensor
    """(T,) the nearest prototype."""

    @classmethod
    def measure(
        cls,
        ffn: KernelFFN,
        kernel: Kernel,
        parameters: Mapping[str, Tensor],
        states: Tensor,
        *,
        factor: float,
    ) -> _Mixture:
        """The mixture of ``kernel`` over the prototypes of ``ffn``, ``factor`` times as far out."""
        rows, bias = prototypes_of(ffn)
        mean = states.mean(0)
        heights = states.new_full((len(states),), float(kernel.uses_bias))
        score, distance2 = scores(mean + factor * (states - mean), heights, rows, bias)
        log_kernel = kernel.log(score, distance2 if kernel.uses_distance else None, **parameters)
        shares = log_kernel.softmax(-1).nan_to_num(0.0)
        return cls(shares, log_kernel.logsumexp(-1), distance2.argmin(-1))

    def summarise(self, kernel: str, factor: float, own_log_mass: Tensor) -> FarField:
        """The row of the table; ``own_log_mass`` (T,) is that at the inputs themselves."""
        largest = self.shares.max(-1)
        is_nearest = (largest.indices == self.nearest).double()
        effective = self.shares.sum(-1) / self.shares.square().sum(-1).clamp_min(1e-300)
        change = (self.log_mass - own_log_mass).nan_to_num(0.0).mean().item()
        return FarField(
            kernel=kernel,
            factor=factor,
            effective=effective.mean().item(),
            largest=largest.values.mean().item(),
            nearest=is_nearest.mean().item(),
            log_mass=self.log_mass.mean().item(),
            verdict=_judge(effective.mean().item(), change),
        )


def _choose_parameters(ffn: KernelFFN, kernel: Kernel, states: Tensor) -> dict[str, Tensor]:
    """The parameters of ``kernel`` over the prototypes of ``ffn``: its own, or a conversion's
    start."""
    rows, bias = prototypes_of(ffn)
    parameters: Mapping[str, Tensor | float]
    if kernel.name == ffn.kernel.name:
        parameters = ffn.kernel_parameters()
    else:
        heights = states.new_ones(len(states))
        parameters = initial_kernel_parameters(kernel, rows, bias, heights, states)
    return {
        name: torch.as_tensor(value, dtype=states.dtype, device=states.device)
        for name, value in parameters.items()
    }


def _can_start(kernel: Kernel) -> bool:
    """Whether a conversion knows where the parameters of ``kernel`` start."""
    return all(
        isinstance(start, (int, float)) or start in ("distance", "bandwidth")
        for start in kernel.parameters.values()
    )


def _judge(effective: float, change: float) -> str:
    """The verdict on a mean effective number, and on the mean change of the log-mass."""
    shape = "collapses" if effective < FEW else "stays a smoother"
    if change < math.log(VANISHED):
        mass = "vanishes"
    elif change > -math.log(VANISHED):
        mass = "grows"
    else:
        mass = "remains"
    return f"{shape}, mass {mass}"
