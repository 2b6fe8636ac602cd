"""F: jobs that arrive at different times, packed by the engine, against the same jobs one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from rlsd.bench import measure
from rlsd.bench.gpu import Line
from rlsd.bench.gpu.steps import speedups, without_figure
from rlsd.bench.gpu.subject import CHECKED_STEPS, Subject, Wrong, free
from rlsd.bench.gpu.timing import Clock
from rlsd.bench.problem import PARAMS, job
from rlsd.bench.serve_queue import one_by_one, packed

MIXES = ((8, 1), (4, 2), (2, 4))  # jobs, particles of each
STEPS, GAP = 24, 2  # a job's timesteps; ticks between two arrivals


def arrivals(subject: Subject, jobs: int, particles: int, steps: int = STEPS) -> list[Line]:
    """One mix: as they come, and one by one."""
    case = f"{subject.name} {jobs} x N={particles}"
    common: Line = {"section": "F", "case": case, "network": subject.name, "particles": particles, "jobs": jobs}
    engine, bench = subject.engine, subject.bench
    params = replace(PARAMS, steps=steps)
    work = [replace(job(engine.image_shape, particles, params), item=i) for i in range(jobs)]
    runs: dict[str, Callable[[], object]] = {
        "engine": lambda: packed(engine, work, GAP),
        "one by one": lambda: one_by_one(engine, work),
    }
    free()
    try:
        short = [replace(each, params=replace(params, steps=CHECKED_STEPS + 1)) for each in work]
        error, equal = differences(packed(engine, short, 1), one_by_one(engine, short), subject.allowed(particles))
        runs["engine"]()  # with all its sizes of chunks, which the short jobs did not need
        times = measure.interleaved(runs, bench.rounds, Clock(bench.device, whole=True), bench.limit)
    except Exception as problem:
        return [{**common, "method": "engine", **without_figure(problem)}]
    common |= {"error": error, "same_bytes": equal}
    lines = rate_lines(subject, common, times, jobs * particles * (steps - 1))
    lines[0]["at_most"] = round(at_most(jobs, steps), 3)
    return lines


def rate_lines(subject: Subject, common: Line, times: Mapping[str, list[float]], samples: int) -> list[Line]:
    """A line for each way of running `samples` particle-steps, by its seconds a round; the first has the speedups."""
    # the least for these particle-steps: in runs of the largest batch, whoever asked for them
    least = subject.work.least_seconds(subject.bench.roof, samples)
    lines = []
    for name, values in times.items():
        rates = measure.quartiles([samples / value for value in values])
        lines.append(
            {
                **common, "method": name, "unit": "particle-steps/s", **rates, "rounds": len(values),
                "roofline_share": round(rates["median"] * least / samples, 4),
            }
        )  # fmt: skip
    lines[0]["speedup"] = speedups(times)
    return lines


def at_most(jobs: int, steps: int, gap: int = GAP) -> float:
    """How many times as fast packing could be if a tick of all took no longer than one of a single job."""
    return jobs * (steps - 1) / ((jobs - 1) * gap + steps - 1)


def differences(got: list[np.ndarray], want: list[np.ndarray], allowed: float) -> tuple[float, bool]:
    """The largest relative difference of a job, and whether all bytes are equal. Raises Wrong beyond `allowed`."""
    # NumPy's maximum: Python's would lose a NaN behind a number
    error = float(np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, want)]))
    if not error <= allowed:
        raise Wrong(f"two ways of running the same jobs differ by {error:.1e}, allowed {allowed:.1e}")
    return error, all(np.array_equal(a, b) for a, b in zip(got, want))
