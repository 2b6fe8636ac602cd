"""The graphs of a bundle for CUDA as a table: what each is made of, costs and keeps, from the manifest's info lines."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from rlsd.engine.files import read_manifest


def show_census(bundle: Path, console: Console) -> None:
    """Prints one row for each graph and batch."""
    nodes: dict[tuple[str, str], list[str]] = defaultdict(list)
    numbers: dict[tuple[str, str, str], int] = {}
    checks: dict[str, str] = {}
    for line in read_manifest(bundle):
        match line.split():
            case ["info", "nodes", graph, batch, kind, count]:
                nodes[graph, batch].append(f"{count} {kind.rpartition('.')[2]}")
            case ["info", ("operations" | "kept" | "moved") as what, graph, batch, number]:
                numbers[what, graph, batch] = int(number)
            case ["check", graph, "halves", error, cosine]:
                checks[graph] = f"{error}, cosine {cosine}"
    table = Table(
        "graph",
        "batch",
        "GFLOP a sample",
        "moved MB a sample",
        "kept MB a sample",
        "error in halves",
        "nodes",
        box=SIMPLE,
    )
    for (graph, batch), kinds in nodes.items():
        work = numbers[("operations", graph, batch)] / int(batch) / 1e9
        found = [numbers.get((what, graph, batch)) for what in ("moved", "kept")]  # no graph needs to have them
        bytes_of = ["" if number is None else f"{number / int(batch) / 1e6:.1f}" for number in found]
        table.add_row(graph, batch, f"{work:.1f}", *bytes_of, checks.get(graph, ""), ", ".join(kinds))
    console.print(table)
