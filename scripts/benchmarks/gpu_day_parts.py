"""The smaller parts of gpu_day.py, each a command that writes one JSON file."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import torch
import typer
from ffn_variants import ReadoutOptions, Shape, make_readout, make_tied_readout
from torch import Tensor, nn

from hf_kernel_ffn.checkpoint_code.ffn import KernelFFN
from hf_kernel_ffn.checkpoint_code.tied import TiedKernelFFN
from hf_kernel_ffn.gpu import dense_backward, dense_mixture
from hf_kernel_ffn.gpu.fused import (
    Fused,
    reason_against_fused_gather,
    reason_against_fused_readout,
    reason_against_fused_tied,
)
from hf_kernel_ffn.gpu.measuring import copy_bandwidth, interleaved

Device = Annotated[str, typer.Option()]
Json = Annotated[Path, typer.Option("--json")]

SMALL = Shape(96, 160)
"""Of the layers whose accuracy is measured."""
NEW_TOKENS = 64
"""That are generated in a round."""
ROUNDS = 2
"""Of generation, each kept when it is done."""
ACCURACY_SECONDS = 35.0
"""After which no other kind of readout is begun."""
REPORT_TOKENS = 8192
"""On which the package's own report, with the FVU of every layer, is made."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def machine(json_file: Json, device: Device = "cuda") -> None:
    """Versions, the GPU, and how fast it copies and multiplies."""
    where = torch.device(device)
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "triton", "pydantic", "evaluate", "liger_kernel"):
        found[name] = find_version(name)
    size = 8192 if where.type == "cuda" else 256
    if where.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]
        found["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True).stdout
        found["gpu"] = torch.cuda.get_device_name()
    left, right = (torch.randn(size, size, device=where).bfloat16() for _ in range(2))
    work = {"product": lambda: left @ right}
    seconds = interleaved(work, 5, where)["product"]["median"]
    found["bf16_tflops"] = 2 * size**3 / seconds / 1e12
    found["copy_gb_per_second"] = copy_bandwidth(where, 2**32 // 4 if size > 256 else 2**24) / 1e9
    write(json_file, found)


def find_version(name: str) -> str | None:
    """The version of a package; None where it cannot be imported."""
    try:
        module = importlib.import_module(name)
    except Exception:
        return None
    return str(getattr(module, "__version__", "there"))


@app.command()
def accuracy(json_file: Json, device: Device = "cuda") -> None:
    """Relative errors of every kind of readout against float64, plain and by Triton kernels."""
    for kernel in (dense_mixture.forward_tuned, dense_backward.backward_tuned):
        if torch.cuda.is_available():  # one shape of tiles is compiled, not six
            kernel.configs = kernel.configs[-1:]
    found: list[dict[str, Any]] = []
    end = time.monotonic() + ACCURACY_SECONDS
    for name, options in list_kinds().items():
        if time.monotonic() > end:
            break
        torch.manual_seed(0)
        ffn = make_tied_readout(SMALL) if options is None else make_readout(SMALL, 160, options)
        for dtype in (torch.float32, torch.bfloat16):
            entry = {"readout": name, "dtype": str(dtype).removeprefix("torch.")}
            found.append(entry | compare_with_float64(copy.deepcopy(ffn).to(device, dtype)))
            write(json_file, found)


def list_kinds() -> dict[str, ReadoutOptions | None]:
    """Kinds of readout by name, what is used most first; None for tied rows."""
    kinds: dict[str, ReadoutOptions | None] = {"tied rows": None}
    for intensity in ("mass", "none"):
        for kernel, values in (("half-yat", "fixed"), ("yat", "fixed"), ("half-yat", "gated")):
            name = f"{kernel}, intensity {intensity}, {values}"
            kinds[name] = ReadoutOptions(kernel=kernel, intensity=intensity, values=values)
        simplex = "threshold" if intensity == "mass" else "top-k"
        kinds[f"half-yat, {simplex}"] = ReadoutOptions(16, simplex)
    return kinds


def compare_with_float64(ffn: KernelFFN | TiedKernelFFN) -> dict[str, Any]:
    """Worst relative errors of the output and of any gradient, ``plain`` and ``fused``; or why the
    Triton kernels do not serve ``ffn``."""
    weight = ffn.input_prototypes.weight
    sparse = isinstance(ffn, KernelFFN) and ffn.config.settings.sparse
    x = 3 * torch.randn(8 if sparse else 200, SMALL.hidden_size).to(weight)
    expected = run(copy.deepcopy(ffn).double(), x.double(), gradients=not sparse)
    found: dict[str, Any] = {"plain": errors(run(ffn, x, gradients=not sparse), expected)}
    with torch.set_grad_enabled(not sparse):
        reason = find_reason(ffn, x)
    if reason is not None:
        return found | {"not fused": reason}
    ffn.fused = Fused(required=True)
    try:
        found["fused"] = errors(run(ffn, x, gradients=not sparse), expected)
    except Exception as error:  # of Triton or a driver; the others go on
        found["failed"] = f"{type(error).__name__}: {error}"[-600:]
    return found


def find_reason(ffn: KernelFFN | TiedKernelFFN, x: Tensor) -> str | None:
    """Why no Triton kernel serves ``ffn`` at ``x``; None if one does."""
    if isinstance(ffn, TiedKernelFFN):
        return reason_against_fused_tied(ffn, x)
    if ffn.config.settings.sparse:
        return reason_against_fused_gather(ffn, x)
    return reason_against_fused_readout(ffn, x)


def run(ffn: nn.Module, x: Tensor, *, gradients: bool) -> dict[str, Tensor]:
    """The output of ``ffn`` at ``x`` and, if asked for, all gradients, by name."""
    with torch.set_grad_enabled(gradients):
        x = x.detach().requires_grad_(gradients)
        output = ffn(x)
    found = {"output": output.detach()}
    if gradients:
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        named = {"x": x, **dict(ffn.named_parameters())}
        grads = torch.autograd.grad(
            output, list(named.values()), direction.to(output), allow_unused=True
        )
        found |= {name: grad for name, grad in zip(named, grads) if grad is not None}
    return found


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """Relative errors of the output and of the worst gradient."""
    relative = {
        name: ((found[name].double() - exact).norm() / exact.norm()).item()
        for name, exact in expected.items()
        if exact.norm() > 0
    }
    output = relative.pop("output")
    worst = max(relative, key=relative.__getitem__, default=None)
    if worst is None:
        return {"output": output}
    return {"output": output, "gradient": relative[worst], "worst": worst}


@app.command()
def convert(model: str, out: Path, json_file: Json, device: Device = "cuda") -> None:
    """The command `convert MODEL OUT`: its seconds and memory."""
    from hf_kernel_ffn.cli.app import app as commands

    began = time.perf_counter()
    commands(["convert", model, str(out), "--device", device], standalone_mode=False)
    write(json_file, {"seconds": time.perf_counter() - began, "peak_gpu_gb": find_peak()})


@app.command()
def evaluate(
    teacher: str,
    student: str,
    text: str,
    json_file: Json,
    tokens: Annotated[int, typer.Option()] = 32_768,
    device: Device = "cuda",
) -> None:
    """ΔCE, KL and top-1 on rows with the start token; then, by the package evaluate, FVU too."""
    from real_fidelity import compare, read_rows

    from hf_kernel_ffn.storage.loading import load_student, load_teacher, load_tokenizer

    stock = load_teacher(teacher, "float32", device)
    converted = load_student(student, "float32", device)
    tokenizer = load_tokenizer(teacher)
    ids = read_rows(tokenizer, text, tokens).to(device)
    found: dict[str, Any] = dict(compare(converted, stock, ids))
    write(json_file, found)
    from hf_kernel_ffn.evaluation.report import evaluate_student

    rows = ids[: max(1, REPORT_TOKENS // ids.shape[1])].cpu()
    report = evaluate_student(converted, stock, rows, tokenizer=tokenizer, batch_tokens=4096)
    layers = report.pop("layers")
    found["report"] = report
    names = [name for name, value in layers[0].items() if isinstance(value, (int, float))]
    found["mean_of_layers"] = {
        name: statistics.fmean(layer[name] for layer in layers if layer[name] is not None)
        for name in names
    }
    found["largest_fvu"] = max(layer["fvu"] for layer in layers)
    write(json_file, found)


@app.command()
def generate(teacher: str, student: str, json_file: Json, device: Device = "cuda") -> None:
    """Tokens per second of teacher and student, greedy, one row, in bfloat16."""
    from generation_speed import PROMPT, compare_speeds

    from hf_kernel_ffn.storage.loading import load_student, load_teacher, load_tokenizer

    count = NEW_TOKENS if device == "cuda" else 16
    ids = load_tokenizer(teacher)(PROMPT, return_tensors="pt")["input_ids"].to(device)
    models = {
        "teacher": load_teacher(teacher, "bfloat16", device),
        "student": load_student(student, "bfloat16", device),
    }
    for rounds in range(1, ROUNDS + 1):
        found = compare_speeds(models, ids, tokens=count, rounds=rounds)
        write(json_file, {"tokens": count, **found})


@app.command()
def tests(json_file: Json, device: Device = "cuda") -> None:
    """The tests in tests/gpu, the cases of the Triton kernels by several processes if xdist is
    there, and others that carry the marker gpu."""
    marked = [
        str(file)
        for file in sorted(Path("tests").rglob("test_*.py"))
        if "mark.gpu" in file.read_text(encoding="utf-8")
    ]
    runs = {"tests/gpu": ["tests/gpu"]}
    if device == "cuda" and importlib.util.find_spec("xdist"):
        runs["tests/gpu"] += ["--deselect", "tests/gpu/test_fused.py::test_cases"]
        cases = ["tests/support/fused_cases.py", "tests/support/fused_tied_cases.py"]
        runs["fused cases"] = [*cases, "-n", "8"]
    if marked:
        runs["marked gpu"] = [*marked, "-m", "gpu"]
    found: dict[str, Any] = {}
    for name, arguments in runs.items():
        junit = json_file.with_suffix(".xml")
        junit.unlink(missing_ok=True)
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        subprocess.run([sys.executable, *pytest, f"--junitxml={junit}", *arguments])
        found[name] = read_junit(junit)
        write(json_file, found)


def read_junit(file: Path) -> dict[str, Any]:
    """How many tests there were and failed, and the first lines of what failed."""
    if not file.exists():
        return {"error": "no report"}
    suite = next(ElementTree.parse(file).getroot().iter("testsuite"))
    counts: dict[str, Any] = {
        name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    }
    counts["seconds"] = float(suite.get("time", 0))
    counts["failed"] = [
        f"{case.get('name')}: {trouble.get('message', '')[:300]}"
        for case in suite.iter("testcase")
        for trouble in (*case.findall("failure"), *case.findall("error"))
    ][:20]
    return counts


def find_peak() -> float:
    """The most GB of the GPU's memory that this process has held."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def wait(device: str) -> None:
    """Wait until the GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def write(file: Path, found: object) -> None:
    """Write ``found`` as JSON."""
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    app()
