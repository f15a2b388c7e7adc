"""What ffn_speed.py times: stock FFNs, kernel readouts, another package's layer, and floors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from ffn_layers import MatrixProducts, PlainYat, WithLinear
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_kernel_ffn.checkpoint_code.ffn import KernelFFN
from hf_kernel_ffn.checkpoint_code.kernels import get_kernel
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig
from hf_kernel_ffn.checkpoint_code.settings import (
    DEFAULT_SETTINGS,
    KernelFFNConfig,
    resolve_defaults,
)
from hf_kernel_ffn.checkpoint_code.tied import TiedKernelFFN
from hf_kernel_ffn.families.lookup import StockFFN, find_ffn_paths, find_stock_ffn, get_family_name
from hf_kernel_ffn.families.registry import get_architecture
from hf_kernel_ffn.families.weights import read_stock_weights

PHASES = ("forward", "forward+backward", "decode")
TARGETS = {
    "tied": {"forward": 1.05, "forward+backward": 1.05, "memory": 0.7},
    "gated": {"forward": 1.05, "forward+backward": 1.05, "memory": 1.0},
    "polarised 1.5m": {"forward": 1.05, "forward+backward": 1.05, "sparse decode": 0.6},
    "polarised 2m": {"forward": 1.4, "forward+backward": 1.4, "sparse decode": 0.8},
    "single": {"forward": 0.70, "forward+backward": 0.70, "sparse decode": 0.5},
    "single, plain FFN": {"forward": 1.05, "forward+backward": 1.05, "sparse decode": 0.65},
    "yat against nmn": {"cpu": 0.85, "cuda": 0.6, "memory": 0.4},
    "floor": {"cuda": 1.15},
}
"""What is aimed at: a variant's time, or memory, over that of what it is set against, at most."""
FITTED_TOKENS = 64
"""Random tokens on which a threshold is fitted."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one FFN."""

    hidden_size: int
    intermediate_size: int
    gated: bool = True


SHAPES = {
    "gpt2": Shape(768, 3072, gated=False),
    "smollm2-135m": Shape(576, 1536),
    "llama-3.2-1b": Shape(2048, 8192),
    "llama-3-8b": Shape(4096, 14336),
    "mistral-7b": Shape(4096, 14336),
}


@dataclass
class Variant:
    """One thing that is timed."""

    module: nn.Module
    against: str = "stock"
    """The variant whose time it is set against: the same mode of the stock FFN, or nmn's."""
    target: str | None = None
    """Key of TARGETS."""
    phases: tuple[str, ...] = PHASES
    sparse: bool = False
    compiles: bool = True
    """Whether torch.compile takes it in one graph."""

    def target_in(self, phase: str, device: torch.device) -> float | None:
        """Return the time over what it is set against that is aimed at."""
        if self.target is None:
            return None
        targets = TARGETS[self.target]
        if self.target == "yat against nmn":
            return targets[device.type] if phase == "forward+backward" else None
        return targets.get("sparse decode" if self.sparse else phase)

    def memory_target_in(self, phase: str) -> float | None:
        """Return the memory over what it is set against that is aimed at."""
        if self.target is None or phase != "forward+backward":
            return None
        return TARGETS[self.target].get("memory")


def make_variants(
    shape: Shape, active: int, own: dict[str, nn.Module] | None = None
) -> dict[str, Variant]:
    """Make everything that is timed at ``shape``, by name.

    Args:
        active: prototypes per token of sparse readouts.
        own: FFNs of a checkpoint.
    """
    m = shape.intermediate_size
    size = shape.hidden_size
    variants = {
        "stock": Variant(make_stock_module(shape)),
        "floor, stock's products": Variant(MatrixProducts(size, m, 2 if shape.gated else 1)),
        "floor, two products": Variant(MatrixProducts(size, m, 1)),
    }
    variants.update({name: Variant(module) for name, module in (own or {}).items()})
    tied = make_tied_readout(shape)
    settings = tied.config.settings
    variants[f"tied {settings.values}, {settings.pieces} pieces"] = Variant(tied, target="tied")

    widths = {"single": m}
    if shape.gated:
        widths.update({"polarised 1.5m": m * 3 // 2, "polarised 2m": 2 * m})
    for name, width in widths.items():
        target = name if shape.gated else f"{name}, plain FFN"
        variants.update(make_fixed_value_variants(shape, name, width, active, target))
    convex = make_readout(shape, m, ReadoutOptions(intensity="none"))
    variants["single, convex"] = Variant(convex, phases=("forward", "forward+backward"))

    liger = make_liger_module(shape) if shape.gated else None
    if liger is not None:
        variants["Liger's SwiGLU"] = Variant(liger, compiles=False)
    if shape.gated:
        gated = make_readout(shape, m, ReadoutOptions(values="gated"))
        sparse = make_readout(shape, m, ReadoutOptions(active, values="gated", weights=gated))
        variants["gated"] = Variant(gated, target="gated")
        variants[f"gated, top-k {active}"] = Variant(sparse, phases=("decode",), sparse=True)
    nmn, module = make_nmn_layer(shape, m)
    yat = make_readout(shape, m, ReadoutOptions(kernel="yat"))
    variants[nmn] = Variant(module)
    variants["yat single"] = Variant(yat, against=nmn, target="yat against nmn")
    return variants


def make_fixed_value_variants(
    shape: Shape, name: str, width: int, active: int, target: str
) -> dict[str, Variant]:
    """Make a dense readout of ``width`` prototypes, and the sparse ones of the same weights."""
    dense = make_readout(shape, width, ReadoutOptions())
    top_k = make_readout(shape, width, ReadoutOptions(active, weights=dense))
    threshold = make_readout(shape, width, ReadoutOptions(active, "threshold", weights=dense))
    norms_kept = make_readout(shape, width, ReadoutOptions(active, weights=dense))
    norms_kept.keep_norms = True
    sparse = {
        f"{name}, top-k {active}": top_k,
        f"{name}, threshold {active}": threshold,
        f"{name}, top-k {active}, norms kept": norms_kept,
    }
    variants = {name: Variant(dense, target=target)}
    for sparse_name, readout in sparse.items():
        variants[sparse_name] = Variant(readout, target=target, phases=("decode",), sparse=True)
    return variants


@dataclass(frozen=True)
class ReadoutOptions:
    """What a timed readout computes."""

    active: int | None = None
    """Prototypes per token; None: all."""
    simplex: str = "top-k"
    """Where not all are active."""
    values: str = "fixed"
    kernel: str = "half-yat"
    intensity: str = "mass"
    weights: KernelFFN | None = field(default=None, repr=False)
    """The readout whose parameters it shares; None: random ones of its own."""


def make_readout(shape: Shape, prototypes: int, options: ReadoutOptions) -> KernelFFN:
    """Make a kernel readout of ``shape``."""
    size = shape.hidden_size
    settings = KernelFFNConfig(
        kernel=options.kernel,
        simplex="softmax" if options.active is None else options.simplex,
        intensity=options.intensity,
        init="single",
        values=options.values,
        top_k=options.active,
    )
    reference = {"epsilon": 0.01 * size, "scale": 1.0, "threshold": 1.0, "temperature": 1.0}
    ffn = KernelFFN(LayerConfig(settings, size, prototypes, reference))
    if options.weights is not None:
        for name, parameter in options.weights.named_parameters():
            parent, _, leaf = name.rpartition(".")
            setattr(ffn.get_submodule(parent), leaf, parameter)
    if settings.simplex == "threshold":
        ffn.fit_threshold(torch.randn(FITTED_TOKENS, size))
    return ffn.eval()


def make_stock_module(shape: Shape) -> nn.Module:
    """Make transformers' own FFN of ``shape``: Llama's SwiGLU or GPT-2's GELU."""
    size = shape.hidden_size
    if shape.gated:
        config = AutoConfig.for_model(
            "llama", hidden_size=size, intermediate_size=shape.intermediate_size
        )
        return LlamaMLP(config).eval()
    return GPT2MLP(shape.intermediate_size, AutoConfig.for_model("gpt2", n_embd=size)).eval()


def make_tied_readout(shape: Shape) -> TiedKernelFFN:
    """Make the readout that a conversion takes by default, with random pieces."""
    settings = resolve_defaults(DEFAULT_SETTINGS, shape.gated)
    names = (*get_kernel(settings.kernel).parameters, "scale")
    reference = {**dict.fromkeys(names, 1.0), "far": 100.0}
    size = (shape.hidden_size, shape.intermediate_size)
    ffn = TiedKernelFFN(LayerConfig(settings, *size, reference, gated=shape.gated))
    for parameter in ffn.pieces.values():
        nn.init.normal_(parameter)
    return ffn.eval()


def make_liger_module(shape: Shape) -> nn.Module | None:
    """Make liger-kernel's SwiGLU of ``shape``; None where that package or its GPU is missing."""
    if not torch.cuda.is_available():
        return None
    try:
        from liger_kernel.transformers.swiglu import LigerSwiGLUMLP
    except Exception:  # a package of another time than transformers fails in many ways
        return None
    config = AutoConfig.for_model(
        "llama", hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size
    )
    return LigerSwiGLUMLP(config).eval()


def make_nmn_layer(shape: Shape, width: int) -> tuple[str, nn.Module]:
    """Make nmn's YatNMN and a Linear, or their plain-torch equivalent; what to call it first."""
    size = shape.hidden_size
    try:
        from nmn.torch.nmn.yat_nmn import YatNMN
    except ImportError:
        return "plain-torch YatNMN + Linear", WithLinear(PlainYat(size, width), size, width)
    return "nmn YatNMN + Linear", WithLinear(YatNMN(size, width), size, width)


class Stock(nn.Module):
    """A stock FFN, whatever modules it is made of."""

    def __init__(self, ffn: StockFFN):
        super().__init__()
        self.ffn = ffn
        self.host = ffn.host

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size)."""
        return self.ffn(x)


def find_checkpoint_ffns(model: PreTrainedModel, name: str) -> tuple[Shape, dict[str, nn.Module]]:
    """Find the shape of a model's FFNs, and the first FFN of each kind by what to call it."""
    architecture = get_architecture(get_family_name(model))
    is_converted = getattr(model.config, "kernel_ffn", None)
    converted = model.config.kernel_ffn_layers() if is_converted else {}
    shapes: list[Shape] = []
    ffns: dict[tuple, tuple[str, nn.Module]] = {}
    for path in find_ffn_paths(model, architecture):
        if path in converted:
            ffn = model.base_model.get_submodule(path)
            width = ffn.config.prototypes
            if isinstance(ffn, KernelFFN):
                width = int(ffn.units.abs().max())
            kind = (str(ffn.config.settings), ffn.config.prototypes)
            shapes.append(Shape(ffn.config.hidden_size, width, architecture.gated))
        else:
            stock = find_stock_ffn(model, path)
            weights = read_stock_weights(model, stock)
            width, size = weights.up.shape
            ffn = Stock(stock)
            kind = ("stock", width)
            shapes.append(Shape(size, width, weights.gate is not None))
        ffns.setdefault(kind, (f"{name} {path}", ffn.eval()))
    return shapes[0], dict(ffns.values())
