"""Settings of the fashion tasks, by a small search on images of the training split only.

    python -m rlsd.bench.tune --data FOLDER [--tasks half sr4 ...] [--images 4] [--first 50000] [--threads 1]
                              [--grid lr_x=0.03,0.3 ...]

The tasks are all that the shipped bundle has the operator of. For each, every combination of GRID is tried on the
same images, all in one engine run; the table says, for each, PSNR of the mean image and of the best particle, the data
residual over what was observed in units of sigma (rows without `first`: over all of y, and where nothing was observed
the noise counts), and the diversity (pixel standard deviation over the particles). Chosen is the best mean PSNR among
the settings whose residual is at most RESIDUAL; the repulsion is then raised as far as the residual stays so and the
best particle's PSNR does not fall by more than TOLERATED. The result is printed and appended to
bench/results/tune-fashion.jsonl, a task at a time; pipeline/presets.py holds the choice.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.bench import measure
from rlsd.engine import Engine, Job, Params, Result, normal
from rlsd.engine.native import STREAM_USER
from rlsd.models.fashion import PATH
from rlsd.models.fashion.data import read_idx
from rlsd.pipeline import metrics
from rlsd.pipeline.tasks import TASKS, Task, find_task

STEPS, SIGMA, PARTICLES, RESIDUAL, TOLERATED = 200, 0.01, 4, 3.0, 0.2
GRID = {"lambda_": (0.05, 0.15, 0.5), "lr_z": (0.05, 0.15), "lr_x": (0.1,), "rho": (0.1,)}
GAMMAS = (5.0, 20.0)
FIRST = 50_000  # the presets' images: training images FIRST, FIRST + 1, ...


def main() -> None:
    """Searches each task in turn."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--data", type=Path, required=True, help="folder of the Fashion-MNIST idx files")
    arguments.add_argument("--tasks", nargs="+", default=None, choices=list(TASKS))
    arguments.add_argument("--images", type=int, default=4)
    arguments.add_argument("--first", type=int, default=FIRST, help="the first image's number in the training split")
    arguments.add_argument("--threads", type=int, default=0, help="of the engine; 0: one per processor")
    arguments.add_argument(
        "--grid", nargs="+", type=grid_values, default=[], metavar="NAME=V,...", help="instead of GRID's"
    )
    options = arguments.parse_args()
    grid = {**GRID, **dict(options.grid)}
    images = training_images(options.data, options.first, options.images)
    with Engine(PATH / "bundle", threads=options.threads) as engine:
        names = options.tasks or [name for name, task in TASKS.items() if task.operator in engine.operators]
        for name in names:
            lines = search(engine, find_task(name, engine.operators), images, grid)
            lines = [{**line, "first": options.first} for line in lines]
            print("appended to", measure.record("tune-fashion", lines), flush=True)


def grid_values(given: str) -> tuple[str, tuple[float, ...]]:
    """ "lr_x=0.03,0.3" as its name in GRID and the values to try; ValueError for what is not such a word."""
    name, _, values = given.partition("=")
    if name not in GRID:
        raise ValueError(name)
    return name, tuple(float(value) for value in values.split(","))


def training_images(folder: Path, first: int, count: int) -> np.ndarray:
    """[count, 1, 32, 32] in [-1, 1], padded with black; ValueError where the split has no so many."""
    pixels = read_idx(folder / "train-images-idx3-ubyte.gz")[first : first + count]
    if first < 0 or len(pixels) < count:
        raise ValueError(f"no {count} training images from number {first} on")
    return np.pad(pixels / np.float32(127.5) - 1, ((0, 0), (2, 2), (2, 2)), constant_values=-1)[:, None].astype(
        np.float32
    )


def search(engine: Engine, task: Task, images: np.ndarray, grid: Mapping[str, tuple[float, ...]]) -> list[dict]:
    """One task: the grid without repulsion, then the repulsion."""
    combinations: list[dict[str, Any]] = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    plain = [replace(Params(steps=STEPS), **values) for values in combinations]
    tried = evaluate(engine, task, images, plain)
    allowed = [line for line in tried if line["residual"] <= RESIDUAL] or tried
    best = max(allowed, key=lambda line: line["psnr_mean_image"])
    best_params = Params(**best["params"])
    repelled = evaluate(engine, task, images, [replace(best_params, gamma=gamma) for gamma in GAMMAS])
    limits = {"residual": max(RESIDUAL, best["residual"]), "psnr_best": best["psnr_best"] - TOLERATED}
    fine = [l for l in repelled if l["residual"] <= limits["residual"] and l["psnr_best"] >= limits["psnr_best"]]
    final = max([best, *fine], key=lambda line: line["deviation"])
    print(f"{task.name}: { ({key: final['params'][key] for key in (*GRID, 'gamma')}) } " + figures(final), flush=True)
    return [*tried, *repelled, {**final, "chosen": True}]


def evaluate(engine: Engine, task: Task, images: np.ndarray, settings: list[Params]) -> list[dict]:
    """All settings on all images in one run of the engine; a line for each setting."""
    shapes = engine.operators[task.operator].params
    jobs, given = [], []
    for item, x in enumerate(images):
        params = task.parameters(shapes, 0, item, {}, measured=False)
        clean = engine.measure(task.operator, x[None], **{k: v[None] for k, v in params.items()})[0]
        y = clean + SIGMA * normal(0, item, 0, STREAM_USER, clean.size).reshape(clean.shape)
        given.append((params, y))
    for each in settings:
        for item, (params, y) in enumerate(given):
            jobs.append(Job(y, task.operator, params, PARTICLES, item=item, params=each))
    results = engine.reconstruct(jobs)
    lines = []
    for i, each in enumerate(settings):
        mine = results[i * len(images) : (i + 1) * len(images)]
        scores = [score(engine, task, x, *g, r) for x, g, r in zip(images, given, mine)]
        means = {key: round(float(np.mean([s[key] for s in scores])), 4) for key in scores[0]}
        lines.append({"bench": "tune", "task": task.name, "params": asdict(each), "images": len(images), **means})
        print(task.name, {k: getattr(each, k) for k in (*GRID, "gamma")}, figures(lines[-1]), flush=True)
    return lines


def score(
    engine: Engine, task: Task, x: np.ndarray, params: dict[str, np.ndarray], y: np.ndarray, result: Result
) -> dict[str, float]:
    """Figures of one item; PSNR on [-1, 1] (range 2) after clipping."""
    particles = result.particles.clip(-1, 1)
    seen = engine.measure(task.operator, result.particles, **{k: v[None] for k, v in params.items()})
    each = psnr(particles, x)
    return {
        "psnr_mean": float(each.mean()),
        "psnr_best": float(each.max()),
        "psnr_mean_image": float(psnr(particles.mean(0, keepdims=True), x)[0]),
        "residual": float(metrics.residual(y, seen, params).mean() / SIGMA),
        "deviation": float(particles.std(0).mean()),
    }


def psnr(images: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[n] decibels of images [n, C, H, W] against x."""
    return 10 * np.log10(4 / np.maximum(((images - x) ** 2).mean((1, 2, 3)), 1e-12))


def figures(line: dict) -> str:
    """The line's figures as text."""
    names = ("psnr_mean", "psnr_best", "psnr_mean_image", "residual", "deviation")
    return ", ".join(f"{name} {line[name]:.2f}" for name in names)


if __name__ == "__main__":
    main()
