"""A: full steps, particle-steps per second over N. E: the engine's time outside kernels, launches and host waits."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rlsd.bench import measure
from rlsd.bench.engine import outside
from rlsd.bench.gpu import LeftOut, Line, first_line
from rlsd.bench.gpu.subject import Subject, Wrong, free
from rlsd.bench.gpu.timing import Clock, profiled, seconds
from rlsd.engine import RlsdError, Status

GRAPHS = ("denoiser", "decoder", "decoder_pull", "features", "operators")  # of rlsd_stats
STEPS_AT_LEAST = 8  # particle-steps in one timed call, so that small N are not timed by single steps


def full_steps(subject: Subject, particles: int, methods: Sequence[str]) -> list[Line]:
    """Section A for one N, the engine beside `methods`; and E from the same run."""
    common: Line = {"case": f"{subject.name} N={particles}", "network": subject.name, "particles": particles}
    try:
        subject.check("engine", particles)
        free()
        with subject.in_flight(particles):  # before the methods try how much memory there is for them
            return _full_steps(subject, particles, methods, common)
    except Exception as error:
        return [{"section": "A", **common, "method": "engine", **without_figure(error)}]


def _full_steps(subject: Subject, particles: int, methods: Sequence[str], common: Line) -> list[Line]:
    """The same with the engine's job in flight."""
    bench, steps, lines = subject.bench, max(1, STEPS_AT_LEAST // particles), []
    runs: dict[str, Callable[[], Any]] = {"engine": ticks(subject, steps)}
    for name in methods:
        try:
            subject.check(name, particles)
            runs[name] = subject.method(name).stepping(particles, steps)
            runs[name]()  # what does not fit in memory shows before the others wait for it
        except Exception as error:
            runs.pop(name, None)
            lines.append({"section": "A", **common, "method": name, **without_figure(error)})
    free()
    before = subject.engine.stats()
    times = seconds(runs, Clock(bench.device, whole=True), bench.rounds, bench.limit)
    after = subject.engine.stats()
    seen = profiled(subject.engine.tick, bench.device)
    least = subject.work.least_seconds(bench.roof, particles)
    for name, values in times.items():
        rates = measure.quartiles([particles * steps / value for value in values])
        lines.append(
            {
                "section": "A", **common, "method": name, "unit": "particle-steps/s", **rates,
                "rounds": len(values), "error": subject.errors[name, particles],
                "roofline_share": round(rates["median"] * least / particles, 4),
                "operations": subject.work.operations(particles), "bytes": subject.work.moved(particles),
                **mode(subject, name),
            }
        )  # fmt: skip
    next(line for line in lines if line["method"] == "engine" and "median" in line)["speedup"] = speedups(times)
    return [*lines, host_line(common, before, after, seen)]


def mode(subject: Subject, name: str) -> Line:
    """torch.compile's mode, for a compiled method."""
    return {"mode": subject.made[name].mode} if name == "compiled" else {}


def ticks(subject: Subject, steps: int) -> Callable[[], None]:
    """So many steps of what the engine has in flight."""

    def run() -> None:
        for _ in range(steps):
            subject.engine.tick()

    return run


def without_figure(error: Exception) -> Line:
    """The rest of a line that has no figure, because the result was wrong, cannot be had here, or something broke."""
    if isinstance(error, RlsdError) and error.status == Status.OUT_OF_MEMORY:
        return {"left_out": str(error)}
    if isinstance(error, (Wrong, RlsdError)):
        return {"wrong": str(error)}
    if isinstance(error, torch.OutOfMemoryError):
        free()
        return {"left_out": "out of memory"}
    if isinstance(error, LeftOut):
        return {"left_out": str(error)}
    traceback.print_exception(error)
    return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def speedups(times: Mapping[str, list[float]], ours: str = "engine") -> dict[str, float]:
    """How many times as fast ours is as each other: medians of the rounds' ratios."""
    ratios = {
        name: [theirs / mine for mine, theirs in zip(times[ours], values)]
        for name, values in times.items()
        if name != ours
    }
    return {name: measure.quartiles(values)["median"] for name, values in ratios.items()}


def host_line(common: Line, before: Mapping[str, float], after: Mapping[str, float], seen: Mapping[str, float]) -> Line:
    """Section E: the share of the engine's time outside kernels; launches and host waits of one step.

    On a CPU it is the time outside the graphs. On a GPU it is the larger of two: what the engine's CUDA events leave
    of the time in ticks, and the gaps between kernels that the profiler saw in one tick, where it works.
    """
    spent = {key: after[key] - before[key] for key in after}
    line: Line = {"section": "E", **common, "method": "engine", "unit": "share"}
    on_gpu = spent.get("launches", 0) > 0
    if on_gpu:
        kernels = sum(spent[name] for name in (*GRAPHS, "repulsion", "elementwise"))
        line["outside_events"] = share = round(1 - kernels / spent["wall"], 5)
        if seen:
            line["gaps"] = round(seen["idle"], 5)
            share = max(share, line["gaps"])
    else:
        share = outside(dict(before), dict(after))
    line |= {"what": "time outside kernels" if on_gpu else "time outside graphs", "median": round(share, 5)}
    for key in ("launches", "synchronisations"):
        line[f"{key}_per_step"] = round(spent.get(key, 0) / max(1, spent["ticks"]), 2)
        if key in seen:
            line[f"{key}_seen_by_profiler"] = seen[key]
    line["not_recorded"] = after.get("not_recorded", 0)  # since it was opened, not since `before`
    return line | {"redone": spent.get("redone", 0), "ticks": int(spent["ticks"])}
