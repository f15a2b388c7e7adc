"""Kernel-readout layers with random weights."""

import torch

from hf_kernel_ffn import KernelFFN, KernelFFNConfig
from hf_kernel_ffn.checkpoint_code.kernels import KERNELS
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig

D, P, TOP_K = 4, 5, 3


def make_layer(dtype=torch.float64, size=D, count=P, epsilon=0.7, **settings):
    """A layer with random weights and log-ratios, all of them different from their reference."""
    settings = KernelFFNConfig(
        **settings, top_k=TOP_K if settings["simplex"] in ("top-k", "threshold") else None
    )
    ratios = dict.fromkeys(KERNELS[settings.kernel].parameters, epsilon)
    if "rate" in ratios:
        ratios["rate"] = 0.2  # so that float16 holds the kernel of these rows with themselves
    ratios.update(scale=1.3, temperature=settings.temperature or 0.8)
    if settings.simplex == "threshold":
        ratios["threshold"] = 1.0
    torch.manual_seed(0)
    ffn = KernelFFN(LayerConfig(settings, size, count, ratios)).double()
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.normal_(std=0.3 if parameter.numel() == 1 else 0.8)
        ffn.units.copy_(torch.arange(1, count + 1) * (-1) ** torch.arange(count))
        if settings.simplex == "threshold":
            ffn.fit_threshold(inputs(40, size, seed=7))
    return ffn.to(dtype)


def inputs(count=6, size=D, seed=1):
    return torch.randn(
        count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
