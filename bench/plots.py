"""The plots of the benchmarks' report: full steps over N, repulsion over N, latency over load."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def draw(machine: str, lines: Sequence[Line], out: Path) -> list[str]:
    """PNG files in `out` for one machine's lines of sections A and D, of CPU steps and of serving; their names."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", machine).strip("-").lower()
    gpu = [line for line in lines if line["bench"] == "gpu" and "median" in line]
    steps: dict[str, list[Line]] = defaultdict(list)
    for line in gpu:
        if line["section"] == "A":
            steps[line["network"]].append(line)
    for line in lines:
        if line["bench"] == "engine-cpu":
            steps["fashion-cpu"].append({**line, "method": line["case"]})
    crowds: dict[str, list[Line]] = defaultdict(list)
    for line in gpu:
        if line["section"] == "D":
            crowds[str(line["features"])].append(line)
    names = []
    for network, chosen in steps.items():
        names.append(f"{slug}-steps-{network}.png")
        _plot(chosen, f"{network}: full steps", "particle-steps/s", out / names[-1])
    for features, chosen in crowds.items():
        names.append(f"{slug}-repulsion-{features}.png")
        _plot(chosen, f"repulsion, {features} features", "ms", out / names[-1])
    serving: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if line["bench"].startswith("serve-") and "latency" in line:
            serving[f"{line['bench']}-{line['mix']}"].append(line)
    for case, chosen in serving.items():
        names.append(f"{slug}-{case.lower().replace('=', '')}.png")
        _latency(chosen, f"latency, jobs of {chosen[0]['mix']}", out / names[-1])
    return names


def _latency(lines: Sequence[Line], title: str, path: Path) -> None:
    """The medians over the seeds of p99, with the quartiles as a band, and of p50, for each way to serve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(line["method"] for line in lines):
        mine = sorted((line for line in lines if line["method"] == method), key=lambda line: line["load"])
        loads = [100 * line["load"] for line in mine]
        slow, usual = ([line["latency"][key] for line in mine] for key in ("p99", "p50"))
        (curve,) = axes.plot(loads, [each["median"] for each in slow], marker="o", label=f"{method}: p99")
        axes.fill_between(
            loads, [each["q1"] for each in slow], [each["q3"] for each in slow], alpha=0.2, color=curve.get_color()
        )
        axes.plot(loads, [each["median"] for each in usual], ":", color=curve.get_color(), label=f"{method}: p50")
    axes.set(title=title, xlabel="load, % of the packed way's capacity", ylabel="seconds", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})


def _plot(lines: Sequence[Line], title: str, unit: str, path: Path) -> None:
    """The median over N for each method, with the quartiles as a band, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    methods: dict[str, dict[int, Line]] = defaultdict(dict)
    for line in lines:
        methods[line["method"]][line["particles"]] = line
    for method, found in methods.items():
        counts = sorted(found)
        (curve,) = axes.plot(counts, [found[n]["median"] for n in counts], marker="o", label=method)
        low, high = ([found[n][key] for n in counts] for key in ("q1", "q3"))
        axes.fill_between(counts, low, high, alpha=0.2, color=curve.get_color())
    axes.set(title=title, xlabel="particles N", ylabel=unit, xscale="log", yscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})  # nothing in the file but the picture
