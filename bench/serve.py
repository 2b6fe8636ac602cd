"""Latency and throughput of jobs that arrive at random, served in three ways: `rlsd bench serve`.

Jobs of a few particles arrive as a Poisson process. `packed`: each joins the engine's next tick. `one after another`:
a job begins when the one before is done. `fixed batches`: what waits is collected up to so many particles or until a
timeout, and that batch runs to its end before the next begins. By default a batch has room for 16 particles, what the
engine has in flight at most, near its best on two cores; and waits for 50 ms, half of what the smallest job takes.

In each round every way first serves a backlog: its capacity. The loads are shares of the packed way's, with the same
arrivals for all. Where one after another is above its own capacity, its queue grows for as long as jobs arrive: what
its latencies say depends on the window then, and its throughput is its capacity. Jobs arrive for a while before the
window of the figures begins, so that no way begins it idle: throughput is what was done in it, latencies are of the
jobs that arrived in it, and all of those are served to their end. Some jobs of every run are compared with the same job
run alone: a cell with a difference gets no figure.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.bench import measure
from rlsd.bench.gpu.subject import PLAIN_LIMIT
from rlsd.bench.problem import PARAMS, job
from rlsd.bench.serve_lines import Cell, capacity_lines, load_lines
from rlsd.bench.serve_load import Figures, Mix, figures, poisson, sizes
from rlsd.bench.serve_queue import Arrival, FixedBatches, OneByOne, Packed, WallClock, one_by_one, serve
from rlsd.engine import Engine, Job

BACKLOG = 3  # times what was done in the window when the rate was guessed: more than any way gets done in it
CHECKED = 4  # jobs of every run


@dataclass(frozen=True)
class Settings:
    """What is measured.

    particles: what the engine has in flight at most, and what a fixed batch has room for. timeout: seconds that a fixed
    batch waits to be filled. settle: seconds in which jobs arrive before the window. window: seconds that the figures
    are of. steps: timesteps of a job. Raises ValueError.
    """

    loads: Sequence[float] = (0.2, 0.5, 0.8, 0.95)
    mixes: Sequence[tuple[int, int]] = ((1, 2), (1, 8))
    settle: float = 2.0
    window: float = 5.0
    seeds: int = 3
    steps: int = 12
    particles: int = 16
    timeout: float = 0.05

    def __post_init__(self) -> None:
        least_of = {"settle": 0, "window": 0.1, "seeds": 1, "steps": 2, "particles": 1, "timeout": 0}
        for name, least in least_of.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is {least} or more")
        for load in self.loads:
            if not 0 < load <= 2:
                raise ValueError(f"loads has {load}; allowed is more than 0, up to 2")
        for lowest, most in self.mixes:
            if not 1 <= lowest <= most:
                raise ValueError(f"mixes has {lowest}-{most}; allowed are 1 or more, the smaller first")

    def __str__(self) -> str:
        return (
            f"{self.steps} timesteps, {self.seeds} seeds, window {self.window:g} s after {self.settle:g} s, "
            f"{self.particles} particles in flight or in a batch, timeout {self.timeout:g} s"
        )

    @property
    def end(self) -> float:
        """Of the window: seconds after the first moment at which a job may arrive."""
        return self.settle + self.window


def run(
    bundle: Path, device: str | None, threads: int, settings: Settings, out: Path | None, say: Callable[[str], object]
) -> tuple[list[dict[str, Any]], Path]:
    """Opens the bundle, measures, records: the result lines, and the file that they were appended to.

    out: that file, default bench/results/serve-cpu.jsonl or serve-gpu.jsonl. say: gets a sentence for each run.
    """
    with Engine(bundle, device=device, threads=threads, max_particles=settings.particles) as engine:
        lines = Race(engine, settings, say).lines()
        kind = "gpu" if engine.on_gpu else "cpu"
        facts: dict[str, Any] = {"bench": f"serve-{kind}", "network": engine.name, "settings": str(settings)}
        if engine.on_gpu:
            facts["gpu"] = engine.describe()["device"][0]
        else:
            facts["threads"] = int(engine.describe()["threads"][0])
    lines = [{**line, **facts} for line in lines]
    return lines, measure.record(f"serve-{kind}", lines, out)


@dataclass
class Race:
    """The ways against each other on one engine."""

    engine: Engine
    settings: Settings
    say: Callable[[str], object]
    start: float = field(default_factory=time.perf_counter)

    def lines(self) -> list[dict[str, Any]]:
        """Measures everything: a line for each mix, load and way."""
        s, lines = self.settings, []
        mixes = [Mix(least, most, s.steps - 1) for least, most in s.mixes]
        rows = {(mix, load): self.row(mix, load) for mix in mixes for load in (None, *s.loads)}
        for seed in range(s.seeds):
            for mix in mixes:
                packed = self.backlog(rows[mix, None], seed)
                if any(cell.wrong for cell in rows[mix, None]):
                    continue
                for load in s.loads:
                    self.round(rows[mix, load], load * packed / mix.work, seed)
        for mix in mixes:
            backlog = rows[mix, None]
            lines += capacity_lines(backlog)
            if not any(cell.wrong for cell in backlog):
                lines += [line for load in s.loads for line in load_lines(rows[mix, load], backlog)]
        return lines

    def row(self, mix: Mix, load: float | None) -> list[Cell]:
        """A cell for each way."""
        return [Cell(mix, load, way.name) for way in self.ways()]

    def ways(self, first: int = 0) -> list[Packed]:
        """All ways; `first` says which comes first, so that rounds may differ in it."""
        found = [Packed(), OneByOne(), FixedBatches(self.settings.particles, self.settings.timeout)]
        first %= len(found)
        return found[first:] + found[:first]

    def jobs(self, mix: Mix, seed: int, count: int) -> Iterator[Job]:
        """The first jobs of a seed: the same at every load, each with random numbers of its own."""
        params = replace(PARAMS, steps=self.settings.steps)
        for item, particles in enumerate(sizes(mix, seed, count)):
            yield replace(job(self.engine.image_shape, particles, params), seed=seed, item=item)

    def backlog(self, row: Sequence[Cell], seed: int) -> float:
        """One run of each way with all jobs there from the start; returns what `packed` got done, particle-steps/s."""
        mix, end = row[0].mix, self.settings.end
        some = list(self.jobs(mix, seed, -(-self.settings.particles // mix.least)))
        seconds = min(measure.wall_seconds(lambda: self.engine.reconstruct(some)) for _ in range(2))
        guess = sum(each.particles for each in some) * mix.steps / seconds
        enough = CHECKED + int(BACKLOG * guess * end / mix.work)
        self.runs(row, [Arrival(0.0, each) for each in self.jobs(mix, seed, enough)], range(CHECKED), seed, end)
        return next(cell.runs[-1].rate for cell in row if cell.way == Packed.name)

    def round(self, row: Sequence[Cell], rate: float, seed: int) -> None:
        """One run of each way with the same arrivals, `rate` jobs a second; checked, and put into the row's cells."""
        start, moments = self.settings.settle, poisson(rate, seed, self.settings.end)
        if not moments or moments[-1] < start:
            raise ValueError(f"window is {self.settings.window:g}: no job arrived in it at {rate:.3g} jobs a second")
        arrivals = [Arrival(*each) for each in zip(moments, self.jobs(row[0].mix, seed, len(moments)))]
        places = sorted({round(place) for place in np.linspace(0, len(arrivals) - 1, CHECKED)})
        self.runs(row, arrivals, places, seed, math.inf)

    def runs(
        self, row: Sequence[Cell], arrivals: Sequence[Arrival], checked: Collection[int], seed: int, until: float
    ) -> None:
        """A run of each way, until all is done or until a moment."""
        wanted = dict(zip(checked, one_by_one(self.engine, [arrivals[place].job for place in checked])))
        for way in self.ways(seed):
            cell = next(cell for cell in row if cell.way == way.name)
            served = serve(self.engine, arrivals, way, WallClock(), keep=checked, until=until)
            if not served.kept:
                raise ValueError(f"window is {self.settings.window:g}: too short, no job was done in it")
            cell.check(served.kept, wanted, PLAIN_LIMIT if self.engine.on_gpu else 0.0)
            cell.runs.append(figures(arrivals, served, self.settings.settle, self.settings.window))
            said = sentence(cell.runs[-1]) if cell.load else f"{cell.runs[-1].rate:.4g} particle-steps/s"
            self.tell(f"{cell}, seed {seed}: {said}")

    def tell(self, text: str) -> None:
        """With the seconds so far."""
        self.say(f"[{time.perf_counter() - self.start:4.0f} s] {text}")


def sentence(run: Figures) -> str:
    """One run for people."""
    return f"{run.rate:.4g} particle-steps/s, p99 {run.percentiles['p99']:.3g} s, {run.left} jobs left at the end"
