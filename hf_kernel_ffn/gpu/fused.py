"""Kernel readouts on a GPU by Triton kernels: which calls they serve, and how.

Checked by Triton's interpreter and compiler, not run or measured on a GPU. They are off until
:func:`fuse` is called, or trial.py lets them in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.kernels import HalfYat, Yat
from ..checkpoint_code.linears import is_plain, lay_out_by_prototypes
from .dense_mixture import fused_mixture
from .sparse_mixture import active, gather
from .triton_kernels import INTERPRETED, triton

FEW = 8
"""Tokens up to which a sparse readout without gradients gathers the active output prototypes."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read and write."""


@dataclass(frozen=True)
class Fused:
    """What a KernelFFN asks first when it is in ``ffn.fused``."""

    required: bool = False
    """Whether a call that the Triton kernels cannot serve is an error; otherwise the layer goes on without them."""

    def readout(self, ffn: KernelFFN, hidden_states: Tensor) -> Tensor | None:
        """The output (..., d) of ``ffn`` before dropout, or None: by the plain form, or :meth:`mixture`.

        Raises:
            InputError: ``required``, and neither this nor, for a sparse layer, the gather can serve the call.
        """
        if not (self.required or hidden_states.is_cuda):
            return None
        reason = reason_against_fused_readout(ffn, hidden_states)
        if reason is None:
            return fused_readout(ffn, hidden_states)
        if self.required and reason_against_fused_gather(ffn, hidden_states):
            raise InputError(
                f"found {reason}: call it so, or fuse without required, which steps aside"
            )
        return None

    def mixture(self, ffn: KernelFFN, coefficients: Tensor) -> Tensor | None:
        """Σ c_i v_i + b_out (..., d) of few tokens by the active output prototypes alone, or None: by the plain form."""
        if not (self.required or coefficients.is_cuda) or reason_against_fused_gather(
            ffn, coefficients
        ):
            return None
        linear = ffn.output_prototypes
        if not (torch.compiler.is_compiling() or linear.weight.T.is_contiguous() or ffn.training):
            lay_out_by_prototypes(linear)
        return gathered(ffn, coefficients) + linear.bias


def fuse(model: Any, required: bool = False) -> None:
    """Let every kernel readout of ``model`` run by the Triton kernels of this file where they can serve a call; ``required``: raise
    InputError in a call that they cannot. ``ffn.fused = None`` forbids it again. Nothing of it is saved."""
    for ffn in model.kernel_ffns().values():
        ffn.fused = Fused(required)


def fused_readout(ffn, hidden_states):
    """The output (..., d) of ``ffn`` before dropout, where nothing is against it."""
    settings, device = ffn.config.settings, hidden_states.device.type
    mix = (
        torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device)
        else hidden_states.dtype
    )
    first, second, up = (
        ffn.input_prototypes,
        ffn.output_prototypes,
        ffn.value_proj if settings.values == "gated" else None,
    )
    written = fused_mixture(
        hidden_states.reshape(-1, hidden_states.shape[-1]), first.weight, first.bias, second.weight, ffn.positive("epsilon"),
        ffn.positive("scale" if settings.coefficients_are_kernel else "temperature"), None if up is None else up.weight,
        None if up is None else up.bias, isinstance(ffn.kernel, HalfYat), mix, ffn.activation_bytes,
        not settings.coefficients_are_kernel,
    ).unflatten(0, hidden_states.shape[:-1])  # fmt: skip
    if settings.intensity == "gate":
        loud = (
            torch.nn.functional.softplus(ffn.gate(hidden_states).float()) * ffn.reference["scale"]
        )
        written = (written * loud).to(mix)
    return written + second.bias.to(mix)


def gathered(ffn, coefficients):
    """Σ c_i v_i (..., d), without the output bias, where nothing is against it."""
    flat = coefficients.reshape(-1, coefficients.shape[-1])
    indices, counts = active(flat)
    written = gather(
        flat.gather(1, indices.clamp_min(0)), indices, counts, ffn.output_prototypes.weight
    )
    return written.unflatten(0, coefficients.shape[:-1])


def reason_against_fused_readout(ffn, x) -> str | None:
    """Why ``ffn`` cannot be fused at ``x``: what was found and what is expected; None if it can."""
    settings = ffn.config.settings
    if settings.simplex != "softmax":
        return f"simplex {settings.simplex!r} with {_tokens(x)} tokens, expected 'softmax', or up to {FEW} tokens without gradients"
    if type(ffn.kernel) not in (Yat, HalfYat):
        return f"kernel {settings.kernel!r}, expected 'yat' or 'half-yat' for the fused readout"
    if settings.intensity == "mass" and not settings.coefficients_are_kernel:
        return f"intensity 'mass' at temperature {settings.temperature}, expected temperature 1 for the fused readout"
    if ffn.training and ffn.config.hidden_dropout:
        return "dropout of hidden units, expected none or evaluation for the fused readout"
    linears = [
        ffn.input_prototypes,
        ffn.output_prototypes,
        *([ffn.value_proj] if settings.values == "gated" else []),
    ]
    return _against(x, linears)


def reason_against_fused_gather(ffn, x) -> str | None:
    if (
        ffn.config.settings.simplex == "softmax"
        or torch.is_grad_enabled()
        or not 0 < _tokens(x) <= FEW
    ):
        return "another call"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    return _against(x, [ffn.output_prototypes])


def _against(x, linears) -> str | None:
    if triton is None:
        return "no Triton, expected triton 3.6 or newer (pip install triton) for the fused readout"
    if not _runs(x.device.type, x.device.index):
        return f"device {x.device}, expected a CUDA GPU of compute capability 8.0 or newer for the fused readout"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func, expected none around the fused readout"
    if not all(is_plain(linear) and linear.bias is not None for linear in linears):
        return "an adapter, quantised weight, offloading, hook or missing bias, expected plain linear modules for the fused readout"
    dtypes = {x.dtype, *(linear.weight.dtype for linear in linears)}
    if not dtypes <= set(DTYPES) or (
        len(dtypes) > 1 and not torch.is_autocast_enabled(x.device.type)
    ):
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"{names}, expected one of float32, bfloat16 and float16, for input and weights alike, for the fused readout"
    return None


@torch.compiler.assume_constant_result
def _runs(device, index) -> bool:
    if device == "cuda":
        return torch.cuda.get_device_capability(index) >= (8, 0)
    return device == "cpu" and INTERPRETED


def _tokens(x):
    return x.numel() // x.shape[-1]
