"""The fused readout: its cases (fused_cases.py) in an interpreter of their own, its kernels through
Triton's compiler, and its absence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parents[1] / "support"


def python(*arguments, **environment):
    """Standard output of another interpreter; what it said, if it failed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("cases", ["fused_cases.py", "fused_tied_cases.py"])
def test_cases(cases):
    """On a GPU where there is one; elsewhere by Triton's interpreter, which must be asked for
    before Triton is imported."""
    pytest.importorskip("triton")
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    print(
        python(
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(HERE / cases),
            **interpret,
        )
    )


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_kernel_ffn.gpu import dense_kernels, sparse_mixture, tied_kernels

HALF = ("gate", "d_gate", "d_up", "x", "rows", "up", "bias", "up_bias", "coefficients", "gradient", "d_scores", "d_ups", "dictionary", "written")
NUMBERS = ("tokens", "units", "prototypes", "tiles", "width", "x_token", "row", "up_row", "slots", "size", "by_feature", "by_prototype")

def build(kernel, dtype, **constants):
    signature, divisible = {}, {}
    constants |= {name: 1 for name in ("x_feature", "row_feature", "up_feature") if name in kernel.arg_names}
    for place, name in enumerate(kernel.arg_names):
        if name == "far":
            signature[name] = "fp32"
            continue
        kind = "*i64" if name in ("indices", "counts") else "*" + dtype if name in HALF else "*fp32"
        signature[name] = "constexpr" if name in constants else "i32" if name in NUMBERS else kind
        divisible[(place,)] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    divisible = {key: value for key, value in divisible.items() if key not in constants}
    source = ASTSource(kernel, signature, constants, divisible)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=8, num_stages=3))

for dtype in ("bf16", "fp32"):
    build(sparse_mixture.gather_kernel, dtype, BLOCK_SLOTS=32, BLOCK_FEATURES=128)
    for gated, convex in ((False, False), (True, True)):
        flags = dict(GATED=gated, BIASED=gated, CONVEX=convex, ONE_SIDED=not convex, PRECISION="ieee", SIZE=2048)
        tokens = 64 if gated or convex else 128
        for kernel, tokens in ((dense_kernels.forward_kernel, tokens), (dense_kernels.backward_kernel, 64)):
            tile = dict(BLOCK_TOKENS=tokens, BLOCK_PROTOTYPES=128, BLOCK_FEATURES=64)
            built = build(kernel, dtype, **flags, **tile)
            assert built.metadata.shared <= 232448, built.metadata.shared  # what one program may have on compute capability 9.0
            assert (dtype == "fp32") == ("wgmma" not in built.asm["ptx"])
            print(kernel.__name__, dtype, gated, convex, built.metadata.shared)
    for gated in (False, True):
        flags = dict(PIECES=8, GATED=gated, BLOCK_TOKENS=64)
        forward = dict(BLOCK_UNITS=tied_kernels.UNITS, TOGETHER=tied_kernels.TOGETHER)
        build(tied_kernels.knots_kernel, dtype, **flags, **forward)
        backward = dict(BLOCK_UNITS=tied_kernels.BACKWARD_UNITS, TOGETHER=tied_kernels.BACKWARD_TOGETHER)
        build(tied_kernels.knots_backward_kernel, dtype, **flags, **backward, OF_PIECES=True)
        print("knots", dtype, gated)
"""


def test_kernels_compile_for_hopper_without_one():
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "0"}
    assert len(python("-c", COMPILE, **environment).splitlines()) == 12


def test_without_triton_everything_else_runs():
    code = """
import sys
sys.modules["triton"] = None
sys.path.insert(0, "tests/support")
import torch
from layers import inputs, make_layer
from hf_kernel_ffn import InputError
from hf_kernel_ffn.gpu import fused
assert fused.triton is None
ffn, x = make_layer(torch.float32, kernel="half-yat", simplex="softmax", intensity="mass"), inputs().float()
ffn(x).sum().backward()
ffn.fused = fused.Fused(required=True)
try:
    ffn(x)
except InputError as error:
    print(error)
"""
    assert "found no Triton, expected triton 3.6 or newer (pip install triton)" in python(
        "-c", code
    )


def test_on_a_cpu_nothing_is_fused_unless_asked_for():
    from types import SimpleNamespace

    from layers import make_layer

    from hf_kernel_ffn.gpu import trial

    ffns = {"a": make_layer(torch.float32, kernel="yat", simplex="softmax", intensity="mass")}
    model = SimpleNamespace(kernel_ffns=lambda: ffns)
    assert trial.choose_kernels(model, "auto") == {} and ffns["a"].fused is None
    assert trial.choose_kernels(model, "never") == {} and ffns["a"].fused is None
    assert trial.choose_kernels(model, "always") == {} and ffns["a"].fused.required
