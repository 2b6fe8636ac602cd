"""How far a sampler's own distribution of garments is from the reference posterior, whatever its particles do together.

    python -m rlsd.bench.quality.distance --data FOLDER --work FOLDER [--seeds 4] [--methods ...]

The total variation in QUALITY.md is that of a histogram of N particles, and such as repel each other repeat less often:
a smaller one need not mean a better sampler. Here each item is drawn with several seeds. Runs of two seeds are
independent, so that the product of their histograms' errors has the squared distance of the sampler's distribution
itself as its mean, for particles that repel each other as for such as do not, and 0 for exact draws. Single items'
estimates may be negative. Rows go to bench/results/quality-distance.jsonl.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.bench import measure
from rlsd.bench.quality import figures, items, prior, reference
from rlsd.bench.quality.__main__ import judge_of
from rlsd.bench.quality.judge import Judge
from rlsd.bench.quality.problem import Array
from rlsd.bench.quality.report import OTHERS, REPELLED
from rlsd.bench.quality.sample import Work, draw_all, shards, stored
from rlsd.bench.quality.settings import METHODS, SETUPS, described
from rlsd.engine import Engine, usable_processors
from rlsd.models.fashion import PATH

TASK = items.AMBIGUOUS[0]


def squared_distance(shares: Array, p: Array) -> Array:
    """Unbiased estimates of |q - p|^2 [n] from histograms [seeds, n, classes] with mean q, independent over seeds.

    p: [n, classes]. ValueError unless there are at least two seeds.
    """
    seeds = len(shares)
    if seeds < 2:
        raise ValueError(f"seeds: {seeds} is too few, at least 2 are needed")
    errors = shares - p
    return (np.square(errors.sum(0)) - np.square(errors).sum(0)).sum(-1) / (seeds * (seeds - 1))


def histograms(judge: Judge, work: Sequence[Work], classes: int) -> Array:
    """The share of each class among an item's particles [n, classes], as the judge names them."""
    found = []
    for shard in work:
        for particles in stored(shard).particles:
            found.append(np.bincount(judge(particles), minlength=classes) / len(particles))
    return np.stack(found)


def lines(shares: dict[str, Array], p: Array) -> list[dict[str, Any]]:
    """A row of each method, and one of each pair: the mean over items with its 95 % interval.

    shares: [seeds, n, classes] of each method. p: [n, classes].
    """
    squared = {method: squared_distance(each, p) for method, each in shares.items()}
    found = [
        {
            "method": method,
            "seeds": len(each),
            "squared": rounded(squared[method]),
            "variation": rounded(reference.total_variation(each, p).mean(0)),
        }
        for method, each in shares.items()
    ]
    found.append({"method": "uniform", "squared": rounded(np.square(p - 1 / p.shape[1]).sum(1))})
    for first, second in (*REPELLED, *OTHERS):
        if first in squared and second in squared:
            found.append({"method": first, "less": second, "squared": rounded(squared[first] - squared[second])})
    return found


def rounded(values: Array) -> list[float]:
    """[mean, low, high] to four digits."""
    return [float(f"{v:.4g}") for v in figures.interval(values.tolist())]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the Fashion-MNIST idx files")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--processes", type=int, default=usable_processors())
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    networks, setup = prior.prepare(options.work), SETUPS[TASK]
    with Engine(PATH / "bundle", threads=1) as engine:
        chosen = items.chosen(engine, options.data, TASK, setup, options.images)
    todo = {
        (method, seed): list(shards(options.work, networks, TASK, method, setup, chosen.items, seed))
        for seed in range(options.seeds)
        for method in options.methods
    }
    draw_all([shard for each in todo.values() for shard in each], options.processes)
    assert chosen.classes is not None
    judge, p = judge_of(options.data, options.work), chosen.classes
    shares = {
        method: np.stack([histograms(judge, todo[method, seed], p.shape[1]) for seed in range(options.seeds)])
        for method in options.methods
    }
    rows = [{"bench": "quality-distance", "task": TASK, "images": len(p), **line} for line in lines(shares, p)]
    for row in rows:
        if row["method"] in options.methods and "less" not in row:
            said = {*row, "seed"}
            row["settings"] = {n: v for n, v in described(TASK, row["method"], setup).items() if n not in said}
        print(row, flush=True)
    measure.record("quality-distance", rows)


if __name__ == "__main__":
    main()
