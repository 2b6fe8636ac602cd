"""Result lines of the serving benchmark: medians and quartiles over the seeds, checks, targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlsd.bench.gpu.targets import MET, MISSED
from rlsd.bench.measure import quartiles
from rlsd.bench.serve_load import PERCENTILES, Figures, Mix, latency
from rlsd.bench.serve_queue import FixedBatches, OneByOne, Packed

Line = dict[str, Any]
JUDGED_LOAD, JUDGED_MOST = 0.8, 2  # the load of the targets; the throughput's is for jobs of so few particles
WANTED = 2.0  # times the throughput of one after another


@dataclass
class Cell:
    """One way at one load: its runs, one for each seed, and how its checked jobs compare with the same jobs alone.

    load: a share of the packed way's capacity; None: a backlog, in which every job is there from the start.
    """

    mix: Mix
    load: float | None
    way: str
    runs: list[Figures] = field(default_factory=list)
    checked: int = 0
    error: float = 0.0
    same: bool = True
    wrong: str = ""

    @property
    def case(self) -> str:
        return f"{self.mix} backlog" if self.load is None else f"{self.mix} load {self.load:.0%}"

    def __str__(self) -> str:
        return f"{self.case}, {self.way}"

    @property
    def rate(self) -> float:
        """Particle-steps/s: the median of the runs."""
        return float(np.median([run.rate for run in self.runs]))

    def check(self, kept: Mapping[int, np.ndarray], wanted: Mapping[int, np.ndarray], allowed: float) -> None:
        """Compares the particles of jobs, by place. allowed: their relative error; with 0 the bytes must be equal."""
        for place, got in kept.items():
            want = wanted[place]
            error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            same = got.tobytes() == want.tobytes()
            self.checked += 1
            self.error, self.same = max(self.error, error), self.same and same
            if not (same or error <= allowed != 0):
                self.wrong = f"job {place} differs from the same job alone: relative error {error:.1e}"


def capacity_lines(row: Sequence[Cell]) -> list[Line]:
    """What each way gets done with a backlog."""
    return [_line(cell) for cell in row]


def load_lines(row: Sequence[Cell], backlog: Sequence[Cell]) -> list[Line]:
    """The ways at one load, the packed one with its ratios to the others and the targets."""
    capacities = {cell.way: cell.rate for cell in backlog}
    lines = [_line(cell) | _waiting(cell, capacities[cell.way]) for cell in row]
    if any(cell.wrong for cell in row):
        return lines
    for cell, line in zip(row, lines):
        if cell.way == Packed.name:
            others = [other for other in row if other is not cell]
            line["speedup"] = {each.way: _ratio(cell, each, lambda mine, its: mine.rate / its.rate) for each in others}
            line["p99_shorter_by"] = {each.way: _ratio(cell, each, _p99_ratio) for each in others}
            if cell.load == JUDGED_LOAD:
                line["targets"] = _targets(line, cell.mix)
    return lines


def _line(cell: Cell) -> Line:
    """What was run, and its throughput if it was right."""
    common = {"case": cell.case, "method": cell.way, "mix": str(cell.mix)}
    if cell.wrong:
        return {**common, "wrong": cell.wrong}
    return {
        **common, "unit": "particle-steps/s", **quartiles([run.rate for run in cell.runs]), "rounds": len(cell.runs),
        "jobs_per_second": quartiles([run.jobs for run in cell.runs]), "checked": cell.checked, "error": cell.error,
        "same_bytes": cell.same,
    }  # fmt: skip


def _waiting(cell: Cell, capacity: float) -> Line:
    """How long the jobs of a load took, if they were right; capacity: of the way, in particle-steps/s."""
    if cell.wrong:
        return {"load": cell.load}
    waits = {f"p{p}": quartiles([run.percentiles[f"p{p}"] for run in cell.runs]) for p in PERCENTILES}
    everyone = latency([seconds for run in cell.runs for seconds in run.latencies])
    offered = quartiles([run.offered for run in cell.runs])
    return {
        "load": cell.load, "offered": offered, "latency": waits,
        "latency_of_all": {key: float(f"{value:.5g}") for key, value in everyone.items()},
        "jobs": sum(len(run.latencies) for run in cell.runs), "left": quartiles([run.left for run in cell.runs]),
        "capacity": float(f"{capacity:.5g}"), "diverges": offered["median"] > capacity,
    }  # fmt: skip


def _ratio(ours: Cell, other: Cell, of: Callable[[Figures, Figures], float]) -> float:
    """The median over the seeds, each with the same arrivals in both."""
    return round(float(np.median([of(mine, its) for mine, its in zip(ours.runs, other.runs)])), 3)


def _p99_ratio(mine: Figures, its: Figures) -> float:
    return its.percentiles["p99"] / mine.percentiles["p99"]


def _targets(line: Line, mix: Mix) -> list[Line]:
    """p99 no worse than of fixed batches; for small jobs also the throughput."""
    found = [_verdict("p99 of fixed batches over ours", line["case"], 1.0, line["p99_shorter_by"][FixedBatches.name])]
    if mix.most <= JUDGED_MOST:
        found.append(_verdict("times one after another", line["case"], WANTED, line["speedup"][OneByOne.name]))
    return found


def _verdict(target: str, case: str, wanted: float, value: float) -> Line:
    verdict = MET if value >= wanted else MISSED
    return {"target": target, "name": f"{target} ({case})", "wanted": f">= {wanted:g}", "value": value,
            "verdict": verdict}  # fmt: skip
