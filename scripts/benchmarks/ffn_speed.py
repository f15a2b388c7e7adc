#!/usr/bin/env python3
"""How fast kernel readouts are against the FFNs they replace, in one run, as ratios: at named shapes, or at a checkpoint's."""

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_kernel_ffn.checkpoint_code.errors import InputError
from hf_kernel_ffn.checkpoint_code.ffn import KernelFFN
from hf_kernel_ffn.checkpoint_code.settings import KernelFFNConfig, LayerConfig, require_one_of
from hf_kernel_ffn.cli.app import Device, Dtype, Trust, quieten, run_app
from hf_kernel_ffn.cli.tables import print_table
from hf_kernel_ffn.families.lookup import StockFFN, find_ffn_paths, find_stock_ffn, get_family_name
from hf_kernel_ffn.families.registry import get_architecture
from hf_kernel_ffn.families.weights import read_stock_weights
from hf_kernel_ffn.gpu.fused import Fused, reason_against_fused_gather, reason_against_fused_readout
from hf_kernel_ffn.gpu.measuring import (
    bytes_moved,
    copy_bandwidth,
    interleaved,
    memory_for_backward,
    peak_memory,
    ratio,
)
from hf_kernel_ffn.storage.files import require_place, write_text
from hf_kernel_ffn.storage.loading import get_torch_dtype, load_model


@dataclass(frozen=True)
class Shape:
    """Sizes of one FFN."""

    hidden_size: int
    intermediate_size: int
    gated: bool = True


SHAPES = {
    "gpt2": Shape(768, 3072, gated=False),
    "llama-3.2-1b": Shape(2048, 8192),
    "llama-3-8b": Shape(4096, 14336),
    "mistral-7b": Shape(4096, 14336),
}
MODES = ("eager", "compiled", "fused")
"""fused: readouts by the Triton kernels of fused.py, the rest as in eager."""
PHASES = ("forward", "forward+backward", "decode")
TARGETS = {
    "gated": {"forward": 1.05, "forward+backward": 1.05, "memory": 1.0},
    "polarised 1.5m": {"forward": 1.05, "forward+backward": 1.05, "sparse decode": 0.6},
    "polarised 2m": {"forward": 1.4, "forward+backward": 1.4, "sparse decode": 0.8},
    "single": {"forward": 0.70, "forward+backward": 0.70, "sparse decode": 0.5},
    "single, plain FFN": {"forward": 1.05, "forward+backward": 1.05, "sparse decode": 0.65},
    "yat against nmn": {"cpu": 0.85, "cuda": 0.6, "memory": 0.4},
    "floor": {"cuda": 1.15},
}
"""What is aimed at: a variant's time, or memory, over that of what it is set against, at most."""


@dataclass
class Variant:
    """One thing that is timed."""

    module: Any
    against: str
    """The variant whose time it is set against: the same mode of the stock FFN, or nmn's."""
    target: str | None = None
    """Key of TARGETS."""
    phases: tuple[str, ...] = PHASES
    sparse: bool = False


class MatrixProducts(nn.Module):
    """The floor: the products of an FFN with ``inner`` (P, d) matrices and one (d, P), and nothing between them."""

    inner: Any

    def __init__(self, size: int, width: int, inner: int):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(size, width, bias=False) for _ in range(inner))
        self.outer = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.inner:
            hidden = linear(x)
        return self.outer(hidden)

    def train_step(self, x: Tensor, gradient: Tensor) -> None:
        """The products of a forward and a backward pass: two more for each of the first."""
        for linear in self.inner:
            hidden = linear(x)
        self.outer(hidden)
        inner = gradient @ self.outer.weight
        gradient.T @ hidden
        for linear in self.inner:
            inner @ linear.weight
            inner.T @ x


def readout(shape: Shape, prototypes: int, active: int | None = None, simplex: str = "top-k", values: str = "fixed",
            kernel: str = "half-yat", intensity: str = "mass", weights: KernelFFN | None = None) -> KernelFFN:  # fmt: skip
    """A kernel readout of ``shape`` with random weights, or those of ``weights``; ``active`` prototypes per token, or all."""
    settings = KernelFFNConfig(
        kernel,
        "softmax" if active is None else simplex,
        intensity,
        "single",
        values=values,
        top_k=active,
    )
    reference = {
        "epsilon": 0.01 * shape.hidden_size,
        "scale": 1.0,
        "threshold": 1.0,
        "temperature": 1.0,
    }
    ffn = KernelFFN(LayerConfig(settings, shape.hidden_size, prototypes, reference))
    if weights is not None:
        for name, parameter in weights.named_parameters():
            parent, _, leaf = name.rpartition(".")
            setattr(ffn.get_submodule(parent), leaf, parameter)
    if settings.simplex == "threshold":
        ffn.fit_threshold(torch.randn(64, shape.hidden_size))
    return ffn.eval()


class WithLinear(nn.Module):
    """A layer of another package and the linear map behind it."""

    def __init__(self, first: nn.Module, size: int, width: int):
        super().__init__()
        self.first, self.second = first, nn.Linear(width, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class PlainYat(nn.Module):
    """nmn's YatNMN as its formula in plain torch: (x·w + b)² / (‖x − w‖² + ε) · α. Stands in where nmn is not installed."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(width, size) / size**0.5),
            nn.Parameter(torch.zeros(width)),
        )
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T + self.bias
        distance = (
            x.square().sum(-1, keepdim=True) + self.weight.square().sum(-1) - 2 * (y - self.bias)
        ).clamp(min=0)
        return y**2 / (distance + 1e-5) * self.alpha


def nmn_layer(shape: Shape, width: int) -> tuple[str, nn.Module]:
    """nmn's YatNMN and a Linear, or their plain-torch equivalent, and what to call it."""
    try:
        from nmn.torch.nmn.yat_nmn import YatNMN
    except ImportError:
        return "plain-torch YatNMN + Linear", WithLinear(
            PlainYat(shape.hidden_size, width), shape.hidden_size, width
        )
    return "nmn YatNMN + Linear", WithLinear(
        YatNMN(shape.hidden_size, width), shape.hidden_size, width
    )


def stock_module(shape: Shape) -> nn.Module:
    """transformers' own FFN of ``shape``: Llama's SwiGLU or GPT-2's GELU."""
    if shape.gated:
        config = AutoConfig.for_model(
            "llama", hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size
        )
        return LlamaMLP(config).eval()
    config = AutoConfig.for_model("gpt2", n_embd=shape.hidden_size)
    return GPT2MLP(shape.intermediate_size, config).eval()


def variants(
    shape: Shape, active: int, own: dict[str, nn.Module] | None = None
) -> dict[str, Variant]:
    """Everything that is timed at ``shape``, by name; ``own``: FFNs of a checkpoint."""
    m = shape.intermediate_size
    found = {"stock": Variant(stock_module(shape), "stock")}
    found["floor, stock's products"] = Variant(
        MatrixProducts(shape.hidden_size, m, 2 if shape.gated else 1), "stock"
    )
    found["floor, two products"] = Variant(MatrixProducts(shape.hidden_size, m, 1), "stock")
    for name, module in (own or {}).items():
        found[name] = Variant(module, "stock")
    widths = (
        {"single": m, "polarised 1.5m": m * 3 // 2, "polarised 2m": 2 * m}
        if shape.gated
        else {"single": m}
    )
    for name, width in widths.items():
        dense = readout(shape, width)
        target = name if shape.gated else f"{name}, plain FFN"
        found[name] = Variant(dense, "stock", target)
        for simplex in ("top-k", "threshold"):
            sparse = readout(shape, width, active, simplex, weights=dense)
            found[f"{name}, {simplex} {active}"] = Variant(
                sparse, "stock", target, ("decode",), sparse=True
            )
        sparse = readout(shape, width, active, weights=dense)
        sparse.keep_norms = True
        found[f"{name}, top-k {active}, norms kept"] = Variant(
            sparse, "stock", target, ("decode",), sparse=True
        )
    found["single, convex"] = Variant(
        readout(shape, m, intensity="none"), "stock", None, ("forward", "forward+backward")
    )
    if shape.gated:
        gated = readout(shape, m, values="gated")
        found["gated"] = Variant(gated, "stock", "gated")
        sparse = readout(shape, m, active, values="gated", weights=gated)
        found[f"gated, top-k {active}"] = Variant(sparse, "stock", None, ("decode",), sparse=True)
    nmn, module = nmn_layer(shape, m)
    found[nmn] = Variant(module, "stock")
    found["yat single"] = Variant(readout(shape, m, kernel="yat"), nmn, "yat against nmn")
    return found


def _pieces(
    found: dict[str, Variant],
    phase: str,
    hidden: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Callable]:
    """What is to be timed in ``phase``, by name."""
    count = 1 if phase == "decode" else tokens
    x = torch.randn(1, count, hidden, device=device, dtype=dtype)
    gradient = torch.randn_like(x)

    def inference(module):
        def once():
            with torch.no_grad():
                module(x)

        return once

    def training(module):
        if isinstance(module, MatrixProducts):

            def products():
                with torch.no_grad():
                    module.train_step(x[0], gradient[0])

            return products

        def once():
            leaf = x.detach().requires_grad_()
            module(leaf).backward(gradient)
            module.zero_grad(set_to_none=True)

        return once

    make = training if phase == "forward+backward" else inference
    return {
        name: make(variant.module) for name, variant in found.items() if phase in variant.phases
    }


def benchmark(
    shapes: dict[str, Shape],
    *,
    tokens: int = 256,
    repeats: int = 7,
    active: int = 64,
    modes: tuple[str, ...] = MODES[:2],
    phases: tuple[str, ...] = PHASES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    clock: str = "wall",
    own: dict[str, nn.Module] | None = None,
    only: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Time, memory and bytes of everything in :func:`variants`, for each shape by name.

    Args:
        tokens: in the forward and forward+backward phases; decode reads one.
        only: parts of names, comma-separated: of the readouts, those that have one of them.
        own: FFNs of a checkpoint, timed beside the rest.
        progress: called with a line when something begins.

    Returns:
        what is written as JSON: the machine in general words, and ``rows``, one per shape, mode, phase and variant.
    """
    where = torch.device(device)
    rows: list[dict] = []
    bandwidth = copy_bandwidth(where)
    for name, shape in shapes.items():
        torch.manual_seed(0)
        found = variants(shape, active, own)
        if only is not None:
            wanted = [part.strip() for part in only.split(",")]
            needed = {v.against for n, v in found.items() if any(part in n for part in wanted)} | {
                "stock"
            }
            found = {
                n: v
                for n, v in found.items()
                if n in needed or "floor" in n or any(part in n for part in wanted)
            }
        for variant in found.values():
            variant.module.to(where, dtype)
        for mode in modes:
            chosen = _fused(found, where, dtype) if mode == "fused" else found
            if mode == "compiled":
                chosen = {n: Variant(torch.compile(v.module, fullgraph=True, dynamic=False), v.against, v.target, v.phases, v.sparse)
                          for n, v in found.items() if "floor" not in n}  # fmt: skip
            for phase in phases:
                progress(f"{name}, {mode}, {phase}")
                pieces = _pieces(chosen, phase, shape.hidden_size, tokens, where, dtype)
                inputs = torch.randn(
                    1, tokens, shape.hidden_size, device=where, dtype=dtype, requires_grad=True
                )
                with torch._dynamo.config.patch(
                    recompile_limit=len(chosen) + 1
                ):  # one class, compiled for each variant
                    rows += _measure(
                        name, mode, phase, chosen, pieces, inputs, repeats, where, clock, bandwidth
                    )
                torch._dynamo.reset()
            for variant in chosen.values():
                if isinstance(variant.module, KernelFFN):
                    variant.module.fused = None
    return {
        "machine": _machine(where), "torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": str(dtype)[6:],
        "tokens": tokens, "repeats": repeats, "clock": clock, "copy_bandwidth": bandwidth, "rows": rows,
    }  # fmt: skip


def _fused(
    found: dict[str, Variant], device: torch.device, dtype: torch.dtype
) -> dict[str, Variant]:
    """Those of the readouts that Triton kernels can serve, from now on by them alone, and what they are set against.

    Raises:
        InputError: there are none.
    """
    reasons: dict[str, str | None] = {}
    for n, v in found.items():
        if isinstance(v.module, KernelFFN):
            with torch.no_grad():
                x = torch.randn(1, 1, v.module.config.hidden_size, device=device, dtype=dtype)
                reasons[n] = (
                    reason_against_fused_gather if v.sparse else reason_against_fused_readout
                )(v.module, x)
    served = {n for n, reason in reasons.items() if reason is None}
    if not served:
        raise InputError(f"found {next(iter(reasons.values()))}: leave the mode out")
    for n in served:
        found[n].module.fused = Fused(required=True)
    needed = served | {found[n].against for n in served} | {n for n in found if "floor" in n}
    return {n: v for n, v in found.items() if n in needed}


def _measure(
    name, mode, phase, chosen, pieces, inputs, repeats, device, clock, bandwidth
) -> list[dict]:
    times = interleaved(pieces, repeats, device, clock)
    real = {n: once for n, once in pieces.items() if "floor" not in n}
    peak = {n: peak_memory(once, device) for n, once in real.items()}
    memory = peak
    if (
        phase == "forward+backward"
    ):  # what the layer keeps until then: parameters' gradients are no activations
        memory = {n: memory_for_backward(partial(chosen[n].module, inputs), device) for n in real}
    rows = []
    for n, seconds in times.items():
        variant = chosen[n]
        row: dict[str, Any] = {"shape": name, "mode": mode, "phase": phase, "variant": n}
        row["seconds"] = {k: seconds[k] for k in ("median", "low", "high")}
        row["against"], row["ratio"] = variant.against, ratio(times, n, variant.against)
        if n in memory:
            row["memory"], row["memory_ratio"] = (
                memory[n],
                memory[n] / max(memory[variant.against], 1),
            )
            row["peak_memory"] = peak[n]
        if mode != "compiled":  # what compiled code reads and writes is not seen
            row["bytes_moved"] = bytes_moved(pieces[n])
        weights = sum(p.numel() * p.element_size() for p in variant.module.parameters())
        row["weight_bytes"], row["seconds_at_copy_bandwidth"] = weights, weights / bandwidth
        row["target"] = _target(variant, phase, device)
        if variant.target in ("yat against nmn", "gated") and phase == "forward+backward":
            row["memory_target"] = TARGETS[variant.target]["memory"]
        rows.append(row)
    return rows


def _target(variant: Variant, phase: str, device: torch.device) -> float | None:
    if variant.target is None:
        return None
    targets = TARGETS[variant.target]
    if variant.target == "yat against nmn":
        return targets[device.type] if phase == "forward+backward" else None
    return targets.get("sparse decode" if variant.sparse else phase)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} core(s) of a CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


class Stock(nn.Module):
    """A stock FFN, whatever modules it is made of."""

    def __init__(self, ffn: StockFFN):
        super().__init__()
        self.ffn, self.host = ffn, ffn.host

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)


def checkpoint_ffns(model: Any, name: str) -> tuple[Shape, dict[str, nn.Module]]:
    """The shape of a model's FFNs, and the first FFN of each kind by what to call it."""
    architecture = get_architecture(get_family_name(model))
    shapes: list[Shape] = []
    own: dict[str, nn.Module] = {}
    seen = set()
    converted = (
        model.config.kernel_ffn_layers() if getattr(model.config, "kernel_ffn", None) else {}
    )
    for path in find_ffn_paths(model, architecture):
        if path in converted:
            ffn = model.base_model.get_submodule(path)
            width, kind = (
                int(ffn.units.abs().max()),
                (str(ffn.config.settings), ffn.config.prototypes),
            )
            shapes.append(Shape(ffn.config.hidden_size, width, architecture.gated))
        else:
            stock = find_stock_ffn(model, path)
            ffn, weights = Stock(stock), read_stock_weights(model, stock)
            kind = ("stock", len(weights.up))
            shapes.append(Shape(weights.up.shape[1], len(weights.up), weights.gate is not None))
        if kind not in seen:
            seen.add(kind)
            own[f"{name} {path}"] = ffn.eval()
    return shapes[0], own


def print_benchmark(found: dict) -> None:
    rows = []
    for row in found["rows"]:
        spread, target, memory = row["ratio"], row["target"], row.get("memory_target")
        rows.append([
            row["shape"], row["mode"], row["phase"], row["variant"], f"{row['seconds']['median'] * 1e3:.2f}", row["against"],
            f"{spread['median']:.2f} ({spread['low']:.2f}–{spread['high']:.2f})", "" if target is None else f"≤ {target}",
            "" if "memory" not in row else f"{row['memory'] / 2**20:.1f}", "" if "memory" not in row else f"{row['memory_ratio']:.2f}",
            "" if memory is None else f"≤ {memory}", "" if "bytes_moved" not in row else f"{row['bytes_moved'] / 2**20:.0f}",
            f"{row['seconds_at_copy_bandwidth'] * 1e3:.2f}",
        ])  # fmt: skip
    print_table(["shape", "mode", "phase", "what", "ms", "against", "time ratio", "aimed at", "MiB held", "ratio", "aimed at", "MiB moved",
            "ms to copy weights"], rows)  # fmt: skip
    typer.echo(
        f"{found['machine']}, torch {found['torch']}, {found['dtype']}, {found['tokens']} tokens, medians of {found['repeats']}"
    )


def main(
    shapes: Annotated[
        str, typer.Option(help="gpt2, llama-3.2-1b, llama-3-8b, mistral-7b, comma-separated")
    ] = "gpt2,llama-3.2-1b",
    model: Annotated[
        Optional[str],
        typer.Option(help="a checkpoint whose FFNs are timed instead of named shapes"),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, help="read at once, forward and backward; fewer are faster")
    ] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="rounds; medians of them are reported")] = 7,
    active: Annotated[
        int, typer.Option(min=1, help="prototypes per token of the sparse readouts")
    ] = 64,
    modes: Annotated[
        str, typer.Option(help="eager, compiled, fused (Triton kernels)")
    ] = "eager,compiled",
    phases: Annotated[
        str, typer.Option(help="forward, forward+backward, decode")
    ] = "forward,forward+backward,decode",
    only: Annotated[
        Optional[str],
        typer.Option(help="readouts whose name has one of these parts, comma-separated"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="of a CPU")] = 1,
    clock: Annotated[
        str,
        typer.Option(help="wall, or cpu: this process's own time, on a machine that others use"),
    ] = "wall",
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="where to write all of it")
    ] = None,
    trust_remote_code: Trust = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Time readouts against the FFNs they replace: forward, forward+backward and one-token decode, as ratios."""
    if json_file is not None:
        require_place(json_file)
    quieten()
    for name, text, choices in (
        ("mode", modes, MODES),
        ("phase", phases, PHASES),
        ("clock", clock, ("wall", "cpu")),
    ):
        for part in text.split(","):
            require_one_of(name, part, choices)
    own = None
    if model is not None:
        shape, own = checkpoint_ffns(load_model(model, dtype, device, trust_remote_code), model)
        chosen = {model: shape}
    else:
        for part in shapes.split(","):
            require_one_of("shape", part, SHAPES)
        chosen = {part: SHAPES[part] for part in shapes.split(",")}
    torch.set_num_threads(threads)
    found = benchmark(
        chosen, tokens=tokens, repeats=repeats, active=active, modes=tuple(modes.split(",")), phases=tuple(phases.split(",")),
        dtype=get_torch_dtype(dtype), device=device, clock=clock, own=own, only=only, progress=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    if json_file is not None:
        write_text(json_file, json.dumps(found, indent=1) + "\n")
    print_benchmark(found)


if __name__ == "__main__":
    run_app(lambda: typer.run(main))
