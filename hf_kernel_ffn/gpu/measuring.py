"""Time, peak memory and bytes moved of small pieces of work, on a CPU or on CUDA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GATHERS = (
    "embedding",
    "_embedding_bag_forward_only",
    "_embedding_bag",
    "index_select",
    "index",
    "gather",
)
"""Operations that read of their first tensor only as much as they were asked for."""

Work = Callable[[], object]


def interleaved(
    work: dict[str, Work],
    repeats: int,
    device: torch.device,
    clock: str = "wall",
    least: float = 0.02,
) -> dict:
    """Seconds per call of every piece of work, by name: rounds in which each has its turn, so that a disturbance hits all.

    Args:
        repeats: rounds; a first one, uncounted, warms up.
        clock: ``wall``, or ``cpu``: the processor time of this process, which other processes on a busy machine disturb less.
        least: seconds that one measurement takes at least: short work is called again within it.

    Returns:
        by name: ``median``, and the ``low`` and ``high`` quartiles, of the rounds.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    calls = {}
    for name, once in work.items():
        once()
        calls[name] = max(1, round(least / max(_seconds(once, 1, now, device), 1e-6)))
    rounds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, once in work.items():
            rounds[name].append(_seconds(once, calls[name], now, device))
    return {name: {**_quartiles(found), "rounds": found} for name, found in rounds.items()}


def ratio(times: dict, name: str, against: str) -> dict:
    """Time of ``name`` over that of ``against``, round by round: median and quartiles."""
    return _quartiles([a / b for a, b in zip(times[name]["rounds"], times[against]["rounds"])])


def _quartiles(values: list[float]) -> dict:
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": median, "low": low, "high": high}


def _seconds(once: Work, calls: int, now: Callable[[], float], device: torch.device) -> float:
    _wait(device)
    start = now()
    for _ in range(calls):
        once()
    _wait(device)
    return (now() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(once: Work, device: torch.device) -> int:
    """Bytes that ``once`` holds at its peak beyond what was allocated before: activations, temporaries and gradients. What
    libraries take by themselves, such as packed matrices of a CPU product, is not seen."""
    once()
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        once()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(_held(once), default=0)


def memory_for_backward(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes that the output of ``forward`` keeps alive for its backward pass, the output itself included."""
    forward()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        output = forward()
        found = torch.cuda.memory_allocated(device) - before
        del output
        return found
    kept: list[Tensor] = []
    held = _held(lambda: kept.append(forward()))
    return held[-1] if held else 0


def _held(once: Work) -> list[int]:
    """Bytes held after each allocation and release on the CPU while ``once`` runs."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        once()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


class _Bytes(TorchDispatchMode):
    """Counts what every operation reads and writes; a view is free, and a gather reads what it returns."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        read = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        written = [o for o in tree_leaves(output) if isinstance(o, Tensor)]
        if func.is_view or "empty" in func.__name__:
            return output
        if func.__name__.split(".")[0] in GATHERS:
            read = read[1:]
            self.moved += sum(map(_size, written))
        self.moved += sum(map(_size, read)) + sum(map(_size, written))
        return output


def _size(tensor: Tensor) -> int:
    """Bytes behind ``tensor``, a broadcast dimension once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride()):
        count *= length if stride else 1
    return count * tensor.element_size()


def bytes_moved(once: Work) -> int:
    """Bytes that the operations of ``once`` read and write, were there no cache between them."""
    with _Bytes() as counted:
        once()
    return counted.moved


def copy_bandwidth(device: torch.device, size: int = 2**28, repeats: int = 5) -> float:
    """Bytes per second, read and written, of copying ``size`` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, repeats, device)
    return 2 * size / times["copy"]["median"]
