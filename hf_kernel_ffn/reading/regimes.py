"""What may be said about a layer's coefficients, and what they say: choice, intensity,
cancellation, contributions.

Two yes/no questions, whether the coefficients are nonnegative and whether they sum to one, make
four regimes (Bouhsine 2026, "The Readout is a Convex Combination of Prototypes"). Shares are
spoken of in the convex and the conic one only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
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
"""How far Σc may be from one in a convex or affine regime; half precision rounds by 100 times as
much, so sums are taken over float64."""
QUIET = 0.25
"""An output is small below this share of the batch's median norm, and its mass small below this
share of the median mass."""


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
    """Read the regime of a record on its batch off the numbers, not off the settings.

    Args:
        readout: coefficients (..., prototypes).
        tolerance: how far sums may be from one.
    """
    coefficients = readout.coefficients.double().flatten(0, -2)
    mass = coefficients.abs() * readout.dictionary.double().norm(dim=-1)
    negative = (mass * (coefficients < 0)).sum() / mass.sum().clamp_min(1e-300)
    least = coefficients.min().item()
    sums = coefficients.sum(-1)
    sums_to_one = bool(((sums - 1).abs() <= tolerance).all())
    name = REGIMES[least >= 0, sums_to_one]
    return Regime(
        name=name if readout.skip is None else f"{name} + linear",
        least=least,
        negative_mass=negative.item(),
        sums=(sums.min().item(), sums.max().item()),
    )


def shares(readout: Readout) -> Tensor:
    """(..., prototypes) float64: each coefficient over their sum, zero where nothing fires.

    Raises:
        InputError: a coefficient is negative: there are signed contributions and cancellation, but
            no shares.
    """
    coefficients = readout.coefficients.double()
    if (coefficients < 0).any():
        raise InputError(
            f"found negative coefficients in a {regime(readout).name} readout, expected a convex "
            "or conic one: it has signed contributions and cancellation, but no shares; use "
            "contributions()"
        )
    total = coefficients.sum(-1, keepdim=True)
    return coefficients / total.where(total > 0, 1.0)


class Mixture(NamedTuple):
    """Choice and intensity of one token, apart. Masses are Σ|c_i|‖v_i‖, in the units of the
    residual stream."""

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
    """written / mass. For figures that no reparametrisation can improve see
    ``evaluation.readability``."""
    diagnosis: str
    """``written``; of a small output, ``nothing fired`` or ``strong messages cancelled``."""


def mixtures(readout: Readout) -> Rows[Mixture]:
    """Tell what each token of a record (coefficients (tokens, prototypes)) chose, and how loudly.

    An output below a quarter of the batch's median norm is small: nothing fired if its mass is
    below a quarter of the median too, otherwise messages cancelled.
    """
    coefficients = readout.coefficients.double()
    dictionary = readout.dictionary.double()
    mass = coefficients.abs() * dictionary.norm(dim=-1)
    total = mass.sum(-1)
    safe_total = total.where(total > 0, 1.0)
    written = (coefficients @ dictionary).norm(dim=-1)
    probabilities = mass / safe_total[:, None]
    entropy = -(probabilities * probabilities.where(probabilities > 0, 1.0).log()).sum(-1)
    effective = 1 / probabilities.square().sum(-1).clamp_min(1e-300)

    is_small = (written < QUIET * written.median()) | (total == 0)
    is_silent = (total < QUIET * total.median()) | (total == 0)
    columns = {
        "entropy": entropy,
        "active": (coefficients != 0).sum(-1),
        "effective": effective.where(total > 0, 0.0),
        "positive_mass": (mass * (coefficients > 0)).sum(-1),
        "negative_mass": (mass * (coefficients < 0)).sum(-1),
        "intensity": coefficients.abs().sum(-1),
        "written": written,
        "coherence": written / safe_total,
    }
    figures = {name: column.tolist() for name, column in columns.items()}
    return Rows(
        Mixture(
            position=row,
            **{name: column[row] for name, column in figures.items()},
            diagnosis=_diagnose(bool(is_small[row]), bool(is_silent[row])),
        )
        for row in range(len(coefficients))
    )


def _diagnose(is_small: bool, is_silent: bool) -> str:
    """A word for an output."""
    if not is_small:
        return "written"
    return "nothing fired" if is_silent else "strong messages cancelled"


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
    """Split what was written at one token exactly into prototypes, largest ‖c v‖ first.

    Their sum and the bias are the layer's output.

    Args:
        place: row of the coefficients (tokens, prototypes).
        top: so many of them; None: all that are not zero.
    """
    row = readout._replace(coefficients=readout.coefficients[place : place + 1 or None])
    coefficients = row.coefficients[0].double()
    dictionary = readout.dictionary.double()
    share: list[float | None] = [None] * len(coefficients)
    if (coefficients >= 0).all():
        share = shares(row)[0].tolist()

    norm = coefficients.abs() * dictionary.norm(dim=-1)
    direction = nn.functional.normalize(coefficients @ dictionary, dim=0)
    along = coefficients * (dictionary @ direction)
    count = int((coefficients != 0).sum()) if top is None else top
    order = norm.argsort(descending=True, stable=True)[:count].tolist()
    return Rows(
        Contribution(
            name=readout.names[prototype],
            prototype=prototype,
            coefficient=coefficients[prototype].item(),
            share=share[prototype],
            norm=norm[prototype].item(),
            along=along[prototype].item(),
        )
        for prototype in order
        if coefficients[prototype] != 0
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
def nonlinearities(ffn: KernelFFN, inputs: Tensor) -> Rows[Nonlinearity]:
    """Swap what is applied to the scores of one converted layer, and see where each lands.

    The source article's experiment: ReLU, GELU and tanh leave the scores to themselves, softmax
    and the kernel (normalised by its mass) make a mixture, scores over their sum an affine one.

    Args:
        ffn: for its scores, kernel and dictionary.
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
    record = ffn.readout(inputs)
    table = Rows[Nonlinearity]()
    for name, coefficients in applied.items():
        where = regime(record._replace(coefficients=coefficients))
        active = (coefficients != 0).sum(-1).double().mean().item()
        table.append(Nonlinearity(name, where.name, where.negative_mass, active, where.sums))
    return table
