"""Time of tied rows with knots beside the SwiGLU block they stand in for, by rounds of both.

    python scripts/benchmarks/tied_speed.py --modes eager compiled --shapes 576x1536 2048x8192
    python scripts/benchmarks/tied_speed.py --device cuda --dtype bfloat16 --modes eager fused

With --sweep, times of the Triton kernels alone, by the constants of their file.
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_kernel_ffn.checkpoint_code.knot_blocks import BLOCKS
from hf_kernel_ffn.checkpoint_code.knots import Knots
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig
from hf_kernel_ffn.checkpoint_code.plan import choose_tied_form
from hf_kernel_ffn.checkpoint_code.settings import KernelFFNConfig
from hf_kernel_ffn.checkpoint_code.tied import TiedKernelFFN
from hf_kernel_ffn.gpu import tied_kernels
from hf_kernel_ffn.gpu.fused import Fused
from hf_kernel_ffn.gpu.measuring import interleaved, ratio

PIECES = 8


def make_layers(size: int, units: int, like: Tensor) -> dict[str, nn.Module]:
    """The stock block, and tied rows with as many units, random weights each."""
    stock = LlamaMLP(
        SimpleNamespace(
            hidden_size=size, intermediate_size=units, mlp_bias=False, hidden_act="silu"
        )
    )
    settings = KernelFFNConfig(kernel="brownian", values="product", rows="tied", pieces=PIECES)
    reference = {"scale": 1.0, "far": 8.0}
    tied = TiedKernelFFN(LayerConfig(settings, size, units, reference, gated=True))
    for parameter in tied.pieces.values():
        nn.init.normal_(parameter)
    return {"stock": stock.to(like), "tied": tied.to(like)}


def run_inference(module: nn.Module, x: Tensor) -> None:
    """One forward pass."""
    with torch.no_grad():
        module(x)


def run_training(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """One forward and backward pass."""
    leaf = x.detach().requires_grad_()
    module(leaf).backward(gradient)
    module.zero_grad(set_to_none=True)


def measure(
    size: int, units: int, mode: str, like: Tensor, tokens: int, repeats: int
) -> list[dict]:
    """A row for each phase: milliseconds of both, and their ratio with quartiles."""
    torch.manual_seed(0)
    layers = make_layers(size, units, like)
    x = torch.randn(1, tokens, size).to(like)
    gradient = torch.randn(1, tokens, size).to(like)
    if mode == "fused":
        layers["tied"].fused = Fused(required=True)
    form = choose_tied_form(layers["tied"], x).form.value
    if mode == "compiled":
        layers = {name: torch.compile(layer, fullgraph=True) for name, layer in layers.items()}
    rows = []
    for phase in ("forward", "forward+backward"):
        work = {
            name: partial(run_inference, layer, x)
            if phase == "forward"
            else partial(run_training, layer, x, gradient)
            for name, layer in layers.items()
        }
        times = interleaved(work, repeats, like.device)
        milliseconds = {name: round(1e3 * found["median"], 4) for name, found in times.items()}
        quotient = {key: round(value, 3) for key, value in ratio(times, "tied", "stock").items()}
        rows.append({"phase": phase, "form": form, **milliseconds, "ratio": quotient})
    torch._dynamo.reset()
    return rows


def sweep(size: int, units: int, like: Tensor, tokens: int, repeats: int) -> list[dict]:
    """Milliseconds of each kernel by its constants, and of the same by torch."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=like.device)

    knots = Knots(normal(PIECES, units), normal(PIECES, units), 8.0)
    gate, up, gradient = (normal(tokens, units).to(like) for _ in range(3))
    rows = []
    for phase, prefix in (("forward", ""), ("backward", "BACKWARD_")):
        names = [prefix + name for name in ("UNITS", "TOGETHER", "TOKENS")]
        found = {}
        for step in (tied_kernels.TRITON_STEP, BLOCKS):
            choices = itertools.product((128, 256, 512), (1, 2, 4), (16, 32, 64, 128))
            for chosen in choices if step is not BLOCKS else [("torch",)]:
                if step is not BLOCKS:
                    for name, value in zip(names, chosen, strict=True):
                        is_bounds = name.endswith("TOKENS")
                        setattr(tied_kernels, name, (value, value) if is_bounds else value)
                work = partial(step.forward, gate, up, knots)
                if phase == "backward":
                    work = partial(
                        step.backward, gradient, gate, up, knots, of_gate=gradient, of_pieces=True
                    )
                times = interleaved({"step": work}, repeats, like.device)
                found[chosen] = 1e3 * times["step"]["median"]
        for chosen, milliseconds in sorted(found.items(), key=lambda pair: pair[1]):
            rows.append({"phase": phase, "by": chosen, "milliseconds": round(milliseconds, 4)})
    return rows


def main() -> None:
    """Read the command line, and print a line of JSON for every measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "2048x8192"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--sweep", action="store_true")
    given = parser.parse_args()
    like = torch.empty(0, device=given.device, dtype=getattr(torch, given.dtype))
    for shape in given.shapes:
        size, units = map(int, shape.split("x"))
        if given.sweep:
            for row in sweep(size, units, like, given.tokens, given.repeats):
                print(json.dumps({"shape": shape, **row}), flush=True)
            continue
        for mode in given.modes:
            for row in measure(size, units, mode, like, given.tokens, given.repeats):
                print(json.dumps({"shape": shape, "mode": mode, **row}), flush=True)


if __name__ == "__main__":
    main()
