"""Whether the Triton kernels of fused.py are let in: beside the plain form on each layer's own shape, they must be as near to float64
and no slower."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..checkpoint_code.ffn import KernelFFN
from .fused import Fused, fuse, reason_against_fused_gather, reason_against_fused_readout
from .measuring import interleaved

TOKENS = 1024
"""Read at once in the trial of a dense readout; a sparse one gathers for one token."""
MARGIN, FLOOR = 4.0, 1e-5
"""The worst relative error of any output or gradient may be this many times the plain form's, and this much more."""


def choose_kernels(model: Any, how: str, autocast: torch.dtype | None = None) -> dict[str, str]:
    """Whether the kernel readouts of ``model`` run by Triton kernels: ``never``; ``always``, InputError from a call that they cannot
    serve; or ``auto``: on a GPU, where a trial of a few seconds finds them as exact as the plain form and no slower.

    Args:
        autocast: the dtype that the model is going to be called under autocast with, if it is.

    Returns:
        by path, why a readout on a GPU is left without them.
    """
    if how == "always":
        fuse(model, required=True)
    elif how == "auto" and any(
        next(ffn.parameters()).is_cuda for ffn in model.kernel_ffns().values()
    ):
        return fuse_where_it_pays(model, autocast)
    return {}


def fuse_where_it_pays(
    model: Any, autocast: torch.dtype | None = None, tokens: int = TOKENS
) -> dict[str, str]:
    """Let the Triton kernels serve every readout of ``model`` that they are found right and no slower for; why not, by path, of the
    others. Readouts of one kind and size are tried once."""
    refused: dict[str, str] = {}
    tried: dict[tuple, str | None] = {}
    for path, ffn in model.kernel_ffns().items():
        weight = ffn.input_prototypes.weight
        kind = (
            str(ffn.config.settings),
            tuple(weight.shape),
            weight.dtype,
            weight.device,
            weight.requires_grad,
        )
        if kind not in tried:
            tried[kind] = reason_against_kernels(ffn, autocast, tokens)
        reason = tried[kind]
        ffn.fused = Fused() if reason is None else None
        if reason is not None:
            refused[path] = reason
    return refused


def reason_against_kernels(
    ffn: KernelFFN, autocast: torch.dtype | None = None, tokens: int = TOKENS
) -> str | None:
    """Why the Triton kernels are not to serve ``ffn``, or None. Its weights and gradients are left as they are."""
    sparse, weight = ffn.config.settings.sparse, ffn.input_prototypes.weight
    parameters = [] if sparse else [p for p in ffn.parameters() if p.requires_grad]
    device, before = weight.device, (ffn.fused, ffn.training)
    x = torch.randn(
        1,
        1 if sparse else tokens,
        ffn.config.hidden_size,
        generator=torch.Generator().manual_seed(0),
    )
    x = x.to(weight).requires_grad_(bool(parameters))
    gradient = torch.randn_like(x)

    def run(layer, x=x, gradient=gradient) -> list[Tensor]:
        with torch.set_grad_enabled(bool(parameters)):
            written = layer(x)
        asked = [x, *(p for p in layer.parameters() if p.requires_grad)] if parameters else []
        if not asked:
            return [written]
        found = torch.autograd.grad(
            written, asked, gradient.to(written.dtype), materialize_grads=True
        )
        return [written.detach(), *found]

    def with_kernels(fused):
        ffn.fused = fused
        return run(ffn)

    context = nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    try:
        ffn.eval()
        with context, torch.set_grad_enabled(bool(parameters)):
            reason = (reason_against_fused_gather if sparse else reason_against_fused_readout)(
                ffn, x
            )
            if reason is not None:
                return reason
            exact = copy.deepcopy(ffn).double()
            exact.fused = None
            with torch.autocast(device.type, enabled=False):
                wanted = run(
                    exact, x.detach().double().requires_grad_(bool(parameters)), gradient.double()
                )
            plain, fused = (
                _worst(with_kernels(kind), wanted) for kind in (None, Fused(required=True))
            )
            if not fused <= MARGIN * plain + FLOOR:
                return f"further from float64 than the plain form, {fused:.1e} against {plain:.1e}"
            work = {
                "plain": lambda: with_kernels(None),
                "fused": lambda: with_kernels(Fused(required=True)),
            }
            times = interleaved(work, 3, device)
            if times["fused"]["median"] > times["plain"]["median"]:
                return f"slower than the plain form, {times['fused']['median']:.1e} s against {times['plain']['median']:.1e} s"
            return None
    except Exception as error:  # whatever Triton or a driver raises: the plain form needs neither
        return f"not to be run here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        ffn.fused = before[0]
        ffn.train(before[1])


def _worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error; NaN if one is."""
    return (
        torch.stack(
            [(a.double() - b).norm() / b.norm() for a, b in zip(found, wanted) if b.norm() > 0]
        )
        .max()
        .item()
    )
