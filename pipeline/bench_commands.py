"""`rlsd bench` and `rlsd bench serve`: from options to the benchmarks, which the package holds but does not need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from rlsd.pipeline import options as o
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.model import find_bundle


def bench(
    context: typer.Context,
    report: Annotated[
        bool, typer.Option("--report", metavar="", help="Measure nothing: tables and plots of what was measured.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of JSON lines; default: the benchmarks' own.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="For --report: where report.md and its plots go.")] = Path(
        "bench-report"
    ),
) -> None:
    """Full steps per second on this machine's CPU against PyTorch, or a report of all results.

    `rlsd bench serve` measures latency. On a GPU: bench/gpu_check.sh. Needs torch to measure, matplotlib to report.
    """
    if context.invoked_subcommand is not None:
        return
    with _said_in_a_sentence():
        if not report:
            from rlsd.bench import engine as full_steps

            full_steps.main([])
            return
        from rlsd.bench import report as tables

        path = tables.write(results or tables.RESULTS, out)
    typer.echo(f"Report written to {path}")


def serve(
    model: o.Model = "fashion",
    loads: Annotated[
        str, typer.Option(metavar="SHARE,...", help="Loads, as shares of what the engine gets done with a backlog.")
    ] = "0.2,0.5,0.8,0.95",
    mixes: Annotated[
        str, typer.Option(metavar="N-N,...", help="Particles of a job, at least and at most; each is as frequent.")
    ] = "1-2,1-8",
    settle: Annotated[float, typer.Option(metavar="S", help="Seconds in which jobs arrive before the window.")] = 2.0,
    window: Annotated[float, typer.Option(metavar="S", help="Seconds that the figures of a run are of.")] = 5.0,
    seeds: Annotated[int, typer.Option(metavar="R", help="Runs of everything, each with other arrivals.")] = 3,
    steps: Annotated[int, typer.Option(metavar="K", help="Timesteps of a job.")] = 12,
    particles: Annotated[
        int, typer.Option(metavar="N", help="Particles in flight at most, and those of a full fixed batch.")
    ] = 16,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds that a fixed batch waits to be filled.")] = 0.05,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON lines are added to it; default: the benchmarks' own.")
    ] = None,
    device: o.Device = None,
    threads: o.Threads = 0,
) -> None:
    """Latency and throughput of jobs that arrive at random: packed, one after another, and in fixed batches.

    Some jobs of every run are compared with the same job run alone; the exit code is 1 if one differs. Needs torch.
    """
    with _said_in_a_sentence():
        from rlsd.bench import serve as serving
        from rlsd.bench.serve_report import served

        settings = serving.Settings(
            loads=[_number("loads", word) for word in loads.split(",")],
            mixes=[_range("mixes", word) for word in mixes.split(",")],
            settle=settle, window=window, seeds=seeds, steps=steps, particles=particles, timeout=timeout,
        )  # fmt: skip
        lines, path = serving.run(find_bundle(model), device, threads, settings, out, typer.echo)
    typer.echo("\n".join(served(lines)))
    typer.echo(f"Appended to {path}")
    if any("wrong" in line for line in lines):
        raise typer.Exit(1)


@contextmanager
def _said_in_a_sentence() -> Iterator[None]:
    """InputError for a package that is missing and for a value that is not allowed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"bench needs {error.name}, which is not installed") from None
    except ValueError as error:
        raise InputError(str(error)) from error


def _number(field: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise InputError(f"{field} has {word!r}; numbers are wanted, as 0.5,0.8") from None


def _range(field: str, word: str) -> tuple[int, int]:
    least, _, most = word.partition("-")
    try:
        return int(least), int(most)
    except ValueError:
        raise InputError(f"{field} has {word!r}; two whole numbers are wanted, as 1-8") from None
