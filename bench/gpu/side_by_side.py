"""G: two engines side by side in one process, half of the particles each, against one engine with all of them.

Convolutions fill the arithmetic units and normalisations the memory; what one engine leaves idle the other may use.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from rlsd.bench import measure
from rlsd.bench.gpu import Line
from rlsd.bench.gpu.arrivals import STEPS, differences, rate_lines
from rlsd.bench.gpu.steps import without_figure
from rlsd.bench.gpu.subject import CHECKED_STEPS, Subject, free
from rlsd.bench.gpu.timing import Clock
from rlsd.bench.problem import PARAMS, job
from rlsd.engine import Engine, Job

PARTICLES = (8, 16)  # of both together
SECONDS = 60  # a second engine is opened for them


def side_by_side(subject: Subject, particles: int, steps: int = STEPS) -> list[Line]:
    """Two jobs of half of `particles` each, at the same time: packed by one engine, and one in each of two."""
    case = f"{subject.name} 2 x N={particles // 2}"
    common: Line = {"section": "G", "case": case, "network": subject.name, "particles": particles}
    bench, params = subject.bench, replace(PARAMS, steps=steps)
    work = [replace(job(subject.engine.image_shape, particles // 2, params), item=item) for item in range(2)]
    try:
        allowed = subject.allowed(particles)  # PyTorch needs memory for it
        free()
        with bench.open(subject.bundle) as other, ThreadPoolExecutor(1) as thread:
            runs = ways(subject.engine, other, thread)
            short = [replace(each, params=replace(params, steps=CHECKED_STEPS + 1)) for each in work]
            # ONNX Runtime keeps its recordings for each thread: each engine makes its own, while the other rests, in
            # the thread that will use it.
            subject.engine.reconstruct(short[:1])
            thread.submit(other.reconstruct, short[1:]).result()
            both = [run(short) for run in runs.values()]
            error, equal = differences(both[1], both[0], allowed)
            timed = {name: lambda run=run: run(work) for name, run in runs.items()}  # type: ignore[misc]
            times = measure.interleaved(timed, bench.rounds, Clock(bench.device, whole=True), bench.limit)
    except Exception as problem:
        return [{**common, "method": "engine", **without_figure(problem)}]
    return rate_lines(subject, common | {"error": error, "same_bytes": equal}, times, particles * (steps - 1))


def ways(
    engine: Engine, other: Engine, thread: ThreadPoolExecutor
) -> dict[str, Callable[[list[Job]], list[np.ndarray]]]:
    """How two jobs can be run: by the first engine, or one by each, the other's in a thread. Each job's particles."""

    def apart(work: list[Job]) -> list[np.ndarray]:
        second = thread.submit(other.reconstruct, work[1:])
        return [result.particles for result in engine.reconstruct(work[:1]) + second.result()]

    return {"engine": lambda work: [each.particles for each in engine.reconstruct(work)], "two engines": apart}
