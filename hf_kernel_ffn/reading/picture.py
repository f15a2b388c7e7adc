"""The paired picture of a layer: the plane of its inputs, and the plane of its outputs.

The page of :mod:`.report` evaluates the kernel exactly at any point of the first.
"""

from __future__ import annotations

import base64

import torch
from torch import Tensor, nn

from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.linears import get_effective_weight
from ..checkpoint_code.record import Readout
from .model_parts import has_tied_rows, is_kernel_ffn

KERNELS = ("exponential", "gaussian", "imq", "yat", "half-yat", "exponential-yat")
"""Kernels that the page can evaluate."""
SIMPLEX_MAPS = ("softmax", "top-k", "threshold", "sparsemax", "entmax-1.5")
"""Simplex maps that the page can evaluate."""


def make_picture(ffn: nn.Module, inputs: Tensor, record: Readout, room: int) -> dict:
    """Draw the FFN ``ffn`` at its ``inputs`` (tokens, hidden_size), as JSON types.

    Args:
        record: of ``ffn`` at ``inputs``.
        room: prototypes that the page has place for.

    Returns:
        The picture; of a layer that has none, the ``reason``.
    """
    if has_tied_rows(ffn):
        return {
            "reason": "The rows are tied: a unit is a sum of kernels in its own plane, "
            "which the page cannot evaluate."
        }
    if not is_kernel_ffn(ffn):
        return {
            "reason": "This FFN is no kernel readout: its coefficients are signed and have no hull."
        }
    reason = _why_there_is_none(ffn, record, room)
    if reason is not None:
        return {"reason": reason}

    settings = ffn.config.settings
    states = inputs.double()
    dictionary = record.dictionary.double()
    coefficients = record.coefficients.double()
    mean, axes, explained = find_plane(states)
    _, output_axes, _ = find_plane(coefficients @ dictionary)

    total = coefficients.sum(-1, keepdim=True)
    shares = coefficients / total.where(total > 0, 1.0)
    is_threshold = settings.simplex == "threshold"
    is_plain = settings.coefficients_are_kernel
    has_scale = settings.intensity == "mass"
    scale = ffn.positive("scale") if has_scale else ffn.config.reference.get("scale", 1.0)
    return {
        "kernel": settings.kernel,
        "parameters": {name: float(value) for name, value in ffn.kernel_parameters().items()},
        "simplex": settings.simplex,
        "topK": ffn.config.settings.top_k,
        "logThreshold": float(ffn.log_threshold()) if is_threshold else None,
        "temperature": 1.0 if is_plain else float(ffn.positive("temperature")),
        "intensity": settings.intensity,
        "scale": float(scale),
        "gate": _project_gate(ffn, inputs, mean, axes) if settings.intensity == "gate" else None,
        "mean": [float(mean @ mean), float(mean @ axes[0]), float(mean @ axes[1])],
        "explained": explained,
        "input": encode_floats(_project_prototypes(ffn, inputs, mean, axes)),
        "tokens": encode_floats((states - mean) @ axes.T),
        "output": encode_floats(dictionary @ output_axes.T),
        "points": encode_floats(shares @ dictionary @ output_axes.T),
    }


def _why_there_is_none(ffn: KernelFFN, record: Readout, room: int) -> str | None:
    """Why the page cannot show ``ffn``; None if it can."""
    settings = ffn.config.settings
    if settings.values == "gated":
        return (
            "The values are gated: each output prototype changes with the input, so there is no "
            "fixed hull."
        )
    if settings.kernel not in KERNELS:
        return f"The page cannot evaluate the kernel {settings.kernel!r}."
    if settings.simplex not in SIMPLEX_MAPS:
        return f"The page cannot evaluate the simplex map {settings.simplex!r}."
    if len(record.dictionary) > room:
        return "Left out to keep the file small: the layers before it have many prototypes."
    return None


def _project_prototypes(ffn: KernelFFN, inputs: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """(P, 5): w·mean, w along both axes, b and ‖w‖² of every prototype, which is all a kernel
    needs."""
    weight, bias = get_effective_weight(ffn.input_prototypes, inputs)
    rows = weight.double()
    columns = [
        rows @ mean,
        rows @ axes[0],
        rows @ axes[1],
        torch.zeros_like(rows[:, 0]) if bias is None else bias.double(),
        rows.square().sum(-1),
    ]
    return torch.stack(columns, 1)


def _project_gate(ffn: KernelFFN, inputs: Tensor, mean: Tensor, axes: Tensor) -> list[float]:
    """The gate's logit at the mean, and how it changes along both axes."""
    weight, bias = get_effective_weight(ffn.gate, inputs)
    at_mean, *along_axes = (weight.double()[0] @ torch.stack([mean, *axes], 1)).tolist()
    shift = 0.0 if bias is None else bias.double()[0].item()
    return [at_mean + shift, *along_axes]


def find_plane(states: Tensor) -> tuple[Tensor, Tensor, float]:
    """The plane of ``states`` (rows, d): mean (d,), first two principal directions (2, d), and
    their share of the variance."""
    mean = states.mean(0)
    # Two rows of zeros: two directions even of one row.
    padded = torch.cat([states - mean, states.new_zeros(2, states.shape[1])])
    _, lengths, axes = torch.linalg.svd(padded, full_matrices=False)
    variance = lengths.square()
    explained = variance[:2].sum() / variance.sum().clamp_min(1e-300)
    return mean, axes[:2], float(explained)


def encode_floats(numbers: Tensor) -> str:
    """Little-endian float32 numbers, row by row, in base64."""
    return base64.b64encode(numbers.detach().cpu().numpy().astype("<f4").tobytes()).decode()
