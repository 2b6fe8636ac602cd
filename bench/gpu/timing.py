"""Clocks: CUDA events on a GPU with the second-level cache flushed, the processor's clock on a CPU; kernels counted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rlsd.bench import measure

FLUSH_BYTES = 1 << 28  # several times any GPU's second-level cache
HEAD_START = 2_000_000  # cycles, about a millisecond, in which the host queues what is then timed


class Clock:
    """Seconds of one call on `device`.

    flush: the cache is overwritten before. whole: the call's work may be on any stream, so that the device is waited
    for before the last event; without it only the current stream is timed, free of the host's latency.
    """

    def __init__(self, device: torch.device, *, flush: bool = False, whole: bool = False):
        self.device, self.whole = device, whole
        self.cache = torch.empty(FLUSH_BYTES // 4, device=device) if flush and device.type == "cuda" else None

    def __call__(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            return measure.wall_seconds(run)
        if self.cache is not None:
            self.cache.zero_()
        if self.whole:
            torch.cuda.synchronize(self.device)
        else:
            torch.cuda._sleep(HEAD_START)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        if self.whole:
            torch.cuda.synchronize(self.device)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def seconds(
    runs: Mapping[str, Callable[[], Any]], clock: Clock, rounds: int, limit: float = 10.0
) -> dict[str, list[float]]:
    """Interleaved rounds after one call of each to warm up: at most `rounds`, begun within `limit` seconds."""
    for run in runs.values():
        run()
    return measure.interleaved(runs, rounds, clock, limit)


def milliseconds(values: list[float]) -> dict[str, float]:
    """Quartiles of seconds, in milliseconds."""
    return measure.quartiles([1e3 * value for value in values])


CALL = re.compile(r"cu(da)?[A-Z]")  # of the driver or the runtime: cuLaunchKernel, cudaLaunchKernelExC, ...
LAUNCHES = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")
WAITS = ("StreamSynchronize", "EventSynchronize", "CtxSynchronize")  # for the device as a whole waits the profiler


def profiled(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Of one call, whoever makes them in this process: launches, synchronisations (host waits), and idle, the share of
    the time from its first kernel to its last in which the device ran none. Nothing on a CPU, nor where the profiler
    does not work: a figure that was timed is not lost to that."""
    if device.type != "cuda":
        return {}
    try:
        return _profiled(run, device)
    except Exception as error:
        print(f"rlsd.bench.gpu: not profiled: {type(error).__name__}: {error}", flush=True)
        return {}


def _profiled(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        run()
    kernels = [e.time_range for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    found = counts({event.key: event.count for event in profile.key_averages()})
    return {**found, "idle": idle_share([(each.start, each.end) for each in kernels])}


def idle_share(intervals: Sequence[tuple[float, float]]) -> float:
    """The share of the span of the intervals that none of them covers."""
    covered, end = 0.0, -math.inf
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    span = end - min((start for start, _ in intervals), default=end)
    return 1 - covered / span if span > 0 else 0.0


def counts(events: Mapping[str, int]) -> dict[str, int]:
    """Launches and host waits among a profile's events: name -> how often."""
    calls = {name: count for name, count in events.items() if CALL.match(name)}

    def total(words: tuple[str, ...]) -> int:
        return sum(count for name, count in calls.items() if any(word in name for word in words))

    return {"launches": total(LAUNCHES), "synchronisations": total(WAITS)}
