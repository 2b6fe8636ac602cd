"""Full steps of the engine on the fashion bundle against PyTorch: particle-steps per second on this machine.

    python -m rlsd.bench.engine

Engine, `shared` (eager PyTorch, our algebra) and `published` (eager PyTorch, the authors' structure) first have to
agree on the particles; then they run in turn, round by round. One JSON line for each case.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from rlsd.bench import measure
from rlsd.bench.baselines import TorchLoop
from rlsd.bench.problem import OPERATOR, PARAMS, flops, frozen, job, torch_loop
from rlsd.engine import Engine
from rlsd.export.checkpoint import load
from rlsd.export.package import Networks
from rlsd.models.fashion import PATH


def main(given: Sequence[str] | None = None) -> None:
    """Checks, measures, prints a table and appends to bench/results/engine-cpu.jsonl."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--particles", type=int, nargs="+", default=[4, 16, 64])
    arguments.add_argument("--bundle", default=str(PATH / "bundle"))
    arguments.add_argument(
        "--keep-memory", action="store_true", help="glibc keeps freed memory: PyTorch's loops at their best"
    )
    options = arguments.parse_args(given)
    if options.keep_memory:
        keep_memory()
    networks = frozen(load(PATH / "checkpoint", None, [OPERATOR], None))
    peak, lines = measure.matrix_peak(), []
    for particles in options.particles:
        error = check(networks, options.bundle, particles)
        lines += compare(networks, options.bundle, particles, options.rounds, error, peak)
    lines = [{**line, "keep_memory": options.keep_memory, "bundle": Path(options.bundle).name} for line in lines]
    print_table(lines)
    print("appended to", measure.record("engine-cpu", lines))


def keep_memory() -> None:
    """Has glibc keep freed memory instead of giving it back and faulting it in again, as it does by default."""
    trim_threshold, mmap_max, never = -1, -4, 2**31 - 1  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(trim_threshold, never) and libc.mallopt(mmap_max, 0)):
        raise SystemExit("--keep-memory: this C library has no such settings")


def check(networks: Networks, bundle: str, particles: int) -> float:
    """The largest relative difference of the particles after a few steps; raises when the three do not agree."""
    params = replace(PARAMS, steps=6)
    with Engine(bundle) as engine:
        (result,) = engine.reconstruct([job(engine.image_shape, particles, params)])
    worst = 0.0
    for published in (False, True):
        loop = torch_loop(networks, particles, params, published=published)
        for _ in range(params.steps - 1):
            loop.step()
        loop.finish()
        error = float(np.linalg.norm(loop.x.numpy() - result.particles) / np.linalg.norm(result.particles))
        if not error <= 1e-3:  # NaN too
            raise SystemExit(f"N = {particles}: engine and PyTorch differ by {error:.1e}; no figure without agreement")
        worst = max(worst, error)
    return worst


def compare(networks: Networks, bundle: str, particles: int, rounds: int, error: float, peak: float) -> list[dict]:
    """Interleaved rounds of the three; a result line for each."""
    with Engine(bundle) as engine:
        engine.submit(job(engine.image_shape, particles))
        steps = max(1, round(128 / particles))

        def ticks() -> None:
            for _ in range(steps):
                engine.tick()

        cases: dict[str, Callable[[], None]] = {"engine": ticks}
        for name in ("shared", "published"):
            cases[name] = stepping(torch_loop(networks, particles, published=name == "published"), steps)
        measure.interleaved(cases, 1)
        before = engine.stats()
        times = measure.interleaved(cases, rounds)
        after = engine.stats()
        engine.cancel()
    rates = {name: [steps * particles / seconds for seconds in values] for name, values in times.items()}
    work = sum(flops(networks).values())
    lines = []
    for name, values in rates.items():
        figures = measure.quartiles(values)
        ratio = measure.quartiles([mine / theirs for mine, theirs in zip(rates["engine"], values)])
        lines.append(
            {
                "bench": "engine-cpu", "case": name, "particles": particles, "unit": "particle-steps/s", **figures,
                "engine_ratio": ratio, "rounds": rounds, "check_relative_error": error,
                "roofline_share": round(figures["median"] * work / peak, 4), "peak_flops": round(peak),
            }
        )  # fmt: skip
    lines[0]["outside_graphs_share"] = round(outside(before, after), 4)
    return lines


def stepping(loop: TorchLoop, steps: int) -> Callable[[], None]:
    """A case for `interleaved`: so many steps of the loop."""

    def run() -> None:
        for _ in range(steps):
            loop.step()

    return run


def outside(before: dict, after: dict) -> float:
    """Engine time outside the graphs (repulsion, noise, Adam, checks) as a share of all busy time."""
    spent = {key: after[key] - before[key] for key in after}
    graphs = sum(spent[key] for key in ("denoiser", "decoder", "decoder_pull", "features", "operators"))
    own = spent["repulsion"] + spent["elementwise"]
    return own / (graphs + own)


def print_table(lines: list[dict]) -> None:
    """The result lines as a table."""
    table = Table("N", "case", "particle-steps/s", "quartiles", "engine is faster by", "roofline", "outside graphs")
    for line in lines:
        share = line.get("outside_graphs_share")
        table.add_row(
            str(line["particles"]), line["case"], f"{line['median']:.1f}", f"{line['q1']:.1f} to {line['q3']:.1f}",
            f"{line['engine_ratio']['median']:.2f}x", f"{line['roofline_share']:.0%}",
            f"{share:.2%}" if share is not None else "",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
