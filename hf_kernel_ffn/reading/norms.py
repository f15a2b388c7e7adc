"""What a norm does, measured on known vectors instead of read off its parameters.

Families keep a norm's gain in different ways: as ``weight``, as ``1 + weight`` (Gemma, Nemotron),
or not at all (OLMo). A norm that is asked what it does to a known vector answers right in each
case.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from .model_parts import get_attention, get_blocks, get_embedding_weight

PROBE = 1024.0
"""Size of a probe's entries. It is so large that a norm's epsilon is rounding beside their mean
square, and a power of two, so that dividing by it is exact."""
MISFIT = 1e-3
"""A norm that is further than this from the formula below, relative to its output, is another
kind."""


class NormResponse(NamedTuple):
    """A norm as ``norm(h) = gain · (h - mean(h)) / scale(h) + shift``; an RMSNorm keeps the
    mean."""

    gain: Tensor
    """(hidden_size,) float64: what multiplies each normalised coordinate."""
    shift: Tensor
    """(hidden_size,) float64: what is added whatever the norm reads."""
    centred: bool
    """Whether the mean is subtracted, as a LayerNorm does."""

    def numerator(self, states: Tensor) -> Tensor:
        """``gain · (h - mean(h))`` of ``states`` (..., hidden_size): linear in them."""
        if self.centred:
            states = states - states.mean(-1, keepdim=True)
        return states * self.gain.to(states)

    def pull_back(self, directions: Tensor) -> Tensor:
        """``u`` (..., hidden_size) with ``u·h = direction · numerator(h)`` for any h."""
        scaled = directions * self.gain.to(directions)
        return scaled - scaled.mean(-1, keepdim=True) if self.centred else scaled


@torch.no_grad()
def measure_norm(norm: nn.Module, like: Tensor) -> NormResponse:
    """Measure ``norm`` on vectors of ±:data:`PROBE`, by a float64 copy of it.

    Args:
        like: any (..., hidden_size) tensor of the norm's width and device.
    """
    exact = copy.deepcopy(norm).double()
    ones = like.new_ones(like.shape[-1], dtype=torch.float64)
    alternating = ones.clone()
    alternating[1::2] = -1.0

    def probe(vector: Tensor) -> tuple[Tensor, Tensor]:
        """The parts of the answer that do and do not change sign with ``vector``."""
        there = exact((PROBE * vector)[None])[0].double()
        back = exact((-PROBE * vector)[None])[0].double()
        return (there - back) / 2, (there + back) / 2

    answer_to_constant, _ = probe(ones)
    answer, shift = probe(alternating)
    centred = bool(answer_to_constant.abs().max() <= MISFIT * answer.abs().max())

    normalised = alternating - alternating.mean() if centred else alternating
    normalised = normalised / normalised.square().mean().sqrt()
    return NormResponse(answer / normalised, shift, centred)


@torch.no_grad()
def linearise_norm(norm: nn.Module, state: Tensor, direction: Tensor) -> tuple[Tensor, float]:
    """Hold the scale of ``norm`` at ``state`` (hidden_size,): then the norm is affine.

    Returns:
        ``u`` (hidden_size,) float64 and ``a`` such that ``direction · norm(h) = u·h + a`` at
        ``state`` and wherever the scale is the same.

    Raises:
        InputError: ``norm`` is neither a LayerNorm nor an RMSNorm.
    """
    state = state.double()
    direction = direction.double()
    response = measure_norm(norm, state)
    numerator = response.numerator(state)
    written = copy.deepcopy(norm).double()(state[None])[0].double() - response.shift

    # One number leads from the numerator to what the norm writes. It is fitted rather than
    # computed, since norms name their epsilon differently.
    inverse_scale = (written @ numerator) / numerator.square().sum().clamp_min(1e-300)
    misfit = (written - inverse_scale * numerator).norm()
    if not misfit <= MISFIT * written.norm():
        raise InputError(
            f"found a {type(norm).__name__} as the norm, expected a LayerNorm or an RMSNorm: "
            "it cannot be linearised"
        )
    return inverse_scale * response.pull_back(direction), (response.shift @ direction).item()


@torch.no_grad()
def find_attention_norms(model: PreTrainedModel) -> list[nn.Module | None]:
    """For each block the norm whose output its attention reads; None if it reads the stream itself.

    The model runs over one token for this: which tensor is handed on tells more than names do, as
    some families have several norms in a block, and some none before the attention.
    """
    norms: list[nn.Module | None] = []
    outputs: list[tuple[nn.Module, object]] = []

    def keep_output(module: nn.Module, args: tuple, output: object) -> None:
        outputs.append((module, output))

    def find_source(module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        sources = [module for module, output in outputs if output is states]
        norms.append(sources[-1] if sources else None)
        outputs.clear()

    hooks = []
    for layer, block in enumerate(get_blocks(model)):
        attention = get_attention(model, layer)
        hooks += [
            child.register_forward_hook(keep_output)
            for child in block.children()
            if child is not attention
        ]
        hooks.append(attention.register_forward_pre_hook(find_source, with_kwargs=True))
    try:
        token = torch.zeros(1, 1, dtype=torch.int64, device=get_embedding_weight(model).device)
        model.eval().base_model(input_ids=token, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return norms
