"""Exports a diffusion network at its published size with every operator, opens the bundle, and takes a step.

    python -m rlsd.bench.full_size --family sd15|sd21-base|sdxl --work FOLDER [--size 512] [--operators all]
    python -m rlsd.bench.full_size --checkpoint FOLDER --work FOLDER

The weights are random (rlsd.export.random_checkpoint), or those of a checkpoint that is there. The stages: write the
checkpoint; export it for CPUs at --size, where each graph is checked against float64; open that bundle; export the same
network at --small pixels; there, one step of every task of `rlsd tasks` whose operator the bundle has. Every stage is a
process of its own. A line a stage, with its seconds and the most memory that it held, is appended to
bench/results/full-size-export.jsonl as soon as it is done. FOLDER holds the files, which are deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.bench import measure
from rlsd.engine import Engine, Job, Params
from rlsd.pipeline.tasks import TASKS, Task

GIB = 2**30
STAGES = ("export", "open", "step")


def main(given: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--family", choices=("sd15", "sd21-base", "sdxl"), help="with random weights")
    source.add_argument("--checkpoint", type=Path, help="a folder in diffusers layout instead")
    parser.add_argument("--work", type=Path, required=True, help="a new folder for the files")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--small", type=int, default=64, help="pixels a side of the step")
    parser.add_argument("--operators", nargs="+", default=["all"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--results", type=Path, help="default: bench/results/full-size-export.jsonl")
    options = parser.parse_args(given)
    options.work.mkdir(parents=True)
    try:
        run(options)
    finally:
        shutil.rmtree(options.work)


def run(options: argparse.Namespace) -> None:
    """The stages in their order."""
    network = options.family or options.checkpoint.name
    large, small = options.work / "bundle", options.work / "small"

    def stage(name: str, size: int | None, act: Callable[..., dict], *given: Any) -> None:
        line = {"bench": "full-size", "network": network, "stage": name, "size": size, **apart(act, *given)}
        print(json.dumps(line), flush=True)
        measure.record("full-size-export", [line], options.results)

    checkpoint = options.checkpoint
    if options.family:
        checkpoint = options.work / "checkpoint"
        stage("checkpoint", None, write_checkpoint, options.family, checkpoint)
    if "export" in options.stages or "open" in options.stages:
        stage("export", options.size, export, checkpoint, large, options.size, options.operators)
    if "open" in options.stages:
        stage("open", options.size, open_bundle, large)
    shutil.rmtree(large, ignore_errors=True)
    if "step" in options.stages:
        stage("export", options.small, export, checkpoint, small, options.small, options.operators)
        stage("step", options.small, step, small)


def apart(act: Callable[..., dict], *given: Any) -> dict[str, Any]:
    """What `act` says of itself, with its seconds and the memory (GiB) of the process that did nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, act, given).result()


def _measured(act: Callable[..., dict], given: tuple) -> dict[str, Any]:
    start = time.perf_counter()
    said = act(*given)
    seconds = time.perf_counter() - start
    return {**said, "seconds": round(seconds, 1), "most_gib": round(most_resident() / GIB, 2)}


def most_resident() -> int:
    """The most bytes that this process held; getrusage's figure begins with what its parent held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def write_checkpoint(family: str, folder: Path) -> dict[str, Any]:
    """Random weights of the published configuration."""
    from rlsd.export.random_checkpoint import write

    folder.mkdir()
    write(family, folder)
    return {"gib": size_of(folder)}


def export(checkpoint: Path, out: Path, size: int, operators: Sequence[str]) -> dict[str, Any]:
    """A bundle for CPUs with graphs for one sample; the largest error of a graph against float64, by kind."""
    from rlsd.export import export_checkpoint

    export_checkpoint(checkpoint, out, size=(size, size), operators=operators, batches=[1])
    lines = [line.split() for line in (out / "manifest.txt").read_text().splitlines()]
    worst: dict[str, float] = {}
    for words in lines:
        if words[0] == "check":
            kind, _, rest = words[1].partition(".")
            name = f"operators.{rest.rpartition('.')[2]}" if kind == "operator" else kind
            worst[name] = max(worst.get(name, 0.0), float(words[3]))
    named = [words[1] for words in lines if words[0] == "operator"]
    return {"operators": named, "errors": worst, "gib": size_of(out)}


def open_bundle(bundle: Path) -> dict[str, Any]:
    """Verifies every byte and opens every graph, as `rlsd info` does."""
    with Engine(bundle) as engine:
        shapes = {"latent": list(engine.latent_shape), "image": list(engine.image_shape)}
        return {**shapes, "operators": list(engine.operators)}


def step(bundle: Path) -> dict[str, Any]:
    """One step of each task on one random image; SystemExit unless every particle is finite."""
    with Engine(bundle) as engine:
        tasks = [task for task in TASKS.values() if task.operator in engine.operators]
        results = engine.reconstruct(one_step_jobs(engine, tasks, particles=1))
    for task, result in zip(tasks, results):
        if not np.isfinite(result.particles).all():
            raise SystemExit(f"{task.name}: a step gave values that are not finite")
    return {"tasks": [task.name for task in tasks]}


def one_step_jobs(engine: Engine, tasks: Sequence[Task], particles: int) -> list[Job]:
    """A job of one step for each task, of what its operator measures of one random image."""
    x = np.random.default_rng(0).uniform(-1, 1, engine.image_shape).astype(np.float32)
    jobs = []
    for item, task in enumerate(tasks):
        given = task.parameters(engine.operators[task.operator].params, 0, item, {}, measured=False)
        y = engine.measure(task.operator, x[None], **{name: value[None] for name, value in given.items()})[0]
        jobs.append(Job(y, task.operator, given, particles, item=item, params=Params(steps=2)))
    return jobs


def size_of(folder: Path) -> float:
    """GiB of a folder's files."""
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / GIB, 2)


if __name__ == "__main__":
    main()
