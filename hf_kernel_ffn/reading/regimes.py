"""What may be said about a layer's coefficients, and what they say: choice, intensity, cancellation, contributions.

Two yes/no questions, whether the coefficients are nonnegative and whether they sum to one, make four regimes (Bouhsine 2026, "The
Readout is a Convex Combination of Prototypes"). Shares are spoken of in the convex and the conic one only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.record import Readout
from .rows import Rows

REGIMES = {
    (True, True): "convex",
    (True, False): "conic",
    (False, True): "affine",
    (False, False): "linear",
}
"""By whether the coefficients are nonnegative, and whether they sum to one."""
TOLERANCE = 1e-4
"""How far Σc may be from one in a convex or affine regime; half precision rounds by 100 times as much, so sums are taken over float64."""
QUIET = 0.25
"""An output is small below this share of the batch's median norm, and its mass small below this share of the median mass."""


class Regime(NamedTuple):
    """What the coefficients of one layer are on one batch."""

    name: str
    """convex, conic, affine or linear."""
    least: float
    """The smallest coefficient."""
    negative_mass: float
    """Share of Σ|c|‖v‖ under negative coefficients, over the batch."""
    sums: tuple[float, float]
    """The smallest and the largest Σc over tokens."""

    @property
    def has_shares(self) -> bool:
        """Whether "unit i contributed 30%" means what it says."""
        return self.name in ("convex", "conic")


def regime(readout: Readout, tolerance: float = TOLERANCE) -> Regime:
    """The regime of a record (coefficients (..., prototypes)) on its batch, read off the numbers and not off the settings. Sums may
    differ from one by ``tolerance``."""
    c = readout.coefficients.double().flatten(0, -2)
    mass = c.abs() * readout.dictionary.double().norm(dim=-1)
    sums = c.sum(-1)
    one = bool(((sums - 1).abs() <= tolerance).all())
    least = c.min().item()
    negative = (mass * (c < 0)).sum() / mass.sum().clamp_min(1e-300)
    return Regime(
        REGIMES[least >= 0, one], least, negative.item(), (sums.min().item(), sums.max().item())
    )


def shares(readout: Readout) -> Tensor:
    """(..., prototypes) float64: each coefficient over their sum, zero where nothing fires.

    Raises:
        InputError: a coefficient is negative: there are signed contributions and cancellation, but no shares.
    """
    c = readout.coefficients.double()
    if (c < 0).any():
        raise InputError(
            f"found negative coefficients in a {regime(readout).name} readout, expected a convex or conic one: it has signed "
            "contributions and cancellation, but no shares; use contributions()"
        )
    total = c.sum(-1, keepdim=True)
    return c / total.where(total > 0, 1.0)


class Mixture(NamedTuple):
    """Choice and intensity of one token, apart. Masses are Σ|c_i|‖v_i‖, in the units of the residual stream."""

    position: int
    entropy: float
    """Nats, of p_i = |c_i|‖v_i‖ normalised."""
    active: int
    """Coefficients that are not zero."""
    effective: float
    """1/Σp²."""
    positive_mass: float
    negative_mass: float
    intensity: float
    """Σ|c|: how loudly the mixture is written."""
    written: float
    """‖Σ c_i v_i‖."""
    coherence: float
    """written / mass. For figures that no reparametrisation can improve see ``evaluation.readability``."""
    diagnosis: str
    """``written``; of a small output, ``nothing fired`` or ``strong messages cancelled``."""


def mixtures(readout: Readout) -> Rows[Mixture]:
    """What each token of a record (coefficients (tokens, prototypes)) chose, and how loudly. An output below a quarter of the
    batch's median norm is small: nothing fired if its mass is below a quarter of the median too, otherwise messages cancelled."""
    c, v = readout.coefficients.double(), readout.dictionary.double()
    mass = c.abs() * v.norm(dim=-1)
    total, written = mass.sum(-1), (c @ v).norm(dim=-1)
    p = mass / total.where(total > 0, 1.0)[:, None]
    entropy = -(p * p.where(p > 0, 1.0).log()).sum(-1)
    small, silent = (
        written < QUIET * written.median(),
        (total < QUIET * total.median()) | (total == 0),
    )
    small = small | (total == 0)
    rows = zip(
        entropy.tolist(), (c != 0).sum(-1).tolist(), (1 / p.square().sum(-1).clamp_min(1e-300)).tolist(),
        (mass * (c > 0)).sum(-1).tolist(), (mass * (c < 0)).sum(-1).tolist(), c.abs().sum(-1).tolist(), written.tolist(),
        (written / total.where(total > 0, 1.0)).tolist(), small.tolist(), silent.tolist(),
    )  # fmt: skip
    return Rows(
        Mixture(i, e, a, n if a else 0.0, pos, neg, g, w, r, _diagnosis(s, q))
        for i, (e, a, n, pos, neg, g, w, r, s, q) in enumerate(rows)
    )


def _diagnosis(small: bool, silent: bool) -> str:
    return "written" if not small else "nothing fired" if silent else "strong messages cancelled"


class Contribution(NamedTuple):
    """What one prototype wrote at one token."""

    name: str
    prototype: int
    """Row of the dictionary."""
    coefficient: float
    share: float | None
    """Of Σc, if the coefficients are nonnegative; None in a signed regime."""
    norm: float
    """‖c v‖."""
    along: float
    """c v·ŷ, ŷ the direction of Σ c v: signed; over all prototypes they sum to ‖Σ c v‖."""


def contributions(readout: Readout, place: int = -1, top: int | None = None) -> Rows[Contribution]:
    """The exact additive split of what was written at one token (row ``place`` of the coefficients (tokens, prototypes)) into
    prototypes, largest ‖c v‖ first; ``top`` of them, or all that are not zero. Their sum and the bias are the layer's output."""
    one = readout._replace(coefficients=readout.coefficients[place : place + 1 or None])
    c, v = one.coefficients[0].double(), readout.dictionary.double()
    share = shares(one)[0].tolist() if (c >= 0).all() else [None] * len(c)
    norm = c.abs() * v.norm(dim=-1)
    along = c * (v @ nn.functional.normalize(c @ v, dim=0))
    order = norm.argsort(descending=True, stable=True)[
        : int((c != 0).sum()) if top is None else top
    ].tolist()
    return Rows(
        Contribution(readout.names[i], i, c[i].item(), share[i], norm[i].item(), along[i].item())
        for i in order
        if c[i] != 0
    )


class Nonlinearity(NamedTuple):
    """Where one nonlinearity lands the same scores."""

    nonlinearity: str
    regime: str
    negative_mass: float
    active: float
    """Mean number of coefficients that are not zero."""
    sums: tuple[float, float]


@torch.no_grad()
def nonlinearities(ffn: Any, inputs: Tensor) -> Rows[Nonlinearity]:
    """The source article's experiment: the scores of one converted layer stay, only what is applied to them is swapped, and each
    lands in a regime. ReLU, GELU and tanh leave them to themselves, softmax and the kernel (normalised by its mass) make a mixture,
    scores over their sum an affine one.

    Args:
        ffn: a KernelFFN, for its scores, kernel and dictionary.
        inputs: (tokens, hidden_size).
    """
    score, distance2 = ffn.scores(inputs)
    kernel = ffn.kernel.value(score, distance2, **ffn.kernel_parameters()).double()
    score = score.double()
    mass = kernel.sum(-1, keepdim=True)
    applied = {
        "ReLU": score.relu(),
        "GELU": nn.functional.gelu(score),
        "tanh": score.tanh(),
        "scores over their sum": score / score.sum(-1, keepdim=True),
        "softmax": score.softmax(-1),
        f"{ffn.kernel.name} × mass": kernel,
        f"{ffn.kernel.name} / mass": kernel / mass.where(mass > 0, 1.0),
    }
    record, found = ffn.readout(inputs), Rows[Nonlinearity]()
    for name, coefficients in applied.items():
        what = regime(record._replace(coefficients=coefficients))
        active = (coefficients != 0).sum(-1).double().mean().item()
        found.append(Nonlinearity(name, what.name, what.negative_mass, active, what.sums))
    return found
