"""How readable a readout is, by figures that no rescaling can move."""

from __future__ import annotations

import datasets
import evaluate
import torch
from torch import Tensor, nn

from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.record import Readout
from ..families.weights import FFNWeights, read_teacher_readout
from .fidelity import _mean


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

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="The figures that readability() returns, and the teacher's own write mass at the same input.",
            features=datasets.Features(
                {name: datasets.Value("float64") for name in (*self.FIGURES, "teacher_write_mass")}
            ),
        )

    def _compute(self, teacher_write_mass, write_mass, **figures):
        means = {name: _mean(values) for name, values in figures.items()}
        return {**means, "write_mass_ratio": _mean(write_mass) / _mean(teacher_write_mass)}


def readability(readout: Readout, mean_write: Tensor) -> dict[str, Tensor]:
    """Per token, (tokens,) float64 each, from a record with coefficients (tokens, prototypes):

    * ``active_prototypes``: coefficients that are not exactly zero;
    * ``effective_prototypes``: 1/Σp², p the normalised |c_i|‖v_i‖;
    * ``coherence``: ‖Σ t‖ / Σ‖t‖ of the contributions t_i = c_i v_i − s_i μ, where μ is ``mean_write`` (hidden_size,), the
      mean of Σ c_i v_i over the text, and s the normalised |c|; ``orthogonal_coherence``: 1/√effective, what
      mutually orthogonal contributions would give;
    * ``opposed_share``: share of Σ|t_i·ŷ| that points against ŷ, the direction of Σ t;
    * ``write_mass``: Σ|c_i|‖v_i‖.
    """
    # In float64: for rows that have much in common, what is left after the mean write is a small difference.
    c, v, mean_write = (
        readout.coefficients.double(),
        readout.dictionary.double(),
        mean_write.double(),
    )
    tiny = torch.finfo(torch.float64).tiny
    size, total = c.abs(), c.abs().sum(-1, keepdim=True)
    share = size / total.clamp_min(tiny)
    mass = size * v.norm(dim=-1)
    p = mass / mass.sum(-1, keepdim=True).clamp_min(tiny)
    effective = 1 / p.square().sum(-1).clamp_min(tiny)
    length2 = (
        c.square() * v.square().sum(-1)
        - 2 * c * share * (v @ mean_write)
        + share.square() * mean_write.square().sum()
    )
    written = c @ v - mean_write * (total > 0)
    direction = nn.functional.normalize(written, dim=-1)
    along = c * (direction @ v.T) - share * (direction @ mean_write)[:, None]
    fires = (total[:, 0] > 0).float()
    return {
        "active_prototypes": (c != 0).sum(-1).float(),
        "effective_prototypes": effective * fires,
        "coherence": written.norm(dim=-1) / length2.clamp_min(0).sqrt().sum(-1).clamp_min(tiny),
        "orthogonal_coherence": effective.rsqrt() * fires,
        "opposed_share": (-along).relu().sum(-1) / along.abs().sum(-1).clamp_min(tiny),
        "write_mass": mass.sum(-1),
    }


def _records(ffn: KernelFFN, weights: FFNWeights, x: Tensor) -> dict[str, Readout]:
    """Student's and teacher's records at the teacher's inputs."""
    x = x.flatten(0, -2)
    return {"student": ffn.readout(x), "teacher": read_teacher_readout(weights, x)}


def _readable(own: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]]) -> dict[str, float]:
    columns = {name: torch.cat(parts).tolist() for name, parts in own.items()}
    return Readability(keep_in_memory=True).compute(
        **columns, teacher_write_mass=torch.cat(teacher["write_mass"]).tolist()
    )
