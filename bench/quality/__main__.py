"""RLSD against other methods and against itself without repulsion, on held-out images: one command.

    python -m rlsd.bench.quality --data FOLDER --work FOLDER [--tasks ...] [--methods ...] [--images 200] [--report]

Draws what is not in the work folder yet (it can be stopped and goes on), then scores everything that is there,
appends rows to bench/results/quality-fashion.jsonl and writes QUALITY.md with its pictures. --report draws nothing.
Needs torch, for the judge. What is compared, and how, is said at the top of QUALITY.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.bench import measure
from rlsd.bench.quality import figures, items, prior, reference, report
from rlsd.bench.quality.items import Chosen
from rlsd.bench.quality.judge import Judge
from rlsd.bench.quality.problem import Array
from rlsd.bench.quality.sample import Work, draw_all, shards, stored
from rlsd.bench.quality.settings import METHODS, SETUPS, described, is_tuned
from rlsd.engine import Engine, usable_processors
from rlsd.models.fashion import PATH
from rlsd.pipeline.items import frame_of


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="rlsd.bench.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the Fashion-MNIST idx files")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--tasks", nargs="+", default=list(SETUPS), choices=list(SETUPS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--images", type=int, default=200, help="items of each task")
    parser.add_argument("--processes", type=int, default=usable_processors())
    parser.add_argument("--report", action="store_true", help="draw nothing, report what is there")
    parser.add_argument("--out", type=Path, default=report.ROOT, help="folder of QUALITY.md and docs/quality")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    networks = prior.prepare(options.work)
    with Engine(PATH / "bundle", threads=1) as engine:
        sets = {task: items.chosen(engine, options.data, task, SETUPS[task], options.images) for task in options.tasks}
        todo = {
            (task, method): list(shards(options.work, networks, task, method, SETUPS[task], sets[task].items))
            for method in options.methods
            for task in options.tasks
            if is_tuned(task, method)
        }
        left_out = [f"{m} on {t}" for m in options.methods for t in options.tasks if not is_tuned(t, m)]
        if left_out:
            print(f"not tuned yet, so left out (rlsd.bench.quality.tune): {', '.join(left_out)}", flush=True)
        if not options.report:
            draw_all([shard for each in todo.values() for shard in each], options.processes)
        judge = judge_of(options.data, options.work)
        scorer, frame = figures.Scorer(engine, judge, figures.own_classifier(engine)), frame_of(engine)
        found = {key: scored(scorer, sets[key[0]], each) for key, each in todo.items()}
    results = {key: rows for key, rows in found.items() if rows is not None}
    lines = [summary(key, rows, sets[key[0]]) for key, rows in results.items()]
    lines += [exact(task, SETUPS[task].particles, each) for task, each in sets.items() if each.classes is not None]
    measure.record("quality-fashion", lines)
    print(report.write(options.out, lines, results, sets, judge.accuracy, frame))


def judge_of(data: Path, work: Path) -> Judge:
    """The judge, trained if it is not in the work folder yet."""
    train, test = items.load(data, "train"), items.load(data, "t10k")
    return Judge.of(work, (train.pixels, train.labels), (test.pixels, test.labels))


def scored(scorer: figures.Scorer, chosen: Chosen, work: list[Work]) -> report.Rows | None:
    """The figures of all items drawn so far, in order; None if there are none."""
    rows: list[dict[str, float]] = []
    particles: list[Array] = []
    seconds, counts = 0.0, dict[str, int]()
    for shard in work:
        if not shard.out.is_file():
            break
        drawn = stored(shard)
        for item, images in zip(shard.items, drawn.particles):
            classes = None if chosen.classes is None else chosen.classes[len(rows)]
            rows.append(scorer(shard.task, shard.setup.sigma, item, images, classes))
            particles.append(images)
        seconds += drawn.seconds
        counts = {name: counts.get(name, 0) + drawn.counts.get(name, 0) for name in {*counts, *drawn.counts}}
    return report.Rows(rows, np.stack(particles), seconds, counts) if rows else None


def summary(key: tuple[str, str], rows: report.Rows, chosen: Chosen) -> dict[str, Any]:
    """A result line: settings, each figure's mean with its interval, and what a particle cost."""
    task, method = key
    particles = len(rows.items) * SETUPS[task].particles
    cost: Mapping[str, float] = {name: round(count / particles, 2) for name, count in sorted(rows.counts.items())}
    return {
        "bench": "quality-fashion", **described(task, method, SETUPS[task]), "images": len(rows.items),
        "looked_at": chosen.looked_at, "figures": figures.means(rows.items), "evaluations": cost,
        "seconds_a_particle": float(f"{rows.seconds / particles:.4g}"),
    }  # fmt: skip


def exact(task: str, particles: int, chosen: Chosen) -> dict[str, Any]:
    """The same line for exact draws from the reference posterior: the least variation, and the modes to expect."""
    assert chosen.classes is not None and chosen.effective is not None
    variation = [reference.expected_variation(p, particles, i) for i, p in enumerate(chosen.classes)]
    modes = [reference.expected_modes(p, particles) for p in chosen.classes]
    found = [{"variation": v, "modes": m, "effective": e} for v, m, e in zip(variation, modes, chosen.effective)]
    return {
        "bench": "quality-fashion", "task": task, "method": "exact", "particles": particles,
        "images": len(found), "looked_at": chosen.looked_at, "figures": figures.means(found),
    }  # fmt: skip


if __name__ == "__main__":
    main()
