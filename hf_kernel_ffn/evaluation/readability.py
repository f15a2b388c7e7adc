"""How readable a readout is, by figures that no rescaling can move."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import torch
from torch import Tensor, nn

from ..checkpoint_code.record import Readout
from .fidelity import mean


class Readability(evaluate.Metric):
    """How readable one FFN's write is. One entry per token, from :func:`readability`."""

    FIGURES = (
        "active_prototypes",
        "effective_prototypes",
        "coherence",
        "orthogonal_coherence",
        "opposed_share",
        "write_mass",
    )

    def _info(self) -> evaluate.MetricInfo:
        names = (*self.FIGURES, "teacher_write_mass")
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description=(
                "The figures that readability() returns, and the teacher's own write mass at the "
                "same input."
            ),
            features=datasets.Features({name: datasets.Value("float64") for name in names}),
        )

    def _compute(
        self,
        *,
        teacher_write_mass: Sequence[float],
        write_mass: Sequence[float],
        **figures: Sequence[float],
    ) -> dict[str, float]:
        """Return the mean of every figure but the write mass, of which the ratio of means."""
        means = {name: mean(values) for name, values in figures.items()}
        return {**means, "write_mass_ratio": mean(write_mass) / mean(teacher_write_mass)}


def readability(readout: Readout, mean_write: Tensor) -> dict[str, Tensor]:
    """Measure how readable a record with coefficients (tokens, prototypes) is at every token.

    Args:
        mean_write: (hidden_size,), the mean of Σ c_i v_i over the text.

    Returns:
        (tokens,) float64 each:

        * ``active_prototypes``: coefficients that are not exactly zero;
        * ``effective_prototypes``: 1/Σp², p the normalised |c_i|‖v_i‖;
        * ``coherence``: ‖Σ t‖ / Σ‖t‖ of the contributions t_i = c_i v_i − s_i μ,
          where μ is ``mean_write`` and s the normalised |c|;
        * ``orthogonal_coherence``: 1/√effective, what mutually orthogonal contributions have;
        * ``opposed_share``: share of Σ|t_i·ŷ| that points against ŷ, the direction of Σ t;
        * ``write_mass``: Σ|c_i|‖v_i‖.
    """
    # In float64: for rows that have much in common, what is left after the mean write is a small
    # difference.
    c = readout.coefficients.double()
    v = readout.dictionary.double()
    mean_write = mean_write.double()
    tiny = torch.finfo(torch.float64).tiny

    size = c.abs()
    total = size.sum(-1, keepdim=True)
    share = size / total.clamp_min(tiny)
    mass = size * v.norm(dim=-1)
    p = mass / mass.sum(-1, keepdim=True).clamp_min(tiny)
    effective = 1 / p.square().sum(-1).clamp_min(tiny)

    squared_length = (
        c.square() * v.square().sum(-1)
        - 2 * c * share * (v @ mean_write)
        + share.square() * mean_write.square().sum()
    )
    lengths = squared_length.clamp_min(0).sqrt().sum(-1)
    written = c @ v - mean_write * (total > 0)
    direction = nn.functional.normalize(written, dim=-1)
    along = c * (direction @ v.T) - share * (direction @ mean_write)[:, None]

    fires = (total[:, 0] > 0).float()
    return {
        "active_prototypes": (c != 0).sum(-1).float(),
        "effective_prototypes": effective * fires,
        "coherence": written.norm(dim=-1) / lengths.clamp_min(tiny),
        "orthogonal_coherence": effective.rsqrt() * fires,
        "opposed_share": (-along).relu().sum(-1) / along.abs().sum(-1).clamp_min(tiny),
        "write_mass": mass.sum(-1),
    }
