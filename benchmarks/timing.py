"""How every GPU benchmark here measures: time by events, time by graph replay, time by kernel, and peak memory.

A function is called on input sets in rotation, so that no call finds its inputs in the cache, after calls that warm it
up. On a CPU the same functions use the host's clock and report no kernels and no memory; that serves the tests.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

# Without it the profiler's library stays attached after its first use, and every later launch costs twice as much.
os.environ.setdefault("TEARDOWN_CUPTI", "1")

Function = Callable[..., Any]
# The first item of every set is a tensor on the device.
InputSets = Sequence[tuple[Any, ...]]

MAX_RUNS = 100
# Turns of the loop that tells how fast the host is.
HOST_LOOP = 200_000
# Together the input sets are this many times the second-level cache.
CACHE_MULTIPLE = 4


@dataclass(frozen=True)
class Timing:
    """Times of one function. `first_s` includes compilation; `ms` is the median of `num_runs` calls.

    `spread` is the distance of the 10th from the 90th percentile as a share of the median. `host_loop_ms` tells
    how fast the host was: what the function of that name took behind the calls.
    """

    ms: float
    spread: float
    num_runs: int
    first_s: float
    host_loop_ms: float


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def num_input_sets(num_bytes: int, device: torch.device) -> int:
    """How many input sets of `num_bytes` to rotate through: at least 2, at most 8."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(8, max(2, -(-CACHE_MULTIPLE * cache // num_bytes)))


def measure(function: Function, input_sets: InputSets, *, budget_s: float, min_runs: int = 5) -> Timing:
    """Median time of one call, launches included, with the calls queued one behind the other.

    Args:
        function: called as `function(*inputs)`.
        input_sets: the inputs to rotate through.
        budget_s: about how long to measure, in seconds; `min_runs` calls are made in any case.
        min_runs: fewest timed calls.
    """
    device = input_sets[0][0].device
    begin = time.perf_counter()
    function(*input_sets[0])
    synchronize(device)
    first_s = time.perf_counter() - begin
    begin = time.perf_counter()
    for inputs in islice(cycle(input_sets), 2):
        function(*inputs)
    synchronize(device)
    estimate_s = (time.perf_counter() - begin) / 2
    num_runs = min(MAX_RUNS, max(min_runs, int(budget_s / max(estimate_s, 1e-6))))
    times = _call_times(function, input_sets, num_runs)
    deciles = quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
    return Timing(median(times), (deciles[8] - deciles[0]) / median(times), num_runs, first_s, host_loop_ms())


def host_loop_ms() -> float:
    """Milliseconds of a fixed Python loop. A processor that others share is slower at times, and then so are calls."""
    begin = time.perf_counter()
    for _ in range(HOST_LOOP):
        pass
    return (time.perf_counter() - begin) * 1e3


def _call_times(function: Function, input_sets: InputSets, num_runs: int) -> list[float]:
    """Milliseconds of each of `num_runs` calls."""
    if input_sets[0][0].device.type != "cuda":
        times = []
        for inputs in islice(cycle(input_sets), num_runs):
            begin = time.perf_counter()
            function(*inputs)
            times.append((time.perf_counter() - begin) * 1e3)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_runs + 1)]
    events[0].record()
    for inputs, event in zip(cycle(input_sets), events[1:], strict=False):
        function(*inputs)
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def measure_replay(function: Function, input_sets: InputSets, num_runs: int) -> float:
    """Median milliseconds of one call replayed as a CUDA graph, which leaves the host's share out.

    Raises:
        RuntimeError: what stands in the way of capturing it.
    """
    if input_sets[0][0].device.type != "cuda":
        raise RuntimeError("CUDA graphs need a CUDA device")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*input_sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    pool = torch.cuda.graph_pool_handle()
    graphs: list[torch.cuda.CUDAGraph] = []
    for inputs in input_sets:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            function(*inputs)
        graphs.append(graph)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_runs + 1)]
    for graph in graphs:
        graph.replay()
    events[0].record()
    for graph, event in zip(cycle(graphs), events[1:], strict=False):
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return median(before.elapsed_time(after) for before, after in pairwise(events))


def measure_kernels(function: Function, input_sets: InputSets, num_runs: int = 5) -> dict[str, float]:
    """Milliseconds per call that each CUDA kernel runs, by its name, longest first. Empty on a CPU."""
    if input_sets[0][0].device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for inputs in islice(cycle(input_sets), num_runs):
            function(*inputs)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    total: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            total[event["name"]] += event["dur"] / 1e3 / num_runs
    return dict(total.most_common())


def measure_peak_extra_bytes(function: Function, inputs: tuple[Any, ...]) -> int | None:
    """Most memory allocated during one warm call beyond what was before it; results count. None on a CPU."""
    if inputs[0].device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(*inputs)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before


def short_error(error: BaseException, length: int = 400) -> str:
    """An exception in one line, for a table or a record."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= length else text[: length - 3] + "..."
