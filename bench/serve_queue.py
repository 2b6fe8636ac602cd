"""A server of jobs that arrive over time, and three ways to serve them, whatever the engine and the clock."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rlsd.engine import Engine, Handle, Job


@dataclass(frozen=True)
class Arrival:
    """A job, and when it arrives: seconds after the start."""

    at: float
    job: Job


class Server(Protocol):
    """What is asked of an engine: see rlsd.engine.Engine."""

    def submit(self, job: Job) -> Handle: ...
    def tick(self) -> int: ...
    def stats(self) -> dict[str, float]: ...


class Clock(Protocol):
    """Seconds since the start of a run."""

    def now(self) -> float: ...
    def sleep_until(self, when: float) -> None: ...


class WallClock:
    """Real time, from the moment that the clock is made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.start

    def sleep_until(self, when: float) -> None:
        time.sleep(max(0.0, when - self.now()))


class Ticks:
    """An engine as its own clock: each tick takes one unit of time."""

    def __init__(self, engine: Server) -> None:
        self.engine, self.time = engine, 0.0

    def submit(self, job: Job) -> Handle:
        return self.engine.submit(job)

    def tick(self) -> int:
        self.time += 1
        return self.engine.tick()

    def stats(self) -> dict[str, float]:
        return self.engine.stats()

    def now(self) -> float:
        return self.time

    def sleep_until(self, when: float) -> None:
        self.time = max(self.time, when)


# ------------------------------------------------------------------ ways to serve


class Packed:
    """Every job goes to the engine when it comes: it joins the next tick, or the engine's own queue."""

    name = "packed"

    def admit(self, waiting: Sequence[Arrival], running: int, now: float) -> int:
        """How many of the waiting jobs, the oldest first, begin now that `running` jobs are not done."""
        return len(waiting)

    def wakes(self, waiting: Sequence[Arrival]) -> float:
        """When `admit` may answer otherwise though no job has come or ended."""
        return math.inf


class OneByOne(Packed):
    """A job begins when the one before it is done."""

    name = "one after another"

    def admit(self, waiting: Sequence[Arrival], running: int, now: float) -> int:
        return min(1, len(waiting)) if running == 0 else 0


@dataclass(frozen=True)
class FixedBatches(Packed):
    """A batch runs to its end before the next begins: as many of the oldest jobs as `particles` has room for.

    It begins when the waiting jobs fill it, or when the oldest has waited for `timeout` seconds.
    """

    particles: int
    timeout: float
    name = "fixed batches"

    def admit(self, waiting: Sequence[Arrival], running: int, now: float) -> int:
        if running or not waiting:
            return 0
        total, fit = 0, 0
        for each in waiting:
            total += each.job.particles
            if fit and total > self.particles:
                break
            fit += 1
        return fit if total >= self.particles or now >= self.wakes(waiting) else 0

    def wakes(self, waiting: Sequence[Arrival]) -> float:
        return waiting[0].at + self.timeout if waiting else math.inf


# ------------------------------------------------------------------ serving


@dataclass
class Served:
    """What happened, by a job's place among the arrivals: `finished` says when each was done, in seconds.

    kept: the particles [N, C, H, W] of the jobs that were asked for. times, steps: seconds and the engine's count of
    particle-steps, at the start and after each tick.
    """

    finished: dict[int, float] = field(default_factory=dict)
    kept: dict[int, np.ndarray] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def count(self, engine: Server, now: float) -> None:
        """Notes how far the engine is."""
        self.times.append(now)
        self.steps.append(engine.stats()["particle_steps"])

    def rate(self, start: float, end: float) -> float:
        """Particle-steps a second from `start` to `end`; of a tick that either falls into, its share."""
        before, after = np.interp([start, end], self.times, self.steps)
        return float(after - before) / (end - start)


def serve(
    engine: Server,
    arrivals: Sequence[Arrival],
    way: Packed,
    clock: Clock,
    *,
    keep: Collection[int] = (),
    until: float = math.inf,
) -> Served:
    """Serves jobs in the order in which they arrive, until all are done, or until a moment, when the rest are dropped.

    keep: the jobs, by place, whose particles are wanted. Raises RlsdError when a job fails.
    """
    served, upcoming = Served(), deque(arrivals)
    waiting: deque[Arrival] = deque()
    running: dict[int, Handle] = {}
    begun = 0
    served.count(engine, 0.0)
    try:
        while (upcoming or waiting or running) and clock.now() < until:
            now = clock.now()
            while upcoming and upcoming[0].at <= now:
                waiting.append(upcoming.popleft())
            for _ in range(way.admit(waiting, len(running), now)):
                running[begun] = engine.submit(waiting.popleft().job)
                begun += 1
            if not running:
                clock.sleep_until(min(until, way.wakes(waiting), upcoming[0].at if upcoming else math.inf))
                continue
            left = engine.tick()
            now = clock.now()
            served.count(engine, now)
            if left < len(running):
                _collect(running, served, now, keep)
    finally:  # whatever happens: they would tick along with what the engine is asked next
        for handle in running.values():
            handle.release()
    return served


def _collect(running: dict[int, Handle], served: Served, now: float, keep: Collection[int]) -> None:
    """Moves what is done from `running` to `served`."""
    for place in [place for place, handle in running.items() if handle.done]:
        result = running.pop(place).result()
        served.finished[place] = now
        if place in keep:
            served.kept[place] = result.particles


def packed(engine: Server, work: Sequence[Job], gap: int) -> list[np.ndarray]:
    """Job i is submitted before tick i * gap; until all are done. The particles of each."""
    clock = Ticks(engine)
    arrivals = [Arrival(float(i * gap), job) for i, job in enumerate(work)]
    served = serve(clock, arrivals, Packed(), clock, keep=range(len(work)))
    return [served.kept[place] for place in range(len(work))]


def one_by_one(engine: Engine, work: Sequence[Job]) -> list[np.ndarray]:
    """Each job alone, the next when it is done. The particles of each."""
    return [engine.reconstruct([job])[0].particles for job in work]
