"""Kernel readouts on a GPU by Triton kernels: which calls they serve, and how.

They are off until :func:`fuse` is called, or trial.py lets them in. What an H100 said of them is
in docs/pages/results/gpu.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint_code.compat import are_function_transforms_active
from ..checkpoint_code.errors import InputError
from ..checkpoint_code.ffn import KernelFFN
from ..checkpoint_code.knots import KnotStep
from ..checkpoint_code.linears import is_plain, lay_out_by_prototypes
from ..checkpoint_code.modeling import KernelModelMixin
from ..checkpoint_code.one_pass import mix_dense_yat
from ..checkpoint_code.plan import (
    linears_of,
    reason_against_dense_yat,
    reason_against_knots,
    reason_against_plain_weights,
)
from ..checkpoint_code.tied import TiedKernelFFN
from .dense_mixture import fused_mixture
from .optional_triton import INTERPRETED, triton
from .sparse_mixture import active, gather
from .tied_kernels import TRITON_STEP

FEW = 8
"""Tokens up to which a sparse readout without gradients gathers the active output prototypes."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read and write."""


@dataclass(frozen=True)
class Fused:
    """What a KernelFFN or TiedKernelFFN asks first when it is in ``ffn.fused``."""

    required: bool = False
    """Whether a call that the Triton kernels cannot serve is an error; otherwise the layer goes on
    without them."""

    def reason_against_readout(self, ffn: KernelFFN, hidden_states: Tensor) -> str | None:
        """Why they do not compute the output of ``ffn`` at ``hidden_states``; None if they do.

        Raises:
            InputError: ``required``, and neither this nor, for a sparse layer, the gather can serve
            the call.
        """
        if not (self.required or hidden_states.is_cuda):
            return "a tensor off the GPU, expected one on it"
        reason = reason_against_fused_readout(ffn, hidden_states)
        if reason and self.required and reason_against_fused_gather(ffn, hidden_states):
            raise InputError(
                f"found {reason}: call it so, or fuse without required, which steps aside"
            )
        return reason

    def reason_against_sum(self, ffn: KernelFFN, hidden_states: Tensor) -> str | None:
        """Why they do not sum the output prototypes of ``ffn``; None if they do, of few tokens the
        active ones alone."""
        if not (self.required or hidden_states.is_cuda):
            return "a tensor off the GPU, expected one on it"
        return reason_against_fused_gather(ffn, hidden_states)

    def readout(self, ffn: KernelFFN, hidden_states: Tensor) -> Tensor:
        """The output (..., d) of ``ffn`` before dropout, where nothing is against it."""
        return fused_readout(ffn, hidden_states)

    def mixture(self, ffn: KernelFFN, coefficients: Tensor) -> Tensor:
        """Σ c_i v_i + b_out (..., d) of few tokens by the active output prototypes alone, where
        nothing is against it."""
        linear = ffn.output_prototypes
        if not (torch.compiler.is_compiling() or linear.weight.T.is_contiguous() or ffn.training):
            lay_out_by_prototypes(linear)
        return gathered(ffn, coefficients) + linear.bias

    def reason_against_tied(self, ffn: TiedKernelFFN, hidden_states: Tensor) -> str | None:
        """Why they do not serve ``ffn``, whose rows are tied; None if they do.

        Raises:
            InputError: ``required``, and they cannot serve the call.
        """
        if not (self.required or hidden_states.is_cuda):
            return "a tensor off the GPU, expected one on it"
        reason = reason_against_fused_tied(ffn, hidden_states)
        if reason and self.required:
            raise InputError(
                f"found {reason}: call it so, or fuse without required, which steps aside"
            )
        return reason

    def knot_step(self) -> KnotStep:
        """What they compute of tied rows with knots."""
        return TRITON_STEP


def fuse(model: PreTrainedModel, required: bool = False) -> None:
    """Let every kernel readout of ``model`` run by Triton kernels where they can serve a call.

    ``ffn.fused = None`` forbids it again. Nothing of it is saved.

    Args:
        model: a converted one.
        required: raise InputError in a call that they cannot serve.
    """
    for ffn in cast(KernelModelMixin, model).kernel_ffns().values():
        if isinstance(ffn, (KernelFFN, TiedKernelFFN)):
            ffn.fused = Fused(required)


def fused_readout(ffn: KernelFFN, hidden_states: Tensor) -> Tensor:
    """The output (..., d) of ``ffn`` before dropout, where nothing is against it."""
    return mix_dense_yat(ffn, hidden_states, fused_mixture)


def gathered(ffn: KernelFFN, coefficients: Tensor) -> Tensor:
    """Σ c_i v_i (..., d), without the output bias, where nothing is against it."""
    flat = coefficients.reshape(-1, coefficients.shape[-1])
    indices, counts = active(flat)
    active_coefficients = flat.gather(1, indices.clamp_min(0))
    written = gather(active_coefficients, indices, counts, ffn.output_prototypes.weight)
    return written.unflatten(0, coefficients.shape[:-1])


def reason_against_fused_readout(ffn: KernelFFN, x: Tensor) -> str | None:
    """Why ``ffn`` cannot be fused at ``x``: what was found and what is expected; None if it can."""
    simplex = ffn.config.settings.simplex
    if simplex != "softmax":
        return (
            f"simplex {simplex!r} with {_tokens(x)} tokens, expected 'softmax', or up to {FEW} "
            "tokens without gradients"
        )
    reason = reason_against_dense_yat(ffn)
    if reason is not None:
        return f"{reason} for the fused readout"
    return _against(x, linears_of(ffn))


def reason_against_fused_gather(ffn: KernelFFN, x: Tensor) -> str | None:
    """Why few tokens of ``ffn`` cannot be summed from the active output prototypes alone; None if
    they can."""
    if (
        ffn.config.settings.simplex == "softmax"
        or torch.is_grad_enabled()
        or not 0 < _tokens(x) <= FEW
    ):
        return "another call"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    if are_function_transforms_active():
        return "a transform of torch.func, expected none"
    reason = reason_against_plain_weights([ffn.output_prototypes])
    return reason or _against(x, [ffn.output_prototypes])


def reason_against_fused_tied(ffn: TiedKernelFFN, x: Tensor) -> str | None:
    """Why ``ffn``, whose rows are tied, cannot be fused at ``x``; None if it can."""
    reason = reason_against_knots(ffn)
    if reason is not None:
        return f"{reason} for the fused step"
    linears = [ffn.input_prototypes, ffn.output_prototypes]
    if ffn.multiplies_by_up:
        linears.append(ffn.value_proj)
    return _against(x, [linear for linear in linears if is_plain(linear)])


def _against(x: Tensor, linears: Sequence[nn.Linear]) -> str | None:
    """Why no kernel runs at ``x`` over the weights of ``linears``; None if one does."""
    if triton is None:
        return "no Triton, expected triton 3.6 or newer (pip install triton) for the fused readout"
    if not _runs(x.device.type, x.device.index):
        return (
            f"device {x.device}, expected a CUDA GPU of compute capability 8.0 or newer for the "
            "fused readout"
        )
    dtypes = {x.dtype, *(linear.weight.dtype for linear in linears)}
    are_mixed = len(dtypes) > 1 and not torch.is_autocast_enabled(x.device.type)
    if are_mixed or not dtypes <= set(DTYPES):
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return (
            f"{names}, expected one of float32, bfloat16 and float16, for input and weights alike, "
            "for the fused readout"
        )
    return None


@torch.compiler.assume_constant_result
def _runs(device: str, index: int | None) -> bool:
    """Whether kernels run on a device of this type and number."""
    return _find_capability(device, index)


@cache
def _find_capability(device: str, index: int | None) -> bool:
    """The same, found once."""
    if device == "cuda":
        return torch.cuda.get_device_capability(index) >= (8, 0)
    return device == "cpu" and INTERPRETED


def _tokens(x: Tensor) -> int:
    """How many tokens ``x`` (..., d) has."""
    return x.numel() // x.shape[-1]
