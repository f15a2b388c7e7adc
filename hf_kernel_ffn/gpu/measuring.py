"""Time, peak memory and bytes moved of small pieces of work, on a CPU or on CUDA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

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
LEAST_SECONDS = 0.02
"""That one measurement takes: a clock's resolution is small beside it."""

Work = Callable[[], object]
Clock = Callable[[], float]


def interleaved(
    work: Mapping[str, Work],
    repeats: int,
    device: torch.device,
    clock: str = "wall",
    least: float = LEAST_SECONDS,
) -> dict[str, dict]:
    """Time every piece of work: rounds in which each has its turn, so that a disturbance hits all.

    Args:
        repeats: rounds; a first one, uncounted, warms up.
        clock: ``wall``, or ``cpu``: the processor time of this process, which other processes on a
            busy machine disturb less.
        least: seconds that one measurement takes at least: short work is called again within it.

    Returns:
        seconds per call, by name: ``median``, and the ``low`` and ``high`` quartiles, of the
        ``rounds``.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    calls = {}
    for name, once in work.items():
        once()
        calls[name] = max(1, round(least / max(_time_calls(once, 1, now, device), 1e-6)))

    rounds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, once in work.items():
            rounds[name].append(_time_calls(once, calls[name], now, device))
    return {name: {**quartiles(seconds), "rounds": seconds} for name, seconds in rounds.items()}


def ratio(times: Mapping[str, dict], name: str, against: str) -> dict[str, float]:
    """Divide the time of ``name`` by that of ``against``, round by round: median and quartiles."""
    pairs = zip(times[name]["rounds"], times[against]["rounds"], strict=True)
    return quartiles([seconds / others for seconds, others in pairs])


def quartiles(values: list[float]) -> dict[str, float]:
    """The ``median`` of ``values``, and the quartiles ``low`` and ``high``."""
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def _time_calls(once: Work, calls: int, now: Clock, device: torch.device) -> float:
    """Seconds per call of ``once``."""
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
    """Return the bytes that ``once`` holds at its peak beyond what was allocated before.

    Activations, temporaries and gradients are seen; what libraries take by themselves, such as
    packed matrices of a CPU product, is not.
    """
    once()
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        once()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(_trace_held_bytes(once), default=0)


def memory_for_backward(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Return the bytes that the output of ``forward`` keeps alive for its backward pass, the output
    itself included."""
    forward()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        output = forward()
        held = torch.cuda.memory_allocated(device) - before
        del output
        return held
    outputs: list[Tensor] = []
    trace = _trace_held_bytes(lambda: outputs.append(forward()))
    return trace[-1] if trace else 0


def _trace_held_bytes(once: Work) -> list[int]:
    """Bytes held after each allocation and release on the CPU while ``once`` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        once()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return list(accumulate(event.nbytes() for event in events))


class _ByteCounter(TorchDispatchMode):
    """Counts what every operation reads and writes; a view is free, and a gather reads what it
    returns."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.is_view or "empty" in func.__name__:
            return output
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if func.__name__.split(".")[0] in GATHERS:
            inputs = inputs[1:] + outputs
        self.moved += sum(map(_count_bytes, inputs + outputs))
        return output


def _count_bytes(tensor: Tensor) -> int:
    """Bytes behind ``tensor``, a broadcast dimension once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count * tensor.element_size()


def bytes_moved(once: Work) -> int:
    """Return the bytes that the operations of ``once`` read and write, were there no cache between
    them."""
    with _ByteCounter() as counter:
        once()
    return counter.moved


def copy_bandwidth(device: torch.device, size: int = 2**28, repeats: int = 5) -> float:
    """Measure the bytes per second, read and written, of copying ``size`` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, repeats, device)
    return 2 * size / times["copy"]["median"]
