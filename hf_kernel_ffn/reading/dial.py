"""Temperature from one-hot to centroid, the three retrieval regimes on the way, and what kernels do far from the data.

A softmax over stored prototypes and a weighted readout are one retrieval step of a modern Hopfield network, whose fixed points are a
single pattern, a metastable average over a few, or the global mean (Ramsauer et al. 2020, arXiv:2008.02217).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.kernels import KERNELS, Kernel, get_kernel
from ..checkpoint_code.record import Readout
from ..conversion.initialization import initial_kernel_parameters
from .geometry import prototypes_of, scores
from .regimes import shares
from .rows import Rows

TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)
FACTORS = (1.0, 3.0, 10.0, 100.0)
MOST = 0.9
"""The mass by which patterns count as retrieved: Ramsauer et al. count the fewest patterns that hold 90% of the softmax's mass."""
GLOBAL = 0.5
"""It is the global mean if no fewer than this part of the patterns hold that mass (a uniform mixture needs 90% of them)."""
FEW = 2.0
"""A mixture of an effective number below this has collapsed: it is more one prototype than two."""
VANISHED = 0.01
"""A mass has vanished below this share of the mass at the inputs themselves, and grown above its inverse."""


class Dial(NamedTuple):
    """One token's mixture at one temperature."""

    temperature: float
    entropy: float
    """Nats."""
    effective: float
    """1/Σπ²."""
    largest: float
    """The largest share."""
    retrieval: str
    """single, metastable or global mean, by :func:`retrieval`."""
    from_top: float
    """‖Σπv − v_top‖ over ‖v_top − centroid‖: 0 at the top prototype, 1 at the centroid; zero where the two are one point."""
    from_centroid: float
    """‖Σπv − centroid‖ over the same: 1 and 0."""


@torch.no_grad()
def dial(
    readout: Readout,
    place: int = -1,
    temperatures: Sequence[float] = TEMPERATURES,
    support: bool = False,
) -> Rows[Dial]:
    """One token's mixture (row ``place`` of coefficients (tokens, prototypes)) as the temperature turns: shares ∝ c^(1/τ) on the
    support, for a kernel readout or an attention head. At τ = 1 they are the record's own; toward 0 the top prototype (or the mean
    of those that tie), toward infinity the support's centroid. For a softmax this is the layer's own temperature, relative to the one
    it has; a truncated map would change its support as well.

    Args:
        support: only prototypes that fire count as stored patterns; for an attention head those are the tokens that the position
            sees. Otherwise all do, and a mixture of few prototypes is metastable at best, however flat.

    Raises:
        InputError: the record is signed, nothing fires at this token, or a temperature is not positive.
    """
    if (readout.coefficients < 0).any():
        raise InputError(
            "found a signed record, expected nonnegative coefficients: an untouched FFN has no temperature; read a converted layer "
            "or an attention head"
        )
    if not temperatures or not all(0 < t < math.inf for t in temperatures):
        raise InputError(
            f"found temperatures {list(temperatures)}, expected positive finite numbers"
        )
    pi = shares(readout)[place]
    fires = pi > 0
    if not fires.any():
        raise InputError(
            f"found nothing firing at place {place}, expected a mixture: choose another token"
        )
    v, logs = readout.dictionary.double()[fires], pi[fires].log()
    top, centroid = v[logs.argmax()], v.mean(0)
    scale = (top - centroid).norm()
    found = Rows[Dial]()
    for temperature in temperatures:
        turned = ((logs - logs.max()) / temperature).softmax(-1)
        distances = [
            ((turned @ v - end).norm() / scale).nan_to_num(0.0).item() for end in (top, centroid)
        ]
        entropy = -torch.special.xlogy(turned, turned).sum().item()
        effective = 1 / turned.square().sum().item()
        regime = retrieval(
            turned if support else torch.zeros_like(pi).masked_scatter(fires, turned)
        )
        found.append(Dial(temperature, entropy, effective, turned.max().item(), regime, *distances))
    return found


def retrieval(shares: Tensor) -> str:
    """Which of a Hopfield network's three kinds of fixed point the mixture ``shares`` (patterns,) is like, by how many of the patterns
    hold MOST of the mass: ``single`` if one does, ``global mean`` if it takes at least GLOBAL of all, else ``metastable``.
    InputError unless they are nonnegative and sum to one."""
    p = shares.double()
    if p.ndim != 1 or (p < 0).any() or abs(p.sum().item() - 1) > 1e-3:
        raise InputError(
            f"found shares of shape {tuple(p.shape)} and sum {p.sum():.4g}, expected one mixture, (patterns,) and sum 1"
        )
    if p.max() >= MOST:
        return "single"
    needed = 1 + int((p.sort(descending=True).values.cumsum(0) < MOST - 1e-9).sum())
    return "global mean" if needed >= GLOBAL * len(p) else "metastable"


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
    """``collapses`` (fewer than FEW effective prototypes) or ``stays a smoother``; and ``mass vanishes``, ``remains`` or ``grows``, against the
    inputs themselves."""


@torch.no_grad()
def far_field(
    ffn: KernelFFN,
    inputs: Tensor,
    factors: Sequence[float] = FACTORS,
    kernels: Sequence[str] | None = None,
) -> Rows[FarField]:
    """Kernel against kernel far from the data: over the same input prototypes (and biases, for kernels that use one), at inputs
    x̄ + f·(x − x̄), x̄ being the mean of ``inputs`` (tokens, hidden_size). Log-space keeps a light tail's shares finite, but they fall to
    one prototype; heavy tails keep a mixture.

    Args:
        factors: how far; 1 is the inputs themselves.
        kernels: registered names; None: all nonnegative ones whose parameters a conversion can start. The layer's own kernel has its
            own parameters, another those a conversion would start from at these rows and inputs (bandwidth one: a layer does not
            remember how far its rows were stretched).

    Raises:
        InputError: a kernel is unknown or can be negative, a factor is not finite, or there are no inputs.
    """
    if inputs.ndim != 2 or not len(inputs) or not all(math.isfinite(f) for f in factors):
        raise InputError(
            f"found inputs of shape {tuple(inputs.shape)} and factors {list(factors)}, expected (tokens, hidden_size), finite"
        )
    x, (rows, bias) = inputs.detach().double(), prototypes_of(ffn)
    mean, ones = x.mean(0), x.new_ones(len(x))
    found = Rows[FarField]()
    for name in (
        kernels
        if kernels is not None
        else [n for n, k in KERNELS.items() if k.nonnegative and _startable(k)]
    ):
        kernel = get_kernel(name)
        if not kernel.nonnegative:
            raise InputError(
                f"found kernel {name!r}, which can be negative, expected a nonnegative one: it makes no mixture"
            )
        own = (
            ffn.kernel_parameters()
            if name == ffn.kernel.name
            else initial_kernel_parameters(kernel, rows, bias, ones, x)
        )
        parameters = {
            key: torch.as_tensor(value, dtype=x.dtype, device=x.device)
            for key, value in own.items()
        }
        heights = ones if kernel.uses_bias else 0 * ones
        here = None
        for factor in (1.0, *factors):  # the inputs themselves first, for comparison
            score, distance2 = scores(mean + factor * (x - mean), heights, rows, bias)
            log_kernel = kernel.log(
                score, distance2 if kernel.uses_distance else None, **parameters
            )
            pi, mass = log_kernel.softmax(-1).nan_to_num(0.0), log_kernel.logsumexp(-1)
            if here is None:
                here = mass
                continue
            largest = pi.max(-1)
            nearest = (largest.indices == distance2.argmin(-1)).double().mean().item()
            change = (mass - here).nan_to_num(0.0).mean().item()
            effective = (pi.sum(-1) / pi.square().sum(-1).clamp_min(1e-300)).mean().item()
            verdict = _verdict(effective, change)
            found.append(
                FarField(
                    name,
                    factor,
                    effective,
                    largest.values.mean().item(),
                    nearest,
                    mass.mean().item(),
                    verdict,
                )
            )
    return found


def _startable(kernel: Kernel) -> bool:
    return all(
        isinstance(start, (int, float)) or start in ("distance", "bandwidth")
        for start in kernel.parameters.values()
    )


def _verdict(effective: float, change: float) -> str:
    shape = "collapses" if effective < FEW else "stays a smoother"
    mass = (
        "vanishes"
        if change < math.log(VANISHED)
        else "grows"
        if change > -math.log(VANISHED)
        else "remains"
    )
    return f"{shape}, mass {mass}"
