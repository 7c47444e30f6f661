"""Clocks: interleaved CPU timing, GPU device time and call latency, copy bandwidth, peak memory.

A `call` below is a function of one argument, the index of the input set that it works on, and returns what it produced.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dlkernels.testing import no_gc

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise
Call = Callable[[int], Any]
MIN_ROUNDS, MAX_ROUNDS = 10, 400
BLOCK_S = 400e-6  # a CPU sample is the mean over a block of calls at least this long
GRAPH_S = 300e-6  # a GPU sample is the mean over a graph replay of about this long
SETTLED, PATIENCE = 0.03, 2.0  # more rounds, for up to two budgets, while even and odd rounds differ by over 3 %
REPLAYS, MIN_REPLAYS = 30, 10
REPLAY_S = 1.0  # a candidate's replays are fewer than REPLAYS where they would take longer
LATENCY_CALLS, LATENCY_S = 200, 20e-3  # a block of calls; fewer, where so many would take longer


def settle_allocator() -> None:
    """Let glibc keep freed memory, for every candidate alike.

    By default each allocation above 32 MB is mapped and faulted anew, which times the kernel's page clearing, and most
    of all that of candidates with many temporaries.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped on its own
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def summary(samples: list[float]) -> dict[str, float]:
    """Order statistics in microseconds; `spread` compares the minima of even and odd rounds (an A-A test)."""
    ordered = sorted(samples)
    pick = lambda q: ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] * 1e6  # noqa: E731
    halves = min(samples[::2]), min(samples[1::2] or samples)
    return {
        "min_us": ordered[0] * 1e6, "median_us": statistics.median(ordered) * 1e6, "p20_us": pick(0.2),
        "p80_us": pick(0.8), "rounds": len(samples), "spread": abs(halves[0] - halves[1]) / ordered[0],
    }  # fmt: skip


# CPU ------------------------------------------------------------------------------------------------------------------


def _block(call: Call, inner: int) -> float:
    clock = time.perf_counter
    start = clock()
    for _ in range(inner):
        call(0)
    return (clock() - start) / inner


def interleave(calls: dict[str, Call], budget_s: float) -> dict[str, list[float]]:
    """Seconds per call: every candidate once a round, the order rotated, so that noise hits all alike."""
    inner, cost = {}, {}
    for name, call in calls.items():
        call(0), call(0)
        once = min(_block(call, 1) for _ in range(3))
        inner[name] = max(1, math.ceil(BLOCK_S / once))
        cost[name] = (inner[name] + 1) * once
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_s / sum(cost.values()))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    deadline = time.perf_counter() + PATIENCE * max(budget_s, rounds * sum(cost.values()))
    with no_gc():
        for r in range(2 * MAX_ROUNDS):
            for name in names[r % len(names) :] + names[: r % len(names)]:
                calls[name](0)  # its own data into the caches, the predecessor's out
                samples[name].append(_block(calls[name], inner[name]))
            settled = r + 1 >= rounds and max(summary(s)["spread"] for s in samples.values()) < SETTLED
            if settled or (r + 1 >= rounds and time.perf_counter() > deadline):
                break
    return samples


def peak_bytes_cpu(call: Call) -> int:
    """Most memory that one call holds at a time, beyond its inputs, from the allocator's trace."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call(0)
    changes = []
    stack = list(prof.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag.name == "Allocation":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        held += change
        peak = max(peak, held)
    return peak


# GPU ------------------------------------------------------------------------------------------------------------------


# What this file and gate_worker.py use of torch.cuda; gpu_gate.py looks for these names, on a CPU too.
CUDA_NAMES = (
    "CUDAGraph", "Event", "Stream", "_sleep", "cudart", "current_stream", "empty_cache", "get_device_capability",
    "get_device_properties", "graph", "is_available", "max_memory_allocated", "memory_allocated",
    "reset_peak_memory_stats", "set_sync_debug_mode", "stream", "synchronize",
)  # fmt: skip


class Captured:
    """A graph, and what its calls return: memory that each replay writes anew."""

    def __init__(self, graph: Any, kept: Any) -> None:
        self.replay, self.kept = graph.replay, kept


class Cuda:
    """What the GPU clock needs of torch.cuda; `Rehearsal` stands in for it where there is no GPU."""

    device = "cuda"
    doubtful = ""  # why this process had better not measure another case

    def alive(self) -> bool:
        """False after an illegal access or a failed launch: nothing runs in this process any more."""
        try:
            torch.cuda.synchronize()
        except Exception:
            return False
        return True

    def release(self) -> None:
        """What a case has left behind, before the next one."""
        gc.collect()
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Any operation that waits for the device raises."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(0).L2_cache_size

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def warm(self, function: Callable[[], Any]) -> None:
        """Outside capture, on a side stream, as capture asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def capture(self, function: Callable[[], Any]) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = function()  # outputs stay alive, so that no call reuses (and finds in L2) another's memory
        return Captured(graph, kept)

    def peak_bytes(self, call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call(0)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak


class Rehearsal(Cuda):
    """The GPU clock's code path on CPU tensors: finds typos, its times mean nothing."""

    device = "cpu"

    class _Event:
        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, other: Rehearsal._Event) -> float:
            return (other.at - self.at) * 1e3

    class _Graph:
        def __init__(self, function: Callable[[], Any]) -> None:
            self.function = function
            self.replay()

        def replay(self) -> None:
            self.kept = self.function()

    def alive(self) -> bool:
        return True

    def release(self) -> None:
        pass

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def l2_bytes(self) -> int:
        return 1 << 12

    def synchronize(self) -> None:
        pass

    def event(self) -> Any:
        return self._Event()

    def warm(self, function: Callable[[], Any]) -> None:
        function()

    def capture(self, function: Callable[[], Any]) -> Any:
        return self._Graph(function)

    def peak_bytes(self, call: Call) -> int:
        return peak_bytes_cpu(call)


def buffer_sets(gpu: Cuda, bytes_per_call: int, most: int = 256) -> tuple[int, bool]:
    """How many input sets to rotate over, and whether together they exceed 4 x L2 (cold) or not (hot)."""
    wanted = math.ceil(4 * gpu.l2_bytes() / max(bytes_per_call, 1)) + 1
    return min(wanted, most), wanted <= most


def device_time(gpu: Cuda, calls: dict[str, Call], sets: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of device time per call: one CUDA graph of calls over all input sets, replays timed by events.

    Returns the samples, and for each candidate that could not be captured the reason. What waits for the device is
    found before its capture: one that fails half way can leave the allocator and the generators of the process in it.
    """
    graphs, failed = {}, {}
    for name, call in calls.items():
        try:
            gpu.warm(lambda call=call: call(0))
            with gpu.no_sync():
                call(0)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            gpu.synchronize()
            continue
        try:
            graphs[name] = gpu.capture(lambda call=call: [call(i) for i in range(sets)])
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            gpu.doubtful = f"the capture of {name} failed"
            gpu.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    repeat = {}
    for name, graph in graphs.items():
        graph.replay()
        took = _timed_replays(gpu, graph, 1)
        repeat[name] = max(1, math.ceil(GRAPH_S / max(took, 1e-7)))
    names = list(graphs)
    started = time.perf_counter()
    for r in range(REPLAYS if names else 0):
        if r >= MIN_REPLAYS and time.perf_counter() - started > REPLAY_S * len(names):
            break
        for name in names[r % len(names) :] + names[: r % len(names)]:
            samples[name].append(_timed_replays(gpu, graphs[name], repeat[name]) / (repeat[name] * sets))
    return samples, failed


def _timed_replays(gpu: Cuda, graph: Any, times: int) -> float:
    start, end = gpu.event(), gpu.event()
    gpu.synchronize()
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    gpu.synchronize()
    return start.elapsed_time(end) / 1e3


def call_latency(gpu: Cuda, calls: dict[str, Call], sets: int, repeats: int = 7) -> dict[str, dict[str, float]]:
    """Microseconds per call as Python sees it: up to 200 calls, one sync; `host_us` is the time to enqueue them."""
    clock = time.perf_counter
    count = {name: _latency_calls(gpu, call) for name, call in calls.items()}
    total: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    with no_gc():
        for _ in range(repeats):
            for name, call in calls.items():
                call(0)
                gpu.synchronize()
                start = clock()
                for i in range(count[name]):
                    call(i % sets)
                enqueued = clock()
                gpu.synchronize()
                total[name].append((clock() - start) / count[name])
                host[name].append((enqueued - start) / count[name])
    return {
        name: {"latency_us": statistics.median(total[name]) * 1e6, "host_us": statistics.median(host[name]) * 1e6,
               "latency_calls": count[name]}
        for name in calls
    }  # fmt: skip


def _latency_calls(gpu: Cuda, call: Call) -> int:
    """So many that a block takes LATENCY_S at most: one of slow calls is as exact with few of them."""
    call(0)
    gpu.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        call(0)
    gpu.synchronize()
    once = (time.perf_counter() - start) / 3
    return max(10, min(LATENCY_CALLS, int(LATENCY_S / max(once, 1e-9))))


# The roof: plain copies on this machine -------------------------------------------------------------------------------


def copy_curve(device: str, largest: int | None = None) -> list[tuple[int, float]]:
    """[(bytes read + written, GB/s)] of `dst.copy_(src)`, from small to large: what memory gives at each size."""
    gpu = device == "cuda"
    largest = largest or ((8 << 30) if gpu else (512 << 20))
    size, curve = 1 << 14, []
    while size <= largest:
        if gpu:
            sets, _ = buffer_sets(Cuda(), size, most=64)
            pairs = [(torch.rand(size // 8, device=device), torch.empty(size // 8, device=device)) for _ in range(sets)]
            samples, _ = device_time(Cuda(), {"copy": lambda i, pairs=pairs: pairs[i][1].copy_(pairs[i][0])}, sets)
            seconds = statistics.median(samples["copy"])
        else:
            src, dst = torch.rand(size // 8), torch.empty(size // 8)
            seconds = min(interleave({"copy": lambda _, s=src, d=dst: d.copy_(s)}, 0.12)["copy"])
        curve.append((size, size / seconds / 1e9))
        size *= 4 if size < (1 << 20) else 2
    return curve


def copy_gbps_at(curve: list[tuple[int, float]], size: float) -> float:
    """The copy bandwidth at a number of bytes, between the measured sizes by interpolation in the logarithm."""
    if size <= curve[0][0]:  # below, the cost of a call rules: time is constant
        return curve[0][1] * size / curve[0][0]
    for (a, low), (b, high) in itertools.pairwise(curve):
        if size <= b:
            return low + (high - low) * math.log(size / a) / math.log(b / a)
    return curve[-1][1]
