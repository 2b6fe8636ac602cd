"""Rounds, medians, the machine's name and its measured peak: shared by all benchmarks."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"


def interleaved(cases: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Runs every case once a round, in turn; each returns a count of work, the result is work per second."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            work = case()
            rates[name].append(work / (time.perf_counter() - start))
    return rates


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles, to four digits."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": round(float(middle), 4), "q1": round(float(low), 4), "q3": round(float(high), 4)}


def machine() -> str:
    """The processor's name and the number of processors this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {available_processors()} cores"


def available_processors() -> int:
    """Processors that this process may run on."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """The checkout's commit, with `+` behind it when files differ from it."""
    here = Path(__file__).parent
    run = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)  # noqa: E731
    head = run("rev-parse", "--short", "HEAD").stdout.strip() or "unknown"
    return head + ("+" if run("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")


def matrix_peak(seconds: float = 1.0) -> float:
    """FLOP/s of a float32 matrix product on all processors: the roof for compute-bound work, measured."""
    import torch

    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 1536**3 / (time.perf_counter() - start))
    return best


def record(name: str, lines: list[dict]) -> Path:
    """Appends result lines to bench/results/NAME.jsonl, each with machine, commit and time."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    facts = {"machine": machine(), "commit": commit(), "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    with open(path, "a") as stream:
        for line in lines:
            stream.write(json.dumps({**line, **facts}) + "\n")
    return path
