"""The tuned lens: per layer one affine map from the residual stream to the one before the final
norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint_code.errors import InputError
from ..families.hooks import capture_inputs_and_outputs
from ..storage.files import replace_file, save_tensors
from .model_parts import (
    get_blocks,
    get_embedding_weight,
    get_family,
    get_final_norm,
    get_unembedding,
)

PULL = 0.01
"""Ridge toward the logit lens (the identity), as a share of the states' mean square."""
ROUNDING = 1e-3
"""Largest difference between the model's logits and those read off its final state that passes for
rounding, over the largest logit."""


@dataclass
class TunedLens:
    """``logits_l(h) = unembed(norm(A_l h + b_l))`` (Belrose et al. 2023, arXiv:2303.08112).

    A_l and b_l are the least-squares map to the final state, in place of the one that minimises
    KL. The logit lens is A = 1, b = 0.
    """

    maps: Tensor
    """(layers, hidden_size, hidden_size) float32: A_l."""
    biases: Tensor
    """(layers, hidden_size) float32: b_l."""

    def directions(self, layer: int, directions: Tensor) -> Tensor:
        """What becomes of ``directions`` (n, hidden_size) written in block ``layer``, same
        shape."""
        return directions @ self.maps[layer].to(directions).T

    def logits(self, model: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
        """(..., vocabulary) at ``states`` (..., hidden_size) after block ``layer``."""
        mapped = states.float() @ self.maps[layer].T + self.biases[layer]
        return _unembed(model, mapped.to(states.dtype))

    def save(self, file: Path | str) -> None:
        """Write the lens to ``file`` as safetensors."""
        tensors = {"maps": self.maps.contiguous(), "biases": self.biases.contiguous()}
        with replace_file(file) as beside:
            save_tensors(tensors, beside)

    @classmethod
    def load(cls, file: Path | str) -> TunedLens:
        """Read a lens from ``file``; InputError if it holds none."""
        try:
            with safe_open(file, "pt") as tensors:
                maps = tensors.get_tensor("maps")
                biases = tensors.get_tensor("biases")
        except Exception as error:  # safetensors raises several kinds for a file that is none
            raise InputError(
                f"found no tuned lens in {file} ({error}), expected one made by TunedLens.save: "
                "fit one"
            ) from error
        if maps.ndim != 3 or maps.shape[1] != maps.shape[2] or biases.shape != maps.shape[:2]:
            raise InputError(
                f"found maps of shape {tuple(maps.shape)} in {file}, expected (layers, d, d): "
                "fit the lens again"
            )
        return cls(maps, biases)


class _Moments:
    """Sums over tokens of one layer's states and of their gap to the final state, in float64."""

    def __init__(self, hidden_size: int):
        self.square = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        self.cross = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        self.states = torch.zeros(hidden_size, dtype=torch.float64)
        self.count = 0

    def add(self, states: Tensor, final: Tensor) -> None:
        """Take in ``states`` and ``final`` (tokens, hidden_size)."""
        self.square += states.T @ states
        self.cross += states.T @ (final - states)
        self.states += states.sum(0)
        self.count += len(states)

    def fit(self, final_mean: Tensor) -> tuple[Tensor, Tensor]:
        """A and b of the ridge regression toward the identity; ``final_mean`` (hidden_size,)."""
        mean = self.states / self.count
        gap = final_mean - mean
        covariance = self.square / self.count - mean.outer(mean)
        identity = torch.eye(len(mean), dtype=torch.float64)
        ridge = PULL * covariance.diagonal().mean() * identity
        change = torch.linalg.solve(covariance + ridge, self.cross / self.count - mean.outer(gap))
        return identity + change.T, gap - mean @ change


@torch.no_grad()
def fit_lens(model: PreTrainedModel, ids: Tensor, batch_rows: int = 8) -> TunedLens:
    """Fit a lens on text by ridge regression toward the identity.

    Moments are accumulated batch by batch, so memory does not grow with the text. A few tokens per
    hidden dimension are enough.

    Args:
        ids: (rows, length) token ids.
        batch_rows: rows that the model reads at once.

    Raises:
        InputError: the model's logits are not those of its final norm and unembedding.
    """
    require_plain_logits(model, ids[:1])
    moments: list[_Moments] = []
    for states in _read_states(model, ids, batch_rows):
        if not moments:
            moments = [_Moments(layer_states.shape[1]) for layer_states in states]
        for moment, layer_states in zip(moments, states, strict=True):
            moment.add(layer_states, states[-1])

    final_mean = moments[-1].states / moments[-1].count
    maps, biases = zip(*(moment.fit(final_mean) for moment in moments), strict=True)
    return TunedLens(torch.stack(maps).float(), torch.stack(biases).float())


@torch.no_grad()
def lens_kl(
    model: PreTrainedModel, lens: TunedLens | None, ids: Tensor, batch_rows: int = 8
) -> list[float]:
    """Measure the mean KL(model ‖ lens) in nats per token after each block.

    Args:
        lens: None for the logit lens.
        ids: (rows, length) token ids.
        batch_rows: rows that the model reads at once.

    Raises:
        InputError: the model's logits are not those of its final norm and unembedding.
    """
    require_plain_logits(model, ids[:1])
    totals: list[float] = []
    count = 0
    for states in _read_states(model, ids, batch_rows):
        totals = totals or [0.0] * len(states)
        final = _read_logits(model, None, 0, states[-1]).log_softmax(-1)
        for layer, layer_states in enumerate(states):
            guess = _read_logits(model, lens, layer, layer_states).log_softmax(-1)
            totals[layer] += (final.exp() * (final - guess)).sum().item()
        count += len(final)
    return [total / count for total in totals]


@torch.no_grad()
def require_plain_logits(model: PreTrainedModel, ids: Tensor) -> None:
    """InputError unless the logits at ``ids`` (rows, length) are what the final state says.

    Some models scale or cap their logits after the unembedding: a lens would then show other
    probabilities than the model has.
    """
    last_block = {"last": get_blocks(model)[-1]}
    ids = ids.to(get_embedding_weight(model).device)
    with capture_inputs_and_outputs(last_block) as captured:
        logits = model.eval()(input_ids=ids, use_cache=False).logits.float()
    read_off = _unembed(model, _select_states(captured["last"][1])).float()

    error = ((logits - read_off).abs().max() / logits.abs().max().clamp_min(1e-30)).item()
    if not error <= ROUNDING:
        raise InputError(
            f"found logits that differ by {error:.2g} of the largest from the unembedding of the "
            f"normalised final state, expected rounding: a {get_family(model).model_type!r} scales "
            "or caps its logits, which no lens here does"
        )


def _unembed(model: PreTrainedModel, states: Tensor) -> Tensor:
    """(..., vocabulary) at ``states`` (..., hidden_size) before the final norm."""
    head = cast(nn.Module, model.get_output_embeddings())
    return head(get_final_norm(model)(states))


def _read_logits(
    model: PreTrainedModel, lens: TunedLens | None, layer: int, states: Tensor
) -> Tensor:
    """(tokens, vocabulary) float32 that ``lens`` reads off ``states`` after block ``layer``."""
    states = states.to(get_unembedding(model).dtype)
    logits = _unembed(model, states) if lens is None else lens.logits(model, layer, states)
    return logits.float()


def _read_states(model: PreTrainedModel, ids: Tensor, batch_rows: int) -> Iterator[list[Tensor]]:
    """The residual stream after every block, (tokens, hidden_size) float64 on the CPU, by
    batches."""
    blocks = {str(layer): block for layer, block in enumerate(get_blocks(model))}
    device = get_embedding_weight(model).device
    for batch in ids.split(batch_rows):
        with capture_inputs_and_outputs(blocks) as captured:
            model.base_model(input_ids=batch.to(device), use_cache=False)
        yield [_select_states(captured[name][1]).flatten(0, 1).double().cpu() for name in blocks]


def _select_states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """(rows, length, hidden_size) of a block's output, which may have more than the states."""
    return output[0] if isinstance(output, tuple) else output
