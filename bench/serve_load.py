"""The load of the serving benchmark, and the figures of one run: arrivals, latencies, throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlsd.bench.serve_queue import Arrival, Served

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Mix:
    """Jobs of `least` to `most` particles, each number as often as the others, and of so many steps."""

    least: int
    most: int
    steps: int

    def __str__(self) -> str:
        return f"N={self.least}-{self.most}"

    @property
    def work(self) -> float:
        """Particle-steps of a job, on average."""
        return (self.least + self.most) / 2 * self.steps


def sizes(mix: Mix, seed: int, count: int) -> list[int]:
    """The particles of the first jobs: job i has the same number at every load."""
    return np.random.default_rng([seed, mix.least, mix.most]).integers(mix.least, mix.most + 1, count).tolist()


def poisson(rate: float, seed: int, end: float) -> list[float]:
    """Moments before `end`, in seconds, of arrivals at random: so many a second on average.

    Of one seed, job i comes at the same share of the mean gap at every rate.
    """
    draw = np.random.default_rng(seed)
    found: list[float] = []
    moment = draw.exponential() / rate
    while moment < end:
        found.append(moment)
        moment += draw.exponential() / rate
    return found


def latency(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99: each the smallest of the values that at least so many percent do not exceed."""
    found = np.percentile(np.asarray(seconds), PERCENTILES, method="inverted_cdf")
    return {f"p{percent}": float(value) for percent, value in zip(PERCENTILES, found)}


@dataclass(frozen=True)
class Figures:
    """One run. rate: particle-steps/s in the window; jobs: done a second in it; left: jobs not done at its end.

    latencies: seconds from arrival to result of the jobs that came in the window and were served to their end.
    offered: particle-steps/s of the jobs that came in it.
    """

    rate: float
    jobs: float
    left: int
    offered: float
    latencies: tuple[float, ...]

    @property
    def percentiles(self) -> Mapping[str, float]:
        return latency(self.latencies)


def figures(arrivals: Sequence[Arrival], served: Served, start: float, window: float) -> Figures:
    """Of a run in whose first `start + window` seconds all jobs arrived: the figures of the window, which ends them."""
    end, counted = start + window, [place for place, each in enumerate(arrivals) if each.at >= start]
    work = sum(arrivals[place].job.particles * (arrivals[place].job.params.steps - 1) for place in counted)
    return Figures(
        rate=served.rate(start, end),
        jobs=sum(start < moment <= end for moment in served.finished.values()) / window,
        left=len(arrivals) - sum(moment <= end for moment in served.finished.values()),
        offered=work / window,
        latencies=tuple(served.finished[i] - arrivals[i].at for i in counted if i in served.finished),
    )
