"""The tables of `rlsd batch`'s benchmarks: throughput, memory, kills."""

from __future__ import annotations

from collections.abc import Sequence

from rlsd.bench.tables import Line, number, table

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of a run's items: where the table says what memory it held


def throughput(lines: Sequence[Line]) -> list[str]:
    """The batch beside the engine, with the quartiles of their ratio over the rounds."""
    rows = [
        (line["case"], line["items"], line["particles"], line["steps"], number(line["median"]),
         *(number(line["engine_ratio"][key]) for key in ("median", "q1", "q3")))
        for line in lines
    ]  # fmt: skip
    return table(("way", "items", "N", "K", "particle-steps/s", "times the engine's", "q1", "q3"), rows)


def memory(lines: Sequence[Line]) -> list[str]:
    """What the last run held when so many of its items were done."""
    run = sorted(lines, key=lambda line: line["done"])
    rows = []
    for share in SHARES:
        reached = next((line for line in run if line["done"] >= share * line["items"]), None)
        if reached:
            rows.append((reached["items"], reached["done"], number(reached["resident_mib"])))
    return table(("items", "done", "resident MiB"), rows)


def kills(lines: Sequence[Line]) -> list[str]:
    """Runs that were killed, and what differed afterwards from a run that was not."""
    rows = [
        (line["case"], line["kills"], ", ".join(f"{count} {way}" for way, count in line["by_way"].items()),
         line["resumed_from_snapshot"], line["differences"])
        for line in lines
    ]  # fmt: skip
    return table(("case", "kills", "of which", "resumed from a snapshot", "differences"), rows)
