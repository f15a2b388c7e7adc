"""The tuned lens: one affine map per layer from the residual stream there to the one before the final norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint_code.errors import InputError
from ..families.hooks import capture_inputs_and_outputs
from ..storage.files import replace_file
from .attribution import final_norm
from .tracing import family_of

PULL = 0.01
"""Ridge toward the logit lens (the identity), as a share of the states' mean square."""


@dataclass
class TunedLens:
    """``logits_l(h) = unembed(norm(A_l h + b_l))`` (Belrose et al. 2023, arXiv:2303.08112), with A_l, b_l the least-squares map to
    the final state in place of the one that minimises KL; the logit lens is A = 1, b = 0."""

    maps: Tensor
    """(layers, hidden_size, hidden_size) float32: A_l."""
    biases: Tensor
    """(layers, hidden_size) float32: b_l."""

    def directions(self, layer: int, directions: Tensor) -> Tensor:
        """What becomes of ``directions`` (n, hidden_size) written in block ``layer``: (n, hidden_size)."""
        return directions @ self.maps[layer].to(directions).T

    def logits(self, model: Any, layer: int, states: Tensor) -> Tensor:
        """(..., vocabulary) at ``states`` (..., hidden_size) after block ``layer``."""
        through = states.float() @ self.maps[layer].T + self.biases[layer]
        return model.get_output_embeddings()(final_norm(model)(through.to(states.dtype)))

    def save(self, file: Path | str) -> None:
        """As safetensors."""
        tensors = {"maps": self.maps.contiguous(), "biases": self.biases.contiguous()}
        with replace_file(file) as beside:
            save_file(tensors, beside)

    @classmethod
    def load(cls, file: Path | str) -> TunedLens:
        """InputError if ``file`` holds no tuned lens."""
        try:
            with safe_open(file, "pt") as tensors:
                maps, biases = tensors.get_tensor("maps"), tensors.get_tensor("biases")
        except Exception as error:  # safetensors raises several kinds for a file that is none
            raise InputError(
                f"found no tuned lens in {file} ({error}), expected one made by TunedLens.save: fit one"
            ) from error
        if maps.ndim != 3 or maps.shape[1] != maps.shape[2] or biases.shape != maps.shape[:2]:
            raise InputError(
                f"found maps of shape {tuple(maps.shape)} in {file}, expected (layers, d, d): fit the lens again"
            )
        return cls(maps, biases)


@torch.no_grad()
def fit_lens(model: Any, ids: Tensor, batch_rows: int = 8) -> TunedLens:
    """Fit on text, ``ids`` (rows, length), by ridge regression toward the identity; moments are accumulated batch by batch, so
    memory does not grow with the text. A few tokens per hidden dimension are enough."""
    moments: list[list[Tensor]] = []
    count = 0
    for states in _states(model, ids, batch_rows):
        final = states[-1]
        if not moments:
            moments = [
                [torch.zeros(final.shape[1], final.shape[1], dtype=torch.float64) for _ in range(2)]
                for _ in states
            ]
            sums = [torch.zeros(final.shape[1], dtype=torch.float64) for _ in states]
        for (square, cross), total, state in zip(moments, sums, states):
            square += state.T @ state
            cross += state.T @ (final - state)
            total += state.sum(0)
        count += len(final)
    maps, biases = [], []
    for (square, cross), total in zip(moments, sums):
        mean, gap = total / count, (sums[-1] - total) / count
        covariance = square / count - mean.outer(mean)
        size = covariance.diagonal().mean()
        change = torch.linalg.solve(
            covariance + PULL * size * torch.eye(len(mean), dtype=torch.float64),
            cross / count - mean.outer(gap),
        )
        maps.append(torch.eye(len(mean), dtype=torch.float64) + change.T)
        biases.append(gap - mean @ change)
    return TunedLens(torch.stack(maps).float(), torch.stack(biases).float())


@torch.no_grad()
def lens_kl(model: Any, lens: TunedLens | None, ids: Tensor, batch_rows: int = 8) -> list[float]:
    """Mean KL(model ‖ lens) in nats per token after each block, over text ``ids`` (rows, length); None: the logit lens."""
    totals: list[float] = []
    count = 0
    for states in _states(model, ids, batch_rows):
        if not totals:
            totals = [0.0] * len(states)
        final = _read(model, None, 0, states[-1]).log_softmax(-1)
        for layer, state in enumerate(states):
            guess = _read(model, lens, layer, state).log_softmax(-1)
            totals[layer] += (final.exp() * (final - guess)).sum().item()
        count += len(final)
    return [total / count for total in totals]


def _read(model: Any, lens: TunedLens | None, layer: int, state: Tensor) -> Tensor:
    state = state.to(model.get_output_embeddings().weight.dtype)
    logits = (
        model.get_output_embeddings()(final_norm(model)(state))
        if lens is None
        else lens.logits(model, layer, state)
    )
    return logits.float()


def _states(model: Any, ids: Tensor, batch_rows: int) -> Iterator[list[Tensor]]:
    """The residual stream after every block, (tokens, hidden_size) float64 on the CPU, batch by batch."""
    blocks = dict(model.base_model.get_submodule(family_of(model).layers).named_children())
    device = model.get_input_embeddings().weight.device
    for batch in ids.split(batch_rows):
        with capture_inputs_and_outputs(blocks) as seen:
            model.base_model(input_ids=batch.to(device), use_cache=False)
        outputs = [seen[name][1] for name in blocks]
        yield [
            (out[0] if isinstance(out, tuple) else out).flatten(0, 1).double().cpu()
            for out in outputs
        ]
