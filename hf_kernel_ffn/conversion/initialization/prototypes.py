"""Starting weights of a readout, and the registry of the initialisers that make them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ...checkpoint_code.kernels import Kernel
from ...checkpoint_code.settings import KernelFFNConfig
from ...families.weights import FFNWeights

DISTANCE_SHARE = 0.01
"""ε and c² start at this share of the mean squared distance between inputs and prototypes."""


class Prototypes(NamedTuple):
    """Starting weights of one kernel readout; P prototypes, hidden_size d, all float32."""

    rows: Tensor
    """(P, d) input prototypes w_i."""
    bias: Tensor
    """(P,) b_i."""
    dictionary: Tensor
    """(P, d) output prototypes v_i: columns of W_out, signed and scaled."""
    units: Tensor
    """(P,) ±(1 + teacher unit), int32: the sign with which the unit's column is written."""
    parameters: dict[str, float]
    """The kernel's parameters."""
    scale: float
    """What the kernel is multiplied by where the intensity is its mass."""


Initialiser = Callable[[FFNWeights, KernelFFNConfig, Tensor], Prototypes]
"""Takes the float32 weights of an FFN, its resolved settings, and (tokens, d) float32 inputs."""

INITIALISERS: dict[str, Initialiser] = {}
"""Every initialiser by the names that ``KernelFFNConfig.init`` has for it."""


def register_initialiser(*names: str) -> Callable[[Initialiser], Initialiser]:
    """Make the decorated function the initialiser of these ``names``."""

    def register(initialiser: Initialiser) -> Initialiser:
        for name in names:
            INITIALISERS[name] = initialiser
        return initialiser

    return register


def initialise_prototypes(
    weights: FFNWeights, settings: KernelFFNConfig, inputs: Tensor
) -> Prototypes:
    """Make the prototypes that an FFN's readout starts from, by the initialiser of its settings.

    Args:
        weights: of the stock FFN, float32.
        settings: resolved by
            :func:`hf_kernel_ffn.checkpoint_code.settings.resolve_defaults`.
        inputs: (tokens, d) float32 sample of the layer's inputs, on which units are fitted.
    """
    assert settings.init is not None, "settings must be resolved"
    return INITIALISERS[settings.init](weights, settings, inputs)


def initial_kernel_parameters(
    kernel: Kernel, rows: Tensor, bias: Tensor, stretch: Tensor, inputs: Tensor
) -> dict[str, float]:
    """Choose what the parameters of ``kernel`` start from, by name.

    Args:
        rows: (P, d) input prototypes.
        bias: (P,) their biases.
        stretch: (P,) how many times as long the rows are as the unit's own.
        inputs: (tokens, d) sample of the layer's inputs.
    """
    square = inputs.square().sum(-1).mean() + rows.norm(dim=-1).square().mean()
    starts = {"distance": DISTANCE_SHARE * square.item(), "bandwidth": stretch.mean().item()}
    return {name: starts.get(start, start) for name, start in kernel.parameters.items()}


def initial_gate_bias() -> float:
    """Return the bias at which softplus is one, so that the gate starts as its reference scale."""
    return math.log(math.e - 1)
