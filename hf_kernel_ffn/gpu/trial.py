"""Whether the Triton kernels are let in: beside the plain form on each layer's own shape, they must
be as near to float64 and no slower."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint_code.modeling import KernelModelMixin
from ..checkpoint_code.tied import AnyKernelFFN, TiedKernelFFN
from .fused import (
    Fused,
    fuse,
    reason_against_fused_gather,
    reason_against_fused_readout,
    reason_against_fused_tied,
)
from .measuring import interleaved

TOKENS = 1024
"""Read at once in the trial of a dense readout; a sparse one gathers for one token."""
MARGIN = 4.0
"""How many times the plain form's worst relative error, of any output or gradient, theirs may be:
sums in another order differ by as much."""
FLOOR = 1e-5
"""How much more it may be whatever the plain form's is, which may be next to nothing."""
REPEATS = 3
"""Rounds of timing, enough to tell a kernel that is clearly slower."""
REASON_LENGTH = 200
"""Letters that are kept of what Triton or a driver says."""


def choose_kernels(
    model: PreTrainedModel, how: str, autocast: torch.dtype | None = None
) -> dict[str, str]:
    """Decide whether the kernel readouts of ``model`` run by Triton kernels.

    Args:
        how: ``never``; ``always``, with an InputError from a call that they cannot serve; or
            ``auto``: on a GPU, where a trial of a few seconds finds them as exact as the plain form
            and no slower.
        autocast: the dtype that the model is going to be called under autocast with, if it is.

    Returns:
        by path, why a readout on a GPU is left without them.
    """
    if how == "always":
        fuse(model, required=True)
    elif how == "auto" and any(
        next(ffn.parameters()).is_cuda for ffn in _kernel_ffns(model).values()
    ):
        return fuse_where_it_pays(model, autocast)
    return {}


def fuse_where_it_pays(
    model: PreTrainedModel, autocast: torch.dtype | None = None, tokens: int = TOKENS
) -> dict[str, str]:
    """Let the Triton kernels serve every readout of ``model`` that they are found right and no
    slower for. Readouts of one kind and size are tried once.

    Returns:
        by path, why not the others.
    """
    refused: dict[str, str] = {}
    tried: dict[tuple, str | None] = {}
    for path, ffn in _kernel_ffns(model).items():
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
    ffn: AnyKernelFFN, autocast: torch.dtype | None = None, tokens: int = TOKENS
) -> str | None:
    """Find why the Triton kernels are not to serve ``ffn``, or None. Its weights and gradients are
    left as they are."""
    trial = _Trial(ffn, tokens)
    device = trial.inputs.device
    fused_before = ffn.fused
    was_training = ffn.training
    context = nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    try:
        ffn.eval()
        with context, torch.set_grad_enabled(trial.has_gradients):
            return trial.reason_against_call() or trial.reason_by_error() or trial.reason_by_time()
    except Exception as error:  # whatever Triton or a driver raises: the plain form needs neither
        reason = " ".join(str(error).split())[:REASON_LENGTH]
        return f"not to be run here: {type(error).__name__}: {reason}"
    finally:
        ffn.fused = fused_before
        ffn.train(was_training)


class _Trial:
    """The same call of one readout by the plain form and by the Triton kernels."""

    def __init__(self, ffn: AnyKernelFFN, tokens: int):
        self.ffn = ffn
        self.is_sparse = ffn.config.settings.sparse
        trained = [parameter for parameter in ffn.parameters() if parameter.requires_grad]
        self.has_gradients = bool(trained) and not self.is_sparse
        shape = (1, 1 if self.is_sparse else tokens, ffn.config.hidden_size)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.inputs = x.to(ffn.input_prototypes.weight).requires_grad_(self.has_gradients)
        self.gradient = torch.randn_like(self.inputs)

    def reason_against_call(self) -> str | None:
        """Why the kernels cannot serve the call."""
        if isinstance(self.ffn, TiedKernelFFN):
            return reason_against_fused_tied(self.ffn, self.inputs)
        if self.is_sparse:
            return reason_against_fused_gather(self.ffn, self.inputs)
        return reason_against_fused_readout(self.ffn, self.inputs)

    def reason_by_error(self) -> str | None:
        """Compare outputs and gradients with those in float64."""
        exact = copy.deepcopy(self.ffn).double()
        exact.fused = None
        x = self.inputs.detach().double().requires_grad_(self.has_gradients)
        with torch.autocast(x.device.type, enabled=False):
            expected = self._run(exact, x, self.gradient.double())

        plain = _worst_error(self._run_with(None), expected)
        fused = _worst_error(self._run_with(Fused(required=True)), expected)
        if fused <= MARGIN * plain + FLOOR:
            return None
        return f"further from float64 than the plain form, {fused:.1e} against {plain:.1e}"

    def reason_by_time(self) -> str | None:
        """Compare the times of both."""
        work = {
            "plain": lambda: self._run_with(None),
            "fused": lambda: self._run_with(Fused(required=True)),
        }
        times = interleaved(work, REPEATS, self.inputs.device)
        fused = times["fused"]["median"]
        plain = times["plain"]["median"]
        if fused <= plain:
            return None
        return f"slower than the plain form, {fused:.1e} s against {plain:.1e} s"

    def _run_with(self, fused: Fused | None) -> list[Tensor]:
        self.ffn.fused = fused
        return self._run(self.ffn, self.inputs, self.gradient)

    def _run(self, ffn: AnyKernelFFN, inputs: Tensor, gradient: Tensor) -> list[Tensor]:
        """The output and, where something is trained, the gradients of all that is."""
        with torch.set_grad_enabled(self.has_gradients):
            output = ffn(inputs)
        if not self.has_gradients:
            return [output]
        trained = [parameter for parameter in ffn.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(
            output, [inputs, *trained], gradient.to(output.dtype), materialize_grads=True
        )
        return [output.detach(), *gradients]


def _worst_error(tensors: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error; NaN if one is."""
    errors = [
        (tensor.double() - exact).norm() / exact.norm()
        for tensor, exact in zip(tensors, expected, strict=True)
        if exact.norm() > 0
    ]
    return torch.stack(errors).max().item()


def _kernel_ffns(model: PreTrainedModel) -> dict[str, AnyKernelFFN]:
    """The readouts that Triton kernels may serve."""
    return cast(KernelModelMixin, model).kernel_ffns()
