"""Kernels between an FFN's input and its input prototypes, and what each of them promises.

A kernel sees the score ``s = x·w + b`` and, if it asks for it, the squared distance
``‖x − w‖²``, both in float32 or float64, and returns ``κ(x, w) ≥ 0``. Nonnegativity makes
a readout convex or conic; positive definiteness makes a reproducing kernel Hilbert space. They
are independent, and a kernel declares both.

This file travels inside converted checkpoints: it imports nothing but torch.
"""

# A kernel names its own parameters in value(); the base class takes them by **parameters.
# mypy: disable-error-code="override"

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

KERNELS: dict[str, "Kernel"] = {}
"""Every registered kernel by name."""


@dataclass(frozen=True)
class Kernel:
    """One kernel: subclass it, define :meth:`value`, and register an instance.

    :func:`register_kernel` does that. ``value``, ``log`` and ``scaled`` take

    * ``score``: ``x·w + b``, shape ``(..., prototypes)``, float32 or float64;
    * ``distance2``: ``‖x − w‖²``, same shape and dtype, or None unless ``uses_distance``;
    * the kernel's ``parameters`` by keyword, positive scalar tensors;
    * ``knot`` by keyword, of either sign, if the kernel ``uses_knot``.
    """

    name: str
    nonnegative: bool
    """κ(x, w) ≥ 0 for all x, w: the readout is a (scaled) mixture. A conversion requires it."""
    positive_definite: bool
    """Every Gram matrix over augmented points (w, b) is positive semi-definite: an RKHS exists."""
    uses_bias: bool = False
    """Each prototype has a learned b inside the score."""
    uses_distance: bool = False
    """``value`` reads ``distance2``."""
    uses_knot: bool = False
    """``value`` reads ``knot``, a prototype's own place on the line of the scores: tied rows."""
    degree: int | None = None
    """κ grows as a^degree when a prototype's row and b are multiplied by a, distance apart.

    It lets a conversion give all output prototypes one length, so that the kernel alone tells how
    loud a contribution is. None: it does not grow so.
    """
    parameters: dict[str, Any] = field(default_factory=dict)
    """Positive parameters of one layer, and what a conversion starts them from.

    A number; ``"distance"``, a hundredth of the mean squared distance between inputs and
    prototypes; or ``"bandwidth"``, the one at which the log kernel moves by one when the
    teacher's score does.
    """

    def value(self, score: Tensor, distance2: Tensor | None, **parameters: Tensor) -> Tensor:
        """κ(x, w), shape of ``score``."""
        raise NotImplementedError(f"kernel {self.name!r} does not define value()")

    def log(self, score: Tensor, distance2: Tensor | None, **parameters: Tensor) -> Tensor:
        """log κ(x, w), with −inf, and no gradient, where κ = 0.

        Override it where κ may under- or overflow.
        """
        value = self.value(score, distance2, **parameters)
        fires = value > 0
        return torch.where(fires, value.where(fires, torch.ones_like(value)).log(), -torch.inf)

    def scaled(
        self, score: Tensor, distance2: Tensor | None, log_scale: Tensor, **parameters: Tensor
    ) -> Tensor:
        """κ(x, w) · e^log_scale. Override it where κ may overflow and the product does not."""
        return self.value(score, distance2, **parameters) * log_scale.exp()


def register_kernel(kernel: Kernel) -> Kernel:
    """Make ``kernel`` available by its name.

    Raises:
        TypeError: it is not an instance of :class:`Kernel`.
        InputError: another kernel already has the name.
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(
            f"found {kernel!r}, expected an instance of Kernel: "
            "register MyKernel(name=…), not the class"
        )
    registered = KERNELS.get(kernel.name)
    if registered is not None and _class_name(registered) != _class_name(kernel):
        raise InputError(
            f"a kernel named {kernel.name!r} is already registered: choose another name"
        )
    KERNELS[kernel.name] = kernel
    return kernel


def _class_name(kernel: Kernel) -> tuple[str, str]:
    return type(kernel).__module__, type(kernel).__qualname__


def get_kernel(name: str) -> Kernel:
    """The kernel called ``name``; InputError, with the names there are, if there is none."""
    if not isinstance(name, str) or name not in KERNELS:
        raise InputError(
            f"found kernel {name!r}, expected one of {', '.join(KERNELS)}: "
            "register your own by register_kernel"
        )
    return KERNELS[name]


class Exponential(Kernel):
    """κ = exp(x·w) · e^b, the kernel of softmax attention (Tsai et al. 2019, arXiv:1908.11775).

    e^b is a mixing weight.
    """

    def value(self, score: Tensor, distance2: Tensor | None = None) -> Tensor:
        return score.exp()

    def log(self, score: Tensor, distance2: Tensor | None = None) -> Tensor:
        return score

    def scaled(self, score: Tensor, distance2: Tensor | None, log_scale: Tensor) -> Tensor:
        return (score + log_scale).exp()


class Gaussian(Kernel):
    """κ = exp(−‖x − w‖² / 2σ²), with ``bandwidth`` = σ²."""

    def value(self, score: Tensor, distance2: Tensor, bandwidth: Tensor) -> Tensor:
        return self.log(score, distance2, bandwidth).exp()

    def log(self, score: Tensor, distance2: Tensor, bandwidth: Tensor) -> Tensor:
        return -distance2 / (2 * bandwidth)


class InverseMultiquadric(Kernel):
    """κ = (‖x − w‖² + c²)^(−1/2), with ``offset`` = c²."""

    def value(self, score: Tensor, distance2: Tensor, offset: Tensor) -> Tensor:
        return (distance2 + offset).rsqrt()

    def log(self, score: Tensor, distance2: Tensor, offset: Tensor) -> Tensor:
        return -0.5 * (distance2 + offset).log()


class Yat(Kernel):
    """κ = (x·w + b)² / (‖x − w‖² + ε) (Bouhsine 2026, arXiv:2605.03262).

    Positive definite on the points (w, b).
    """

    def value(self, score: Tensor, distance2: Tensor, epsilon: Tensor) -> Tensor:
        return score * (score / (distance2 + epsilon))

    def log(self, score: Tensor, distance2: Tensor, epsilon: Tensor) -> Tensor:
        fires = score != 0
        safe = score.where(fires, torch.ones_like(score)).abs()
        return torch.where(fires, 2 * safe.log() - (distance2 + epsilon).log(), -torch.inf)


class HalfYat(Yat):
    """κ = relu(x·w + b)² / (‖x − w‖² + ε): Yat's aligned half. Not positive definite."""

    def value(self, score: Tensor, distance2: Tensor, epsilon: Tensor) -> Tensor:
        return super().value(score.relu(), distance2, epsilon)

    def log(self, score: Tensor, distance2: Tensor, epsilon: Tensor) -> Tensor:
        return super().log(score.relu(), distance2, epsilon)


class RootHalfYat(Kernel):
    """κ = relu(x·w + b) / √(‖x − w‖² + ε): the root of half-yat. Not positive definite.

    It grows as fast as its score, where half-yat grows as its square.
    """

    def value(self, score: Tensor, distance2: Tensor, epsilon: Tensor) -> Tensor:
        return score.relu() * (distance2 + epsilon).rsqrt()

    def log(self, score: Tensor, distance2: Tensor, epsilon: Tensor) -> Tensor:
        fires = score > 0
        safe = score.where(fires, torch.ones_like(score))
        log_kernel = safe.log() - (distance2 + epsilon).log() / 2
        return torch.where(fires, log_kernel, -torch.inf)


class Brownian(Kernel):
    """κ = min(|s|, |c|) where s and c lie on one side of zero, else 0; ``knot`` = c.

    The covariance of a Brownian motion with two arms that starts at zero (Mörters and Peres 2010,
    §1.1): nonnegative and positive definite on the line of the scores, and linear up to its knot.
    """

    def value(self, score: Tensor, distance2: Tensor | None = None, *, knot: Tensor) -> Tensor:
        return score.clamp(knot.clamp_max(0), knot.clamp_min(0)).abs()


class ExponentialYat(Kernel):
    """κ = e^{ρ(x·w + b)} (x·w + b)² / (‖x − w‖² + ε), with ``rate`` = ρ.

    Yat times the exponential. Positive definite on the points (w, b), as the product of two such
    kernels (Schur), and all but one-sided: it vanishes where x·w + b is far below zero.
    """

    def value(self, score: Tensor, distance2: Tensor, epsilon: Tensor, rate: Tensor) -> Tensor:
        return self.scaled(score, distance2, score.new_zeros(1), epsilon, rate)

    def scaled(
        self,
        score: Tensor,
        distance2: Tensor,
        log_scale: Tensor,
        epsilon: Tensor,
        rate: Tensor,
    ) -> Tensor:
        # No factor overflows before the product does.
        root = score * ((score * rate + log_scale) / 2).exp()
        return root * (root / (distance2 + epsilon))

    def log(self, score: Tensor, distance2: Tensor, epsilon: Tensor, rate: Tensor) -> Tensor:
        fires = score != 0
        safe = score.where(fires, torch.ones_like(score)).abs()
        log_kernel = 2 * safe.log() + rate * score - (distance2 + epsilon).log()
        return torch.where(fires, log_kernel, -torch.inf)


register_kernel(
    Exponential("exponential", nonnegative=True, positive_definite=True, uses_bias=True)
)
register_kernel(
    Gaussian(
        "gaussian",
        nonnegative=True,
        positive_definite=True,
        uses_distance=True,
        parameters={"bandwidth": "bandwidth"},
    )
)
register_kernel(
    InverseMultiquadric(
        "imq",
        nonnegative=True,
        positive_definite=True,
        uses_distance=True,
        parameters={"offset": "distance"},
    )
)
register_kernel(
    Yat(
        "yat",
        nonnegative=True,
        positive_definite=True,
        uses_bias=True,
        uses_distance=True,
        degree=2,
        parameters={"epsilon": "distance"},
    )
)
register_kernel(
    ExponentialYat(
        "exponential-yat",
        nonnegative=True,
        positive_definite=True,
        uses_bias=True,
        uses_distance=True,
        parameters={"epsilon": "distance", "rate": 0.5},
    )
)
register_kernel(
    HalfYat(
        "half-yat",
        nonnegative=True,
        positive_definite=False,
        uses_bias=True,
        uses_distance=True,
        degree=2,
        parameters={"epsilon": "distance"},
    )
)
register_kernel(
    RootHalfYat(
        "root-half-yat",
        nonnegative=True,
        positive_definite=False,
        uses_bias=True,
        uses_distance=True,
        degree=1,
        parameters={"epsilon": "distance"},
    )
)
register_kernel(
    Brownian(
        "brownian",
        nonnegative=True,
        positive_definite=True,
        uses_bias=True,
        uses_knot=True,
        degree=1,
    )
)
