"""Time, memory and bytes of the FFNs of ffn_variants.py, by mode and phase."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from ffn_layers import MatrixProducts
from ffn_variants import PHASES, Shape, Variant, make_variants
from torch import Tensor, nn

from hf_kernel_ffn.checkpoint_code.errors import InputError
from hf_kernel_ffn.checkpoint_code.ffn import KernelFFN
from hf_kernel_ffn.checkpoint_code.tied import TiedKernelFFN
from hf_kernel_ffn.gpu.fused import (
    Fused,
    reason_against_fused_gather,
    reason_against_fused_readout,
    reason_against_fused_tied,
)
from hf_kernel_ffn.gpu.measuring import (
    Work,
    bytes_moved,
    copy_bandwidth,
    interleaved,
    memory_for_backward,
    peak_memory,
    ratio,
)

MODES = ("eager", "compiled", "fused")
"""fused: readouts by Triton kernels, the rest as in eager."""
CLOCKS = ("wall", "cpu")

Variants = dict[str, Variant]


@dataclass(frozen=True)
class Conditions:
    """How everything is timed."""

    tokens: int = 256
    """In the forward and forward+backward phases; decode reads one."""
    repeats: int = 7
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    clock: str = "wall"
    bandwidth: float = 1.0
    """Bytes per second of copying."""

    def random(self, tokens: int, hidden_size: int) -> Tensor:
        """(1, tokens, hidden_size)."""
        return torch.randn(1, tokens, hidden_size, device=self.device, dtype=self.dtype)


def benchmark(
    shapes: dict[str, Shape],
    *,
    tokens: int = 256,
    repeats: int = 7,
    active: int = 64,
    modes: Iterable[str] = MODES[:2],
    phases: Iterable[str] = PHASES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    clock: str = "wall",
    own: dict[str, nn.Module] | None = None,
    only: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict], None] = lambda report: None,
) -> dict:
    """Measure time, memory and bytes of all variants, for each shape by name.

    Args:
        tokens: in the forward and forward+backward phases; decode reads one.
        only: parts of names, comma-separated: of the readouts, those that have one of them.
        own: FFNs of a checkpoint, timed beside the rest.
        progress: called with a line when something begins.
        keep: called with what there is after every mode.

    Returns:
        what is written as JSON: the machine in general words, and ``rows``, one per shape, mode,
        phase and variant.
    """
    where = torch.device(device)
    bandwidth = copy_bandwidth(where)
    conditions = Conditions(tokens, repeats, dtype, where, clock, bandwidth)

    def say(name: str, line: str) -> None:
        progress(f"{name}, {line}")

    rows: list[dict] = []
    report = {
        "machine": describe_machine(where),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "repeats": repeats,
        "clock": clock,
        "copy_bandwidth": bandwidth,
        "rows": rows,
    }
    for name, shape in shapes.items():
        torch.manual_seed(0)
        with where:
            variants = make_variants(shape, active, own)
        if only is not None:
            variants = select_variants(variants, only)
        for variant in variants.values():
            variant.module.to(where, dtype)
        for mode in modes:
            for row in measure_mode(
                variants, mode, phases, shape.hidden_size, conditions, partial(say, name)
            ):
                rows.append({"shape": name, **row})
            keep(report)
    return report


def select_variants(variants: Variants, only: str) -> Variants:
    """Keep floors, those whose name has a part that ``only`` names, and what they are against."""
    parts = [part.strip() for part in only.split(",")]
    selected = {name for name in variants if any(part in name for part in parts)}
    needed = selected | {variants[name].against for name in selected} | {"stock"}
    return {name: variant for name, variant in variants.items() if name in needed or is_floor(name)}


def is_floor(name: str) -> bool:
    """Whether the variant of this ``name`` is a floor, not a layer."""
    return "floor" in name


def measure_mode(
    variants: Variants,
    mode: str,
    phases: Iterable[str],
    hidden_size: int,
    conditions: Conditions,
    progress: Callable[[str], None],
) -> list[dict]:
    """Measure what can run in ``mode``: a row of each, phase by phase."""
    if mode == "compiled":
        variants = compile_variants(variants)
    elif mode == "fused":
        variants = fuse_variants(variants, conditions)

    rows = []
    for phase in phases:
        progress(f"{mode}, {phase}")
        # One class, compiled for each variant.
        with torch._dynamo.config.patch(recompile_limit=len(variants) + 1):
            for row in measure_phase(variants, mode, phase, hidden_size, conditions):
                rows.append({"mode": mode, "phase": phase, **row})
        torch._dynamo.reset()
    for variant in variants.values():
        if isinstance(variant.module, (KernelFFN, TiedKernelFFN)):
            variant.module.fused = None
    return rows


def compile_variants(variants: Variants) -> Variants:
    """All but floors, compiled."""
    return {
        name: replace(variant, module=torch.compile(variant.module, fullgraph=True, dynamic=False))
        for name, variant in variants.items()
        if variant.compiles and not is_floor(name)
    }


def fuse_variants(variants: Variants, conditions: Conditions) -> Variants:
    """Those of the readouts that Triton kernels can serve, from now on by them alone, and what they
    are set against.

    Raises:
        InputError: there are none.
    """
    served = set()
    reason = None
    for name, variant in variants.items():
        ffn = variant.module
        if not isinstance(ffn, (KernelFFN, TiedKernelFFN)):
            continue
        with torch.no_grad():
            x = conditions.random(1, ffn.config.hidden_size)
            if isinstance(ffn, TiedKernelFFN):
                own_reason = reason_against_fused_tied(ffn, x)
            elif variant.sparse:
                own_reason = reason_against_fused_gather(ffn, x)
            else:
                own_reason = reason_against_fused_readout(ffn, x)
        if own_reason is None:
            ffn.fused = Fused(required=True)
            served.add(name)
        reason = reason or own_reason
    if not served:
        raise InputError(f"found {reason}: leave the mode out")
    needed = served | {variants[name].against for name in served}
    return {name: variant for name, variant in variants.items() if name in needed or is_floor(name)}


def measure_phase(
    variants: Variants, mode: str, phase: str, hidden_size: int, conditions: Conditions
) -> list[dict]:
    """Measure every variant that has the phase: a row of each."""
    work = make_work(variants, phase, hidden_size, conditions)
    times = interleaved(work, conditions.repeats, conditions.device, conditions.clock)
    layers = {name: once for name, once in work.items() if not is_floor(name)}
    peaks = {name: peak_memory(once, conditions.device) for name, once in layers.items()}
    held = peaks
    if phase == "forward+backward":
        # What a layer keeps until then: gradients of parameters are no activations.
        x = conditions.random(conditions.tokens, hidden_size).requires_grad_()
        held = {
            name: memory_for_backward(partial(variants[name].module, x), conditions.device)
            for name in layers
        }

    rows = []
    for name, seconds in times.items():
        variant = variants[name]
        row: dict[str, Any] = {
            "variant": name,
            "seconds": {key: seconds[key] for key in ("median", "low", "high")},
            "against": variant.against,
            "ratio": ratio(times, name, variant.against),
        }
        if name in held:
            row["memory"] = held[name]
            row["memory_ratio"] = held[name] / max(held[variant.against], 1)
            row["peak_memory"] = peaks[name]
        if mode != "compiled":  # what compiled code reads and writes is not seen
            row["bytes_moved"] = bytes_moved(work[name])
        row.update(describe_weights_and_targets(variant, phase, conditions))
        rows.append(row)
    return rows


def describe_weights_and_targets(variant: Variant, phase: str, conditions: Conditions) -> dict:
    """The variant's bytes of weights, the time of copying them, and what is aimed at."""
    weights = sum(
        parameter.numel() * parameter.element_size() for parameter in variant.module.parameters()
    )
    described = {
        "weight_bytes": weights,
        "seconds_at_copy_bandwidth": weights / conditions.bandwidth,
        "target": variant.target_in(phase, conditions.device),
    }
    memory_target = variant.memory_target_in(phase)
    if memory_target is not None:
        described["memory_target"] = memory_target
    return described


def make_work(
    variants: Variants, phase: str, hidden_size: int, conditions: Conditions
) -> dict[str, Work]:
    """What is to be timed in ``phase``, by name."""
    x = conditions.random(1 if phase == "decode" else conditions.tokens, hidden_size)
    gradient = torch.randn_like(x)
    work: dict[str, Work] = {}
    for name, variant in variants.items():
        if phase not in variant.phases:
            continue
        if phase != "forward+backward":
            work[name] = partial(run_inference, variant.module, x)
        elif isinstance(variant.module, MatrixProducts):
            work[name] = partial(run_products, variant.module, x[0], gradient[0])
        else:
            work[name] = partial(run_training, variant.module, x, gradient)
    return work


@torch.no_grad()
def run_inference(module: nn.Module, x: Tensor) -> None:
    """One forward pass."""
    module(x)


@torch.no_grad()
def run_products(module: MatrixProducts, x: Tensor, gradient: Tensor) -> None:
    """The products of one forward and backward pass."""
    module.train_step(x, gradient)


def run_training(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """One forward and backward pass."""
    leaf = x.detach().requires_grad_()
    module(leaf).backward(gradient)
    module.zero_grad(set_to_none=True)


def describe_machine(device: torch.device) -> str:
    """The machine in general words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{torch.get_num_threads()} core(s) of a CPU ({platform.machine()}, {capability})"
