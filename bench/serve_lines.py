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
    """One way at one load: its runs, one for each seed, and how its checked jobs compare with the same jobs alone."""

    mix: Mix
    load: float
    way: str
    runs: list[Figures] = field(default_factory=list)
    checked: int = 0
    error: float = 0.0
    same: bool = True
    wrong: str = ""

    def __str__(self) -> str:
        return f"{self.mix}, load {self.load:.0%}, {self.way}"

    def check(self, kept: Mapping[int, np.ndarray], wanted: Mapping[int, np.ndarray], allowed: float) -> None:
        """Compares the particles of jobs, by place. allowed: their relative error; with 0 the bytes must be equal."""
        for place, want in wanted.items():
            got = kept[place]
            error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            same = got.tobytes() == want.tobytes()
            self.checked += 1
            self.error, self.same = max(self.error, error), self.same and same
            if not (same or error <= allowed != 0):
                self.wrong = f"job {place} differs from the same job alone: relative error {error:.1e}"


def capacity_lines(mix: Mix, rates: Mapping[str, Sequence[float]]) -> list[Line]:
    """What each way gets done with a backlog."""
    return [
        {
            "case": f"{mix} backlog",
            "method": way,
            "unit": "particle-steps/s",
            **quartiles(values),
            "rounds": len(values),
        }
        for way, values in rates.items()
    ]


def load_lines(row: Sequence[Cell], capacities: Mapping[str, Sequence[float]]) -> list[Line]:
    """The ways at one load, the packed one with its ratios to the others and the targets."""
    lines = [_line(cell, float(np.median(capacities[cell.way]))) for cell in row]
    if any(cell.wrong for cell in row):
        return lines
    cells = {cell.way: cell for cell in row}
    ours, others = cells[Packed.name], [cell for cell in row if cell.way != Packed.name]
    line = next(line for line in lines if line["method"] == Packed.name)
    line["speedup"] = {each.way: _ratio(ours, each, lambda mine, its: mine.rate / its.rate) for each in others}
    line["p99_shorter_by"] = {each.way: _ratio(ours, each, _p99_ratio) for each in others}
    if ours.load == JUDGED_LOAD:
        line["targets"] = _targets(line, ours.mix)
    return lines


def _line(cell: Cell, capacity: float) -> Line:
    common = {"case": f"{cell.mix} load {cell.load:.0%}", "method": cell.way, "mix": str(cell.mix), "load": cell.load}
    if cell.wrong:
        return {**common, "wrong": cell.wrong}
    runs = cell.runs
    waits = {f"p{p}": quartiles([run.percentiles[f"p{p}"] for run in runs]) for p in PERCENTILES}
    everyone = latency([seconds for run in runs for seconds in run.latencies])
    offered = quartiles([run.offered for run in runs])
    return {
        **common, "unit": "particle-steps/s", **quartiles([run.rate for run in runs]), "offered": offered,
        "jobs_per_second": quartiles([run.jobs for run in runs]), "latency": waits,
        "latency_of_all": {key: float(f"{value:.5g}") for key, value in everyone.items()},
        "jobs": sum(len(run.latencies) for run in runs), "left": quartiles([run.left for run in runs]),
        "capacity": float(f"{capacity:.5g}"), "diverges": offered["median"] > capacity, "rounds": len(runs),
        "checked": cell.checked, "error": cell.error, "same_bytes": cell.same,
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
