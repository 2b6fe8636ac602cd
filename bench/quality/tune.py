"""Settings of every method on every task, by one rule, on images of the training split.

    python -m rlsd.bench.quality.tune --data FOLDER --work FOLDER [--tasks ...] [--methods ...] [--images 6]

A grid of settings is tried on the same images for each task and method (GRIDS). Chosen is what has the best mean PSNR
of the particles (phase retrieval: of the best particle, since a half of its answers are turned round; small-visible,
where many garments are right: the least total variation of their classes to the reference posterior, which leaves
the image itself out), among those whose residual is at most RESIDUAL, if there are any. RLSD and its non-augmented
variant are first tuned without repulsion, so that what is compared without it was tuned without it. Repulsion is then
chosen among REPULSIONS by the same rule on small-visible and phase retrieval, none at all not being among them, since
what it does there is what is compared; on the others it is the strongest that costs the best particle at most 0.2 dB.
Where ReSample's fits end above the noise, longer ones are tried as well. All tries go to
bench/results/quality-tune.jsonl, the choice to chosen.json. With --known a try that is there already, on as many
images, is not made again: right as long as the method's code is the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.bench import measure
from rlsd.bench.quality import items, prior, reference
from rlsd.bench.quality.figures import Scorer, own_classifier
from rlsd.bench.quality.items import Item
from rlsd.bench.quality.judge import Judge
from rlsd.bench.quality.problem import Array
from rlsd.bench.quality.resample import ReSample
from rlsd.bench.quality.sample import Tools, Work, draw
from rlsd.bench.quality.settings import CHOSEN, KINDS, SETUPS, Settings, Setup
from rlsd.engine import Engine, Params, usable_processors

FIRST = 50_000  # the images used: training images from here on
RESIDUAL = 3.0  # in units of sigma

Grid = Mapping[str, Sequence[Any]]
GRIDS: Mapping[str, Grid] = {
    "rlsd": {"lambda_": (0.15, 0.5), "lr_z": (0.1, 0.3), "lr_x": (0.3,), "rho": (0.1, 0.5)},
    "nonaug": {"variant": ("rlsd-nonaug",), "lambda_": (0.02, 0.06, 0.2, 0.6), "lr_z": (0.1, 0.2)},
    "dps": {"zeta": (0.25, 0.4, 0.6, 1.0, 1.6, 2.5, 4.0, 6.0)},
    "psld": {"omega": (0.5, 1.0, 2.5, 4.0), "gamma": (0.03, 0.1, 0.3, 1.0)},
    "resample": {"gamma": (4.0, 40.0), "pixel_rate": (0.01, 0.05), "latent_rate": (0.005, 0.05)},
}
MORE: Mapping[tuple[str, str], Grid] = {
    # Where the data term is far from convex, how fast x follows it decides more than anything else.
    ("phase-retrieval", "rlsd"): {"lr_x": (0.3, 0.6)},
    ("sr4", "psld"): {"gain": (1 / 16,)},
}
LONGER = [
    ReSample(pixel_rate=0.05, latent_rate=rate, pixel_steps=300, latent_steps=60, last_steps=200)
    for rate in (0.05, 0.1)
]
FITTED = 1.1  # in units of sigma: a fit that reaches the noise stops there
REPULSIONS = list(itertools.product((5.0, 20.0), (0.5, 1.0)))  # gamma, repulsion_until
TOLERATED = 0.2  # dB


def main() -> None:
    """Tunes each task and method, on as many processes as there are processors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the Fashion-MNIST idx files")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--tasks", nargs="+", default=list(SETUPS), choices=list(SETUPS))
    parser.add_argument("--methods", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--processes", type=int, default=usable_processors())
    parser.add_argument("--known", action="store_true", help="no try a second time")
    options = parser.parse_args()
    train, test = items.load(options.data, "train"), items.load(options.data, "t10k")
    Judge.of(options.work, (train.pixels, train.labels), (test.pixels, test.labels))
    prior.prepare(options.work)
    os.environ["OMP_NUM_THREADS"] = "1"
    todo = list(itertools.product(options.tasks, options.methods))
    search = partial(tuned, data=options.data, work=options.work, count=options.images, known=options.known)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for lines in pool.imap_unordered(search, todo):
            measure.record("quality-tune", lines)
            keep(lines[-1])
            print(said(lines[-1]), flush=True)


def tuned(which: tuple[str, str], *, data: Path, work: Path, count: int, known: bool) -> list[dict[str, Any]]:
    """The new lines of one (task, method), then the chosen one."""
    (task, method), bench = which, Bench(data, work, which[0], count)
    grid: dict[str, Sequence[Any]] = {**GRIDS[method], **MORE.get(which, {})}
    if KINDS[method] is Params:
        grid["steps"] = (bench.setup.steps,)
    tries = [KINDS[method](**dict(zip(grid, values))) for values in itertools.product(*grid.values())]
    there = bench.recorded(method) if known else {}
    lines = [there.get(settings) or bench.line(method, settings) for settings in tries]
    best = choose(task, lines)
    if method == "resample" and best["residual"] > FITTED:
        lines += [bench.line(method, settings) for settings in LONGER]
        best = choose(task, lines)
    if method in ("rlsd", "nonaug"):
        plain = Params(**best["settings"])
        repelled = [bench.line(method, replace(plain, gamma=g, repulsion_until=u)) for g, u in REPULSIONS]
        lines += repelled
        best = choose_repulsion(task, best, repelled)
    return [*(line for line in lines if line not in there.values()), {**best, "chosen": True}]


def choose(task: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best line by the task's rule."""
    allowed = [line for line in lines if line["residual"] <= RESIDUAL] or lines
    return max(allowed, key=partial(merit, task))


def merit(task: str, line: dict[str, Any]) -> float:
    """What is to be large."""
    if task in items.AMBIGUOUS:
        return -float(line["variation"])
    return float(line["psnr_best" if task == "phase-retrieval" else "psnr"])


def choose_repulsion(task: str, plain: dict[str, Any], repelled: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Which repulsion: see the top of this file."""
    if task in (*items.AMBIGUOUS, "phase-retrieval"):
        return choose(task, repelled)
    cheap = [line for line in repelled if line["psnr_best"] >= plain["psnr_best"] - TOLERATED]
    return max(cheap or [plain], key=lambda line: line["deviation"])


class Bench:
    """The images of one task, and what it takes to try settings on them."""

    def __init__(self, data: Path, work: Path, task: str, count: int):
        train, test = items.load(data, "train"), items.load(data, "t10k")
        self.task, self.setup = task, SETUPS[task]
        self.tools = Tools(prior.prepare(work))
        self.scorer = Scorer(
            self.tools.engine,
            Judge.of(work, (train.pixels, train.labels), (test.pixels[:10], test.labels[:10])),
            own_classifier(self.tools.engine),
        )
        engine, sigma = self.tools.engine, self.setup.sigma
        found = (items.measured(engine, train, i, task, sigma) for i in range(FIRST, len(train.pixels)))
        pairs: Iterator[tuple[Item, Array | None]] = ((item, None) for item in found)
        if task in items.AMBIGUOUS:
            pairs = ambiguous(engine, train, task, self.setup, found)
            count *= 2  # classes of a few particles say less than decibels
        self.pairs = [pair for pair, _ in zip(pairs, range(count))]

    def recorded(self, method: str) -> dict[Settings, dict[str, Any]]:
        """The lines of earlier runs of this task and method, on as many images with the same setup."""
        wanted = {"task": self.task, "method": method, "images": len(self.pairs), **asdict(self.setup)}
        lines = [json.loads(line) for line in (measure.RESULTS / "quality-tune.jsonl").read_text().splitlines()]
        return {
            KINDS[method](**line["settings"]): {name: value for name, value in line.items() if name != "chosen"}
            for line in lines
            if {name: line.get(name) for name in wanted} == wanted
        }

    def line(self, method: str, settings: Settings) -> dict[str, Any]:
        """A result line of these settings: the figures' means over the images."""
        setup = self.setup
        shard = Work(self.task, method, setup, [item for item, _ in self.pairs], Path(), Path())
        drawn = draw(shard, settings, self.tools)
        scores = [
            self.scorer(self.task, setup.sigma, item, particles, classes)
            for (item, classes), particles in zip(self.pairs, drawn.particles)
        ]
        means = {name: float(f"{np.mean([score[name] for score in scores]):.5g}") for name in scores[0]}
        return {
            "bench": "quality-tune", "task": self.task, "method": method, "settings": asdict(settings),
            "images": len(scores), **asdict(setup), "seconds": round(drawn.seconds, 1), **means,
        }  # fmt: skip


def ambiguous(
    engine: Engine, train: items.Images, task: str, setup: Setup, found: Iterator[Item]
) -> Iterator[tuple[Item, Array]]:
    """The items that the rule of items.chosen takes, with their class distributions; none counts itself."""
    posterior = reference.Posterior.of(engine, task, train.pixels, setup.sigma)
    for item in found:
        weights = posterior.weights(item.y, without=item.index)
        classes = reference.class_distribution(weights, train.labels)
        if items.is_ambiguous(weights, classes):
            yield item, classes


def keep(line: Mapping[str, Any]) -> None:
    """Puts the choice into chosen.json."""
    table = json.loads(CHOSEN.read_text()) if CHOSEN.is_file() else {}
    table.setdefault(line["task"], {})[line["method"]] = line["settings"]
    CHOSEN.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def said(line: Mapping[str, Any]) -> str:
    """The line in short."""
    names = ("psnr", "psnr_best", "residual", "deviation", "modes", "variation")
    figures = ", ".join(f"{name} {line[name]:.2f}" for name in names if name in line)
    return f"{line['task']} {line['method']} {line['settings']}: {figures}"


if __name__ == "__main__":
    main()
