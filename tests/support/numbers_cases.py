"""Layers and inputs at the edges of what can be represented."""

import copy
import math

import torch

from hf_kernel_ffn import KernelFFN, KernelFFNConfig
from hf_kernel_ffn.checkpoint_code.ffn import _log_loudness
from hf_kernel_ffn.checkpoint_code.kernels import get_kernel
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig

EXPONENTIALS = ("exponential-yat", "exponential", "gaussian")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZE, PROTOTYPES, KEPT = 16, 24, 4


def inputs(kind, norm, generator, weight, dtype):
    """Tokens (..., SIZE) of length ``norm``, in ``dtype``; ``weight`` (PROTOTYPES, SIZE) may be
    changed in place to suit."""
    shape = {"one token": (1, 1), "no token": (2, 0), "no row": (0, 5)}.get(kind, (2, 3))
    x = torch.randn(*shape, SIZE, generator=generator)
    x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) * norm
    if kind == "zero":
        x[0] = 0
    if kind == "nothing fires":  # for kernels of one sign: all rows point away
        direction = torch.nn.functional.normalize(torch.randn(SIZE, generator=generator), dim=0)
        weight.copy_(-weight.abs().mean() * direction * torch.ones(PROTOTYPES, 1))
        x[0] = norm * direction
    x = x.to(dtype)
    if kind == "at a prototype":
        weight[0], weight[1] = x[0, 0].float(), -x[0, 1].float()
    return x


def module(kernel, simplex, intensity, values, kind, norm, row_norm, seed, dtype):
    """An FFN in ``dtype`` with reference values as a conversion sets them, and inputs for it."""
    generator = torch.Generator().manual_seed(seed)
    config = KernelFFNConfig(
        kernel,
        simplex,
        intensity,
        values=values,
        top_k=KEPT if simplex in ("top-k", "threshold") else None,
    )
    weight = torch.randn(PROTOTYPES, SIZE, generator=generator)
    weight = weight / weight.norm(dim=-1, keepdim=True) * row_norm
    x = inputs(kind, norm, generator, weight, dtype)
    distance2 = (
        norm**2 + row_norm**2
    )  # what a conversion finds on average, and what ε is a share of
    starts = {"distance": 0.01 * distance2, "bandwidth": distance2}
    reference = {
        name: starts.get(start, start) for name, start in get_kernel(kernel).parameters.items()
    }
    reference |= {"scale": 1.0, "temperature": 1.0, "threshold": 1.0}
    ffn = KernelFFN(LayerConfig(config, SIZE, PROTOTYPES, reference)).requires_grad_(False)
    ffn.input_prototypes.weight.copy_(weight)
    for name, tensor in ffn.named_parameters():
        if tensor.ndim == 2 and "input" not in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / SIZE**0.5)
        elif name.endswith("bias"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    if kind in ("zero", "nothing fires") and ffn.input_prototypes.bias is not None:
        ffn.input_prototypes.bias.zero_()
    ffn = ffn.to(dtype)
    exact = copy.deepcopy(ffn).double()
    log_kernel = exact.kernel.log(*exact.scores(x.double()), **exact.kernel_parameters())
    firing = log_kernel[log_kernel > -math.inf]
    if len(firing):  # loud enough to matter, as a calibrated scale makes it
        scale = (
            math.exp(max(-80.0, min(80.0, -firing.max().item()))) if intensity == "mass" else 1.0
        )
        threshold = math.exp(max(-80.0, min(80.0, firing.median().item())))
        for one in (ffn, exact):
            one.set_reference("scale", scale)
            one.set_reference("threshold", threshold)
    return ffn.requires_grad_(True), exact.requires_grad_(True), x


def undecided(exact, x):
    """Whether a sparse map's choice, which jumps, hangs on the last digits of a loudness.

    The kinks of kernels are not asked for: the room of a gradient grows as its score nears zero.
    """
    if not exact.config.settings.sparse:
        return False
    with torch.no_grad():
        log_kernel = exact.kernel.log(*exact.scores(x.double()), **exact.kernel_parameters())
        loudness = _log_loudness(log_kernel, exact.compute_ups(x.double()))
        if exact.config.settings.simplex == "threshold":
            return bool(((loudness - exact.log_threshold()).abs() < 0.05).any())
        ordered = loudness.sort(-1, descending=True).values
        gap = ordered[..., KEPT - 1] - ordered[..., KEPT]
        return bool((gap < 0.05).any())  # −inf − (−inf) is NaN, and not undecided
