"""The tables of the serving benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlsd.bench.tables import Line, by, number, table, target_table

HEAD = (
    "way", "particle-steps/s", "jobs/s", "jobs left", "p50 s", "p95 s", "p99 s", "p99 of all s", "of jobs",
    "as fast as", "p99 shorter by",
)  # fmt: skip


def served(lines: Sequence[Line]) -> list[str]:
    """How it was measured; targets, capacities, and a table for each mix and load, as Markdown."""
    checked = sum(line.get("checked", 0) for line in lines)
    same = all(line.get("same_bytes", True) and "wrong" not in line for line in lines)
    text = [
        f"{lines[0]['network']}: {lines[0]['settings']}. Medians over the seeds, quartiles in brackets; `of all`: "
        f"of the jobs of all seeds together. Loads are shares of the packed way's capacity. "
        f"{checked} jobs compared with the same job alone: "
        f"{'all bytes equal' if same else 'not all bytes equal'}.",
        "",
        *target_table(lines),
    ]
    backlog = [line for line in lines if "load" not in line and "median" in line]
    rows = [(line["case"], line["method"], _spread(line), _spread(line["jobs_per_second"])) for line in backlog]
    text += table(("capacity", "way", "particle-steps/s", "jobs/s"), rows)
    for case, chosen in by((line for line in lines if "latency" in line), lambda line: line["case"]):
        text += [f"**{case}**", "", *table(HEAD, [_row(line) for line in chosen])]
        above = [line["method"] for line in chosen if line["diverges"]]
        if above:
            text += [f"Above its capacity, its queue grows while jobs arrive: {', '.join(above)}.", ""]
    wrong = [f"- {line['case']}, {line['method']}: wrong: {line['wrong']}" for line in lines if "wrong" in line]
    return [*text, *wrong, ""] if wrong else text


def _row(line: Line) -> Sequence[Any]:
    waits = [_spread(line["latency"][key]) for key in ("p50", "p95", "p99")]
    everyone = (number(line["latency_of_all"]["p99"]), line["jobs"])
    return (line["method"], _spread(line), _spread(line["jobs_per_second"]), _spread(line["left"]), *waits, *everyone,
            _ratios(line.get("speedup", {})), _ratios(line.get("p99_shorter_by", {})))  # fmt: skip


def _spread(figures: Mapping[str, float]) -> str:
    """Median and quartiles, to three digits."""
    middle, low, high = (f"{figures[key]:.3g}" for key in ("median", "q1", "q3"))
    return f"{middle} ({low} to {high})"


def _ratios(found: Mapping[str, float]) -> str:
    return ", ".join(f"{number(value)}x {way}" for way, value in found.items())
