"""Draws the particles of every method and stores them in the work folder, a shard of items at a time.

A shard's file appears when it is complete, in a folder whose name ends in a hash of all settings it depends on: a run
that was stopped goes on where it was, and changed settings begin anew.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlsd.bench.quality.dps import Dps, dps
from rlsd.bench.quality.items import Item
from rlsd.bench.quality.prior import BATCH, FashionPrior, checkpoint_digest
from rlsd.bench.quality.problem import Array, EngineMeasurement, Measurement, Noise, Prior, Schedule
from rlsd.bench.quality.psld import Psld, psld
from rlsd.bench.quality.resample import ReSample, resample
from rlsd.bench.quality.settings import LINEAR, SEED, Settings, Setup, described, settings_of
from rlsd.engine import Engine, Job, Params
from rlsd.models.fashion import PATH
from rlsd.pipeline.tasks import TASKS

Baseline = Dps | Psld | ReSample
SHARD = 8  # items
VERSION = 1  # raise it when a method changes: what is stored is then drawn again


@dataclass(frozen=True)
class Work:
    """One shard. prior: folder of the exported networks. seed: of the particles, not of the measurements."""

    task: str
    method: str
    setup: Setup
    items: Sequence[Item]
    prior: Path
    out: Path
    seed: int = SEED


@dataclass(frozen=True)
class Drawn:
    """particles: [items, N, 1, 32, 32]. seconds: of one thread. counts: evaluations of the networks, in samples."""

    particles: Array
    seconds: float
    counts: dict[str, int]


class Tools:
    """What a process keeps open."""

    def __init__(self, prior: Path):
        self.engine = Engine(PATH / "bundle", threads=1)
        self.prior = FashionPrior(prior)


def folder_of(work: Path, task: str, method: str, setup: Setup, seed: int = SEED) -> Path:
    """Where the shards of these settings lie."""
    text = json.dumps(
        {"version": VERSION, "prior": checkpoint_digest(), **described(task, method, setup, seed)}, sort_keys=True
    )
    return work / "particles" / f"{task}-{method}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def shards(
    work: Path, prior: Path, task: str, method: str, setup: Setup, items: Sequence[Item], seed: int = SEED
) -> Iterator[Work]:
    """The shards of a task and method, in order, whether they are there or not."""
    folder = folder_of(work, task, method, setup, seed)
    for first in range(0, len(items), SHARD):
        part = items[first : first + SHARD]
        yield Work(task, method, setup, part, prior, folder / f"{first:04}-{first + len(part):04}.npz", seed)


def draw(shard: Work, settings: Settings, tools: Tools) -> Drawn:
    """The shard's particles with these settings, not stored yet."""
    start = time.perf_counter()
    if isinstance(settings, Params):
        particles, counts = by_engine(tools.engine, shard, settings)
    else:
        tools.prior.counts.clear()
        particles = by_python(tools.prior, tools.engine, shard, settings)
        counts = dict(tools.prior.counts)
    return Drawn(particles, time.perf_counter() - start, counts)


def by_engine(engine: Engine, shard: Work, params: Params) -> tuple[Array, dict[str, int]]:
    """RLSD and its variants: a job an item."""
    operator, n = TASKS[shard.task].operator, shard.setup.particles
    jobs = [Job(i.y, operator, dict(i.params), n, shard.seed, i.index, params=params) for i in shard.items]
    particles = np.stack([result.particles for result in engine.reconstruct(jobs)])
    steps = n * len(jobs) * (params.steps - 1)  # and the decoder once more for the first step
    return particles, {"denoiser": steps, "decoder": steps + n * len(jobs), "decoder_pull": steps}


def by_python(prior: Prior, engine: Engine, shard: Work, settings: Baseline) -> Array:
    """The other methods, a batch of particles at a time."""
    n, addresses = shard.setup.particles, [(i, p) for i in shard.items for p in range(shard.setup.particles)]
    parts = []
    for first in range(0, len(addresses), BATCH):
        batch = addresses[first : first + BATCH]
        f = EngineMeasurement(
            engine,
            TASKS[shard.task].operator,
            np.stack([item.y for item, _ in batch]),
            {name: np.stack([item.params[name] for item, _ in batch]) for name in batch[0][0].params},
            shard.setup.sigma,
            shard.task in LINEAR,
        )
        noise = Noise(shard.seed, tuple((item.index, particle) for item, particle in batch), engine.latent_shape)
        parts.append(drawn(prior, f, noise, Schedule(prior.abar, shard.setup.steps), settings))
    return np.concatenate(parts).reshape(len(shard.items), n, *engine.image_shape)


def drawn(prior: Prior, f: Measurement, noise: Noise, schedule: Schedule, settings: Baseline) -> Array:
    """The images of one batch by the method whose settings these are."""
    if isinstance(settings, Dps):
        return dps(prior, f, noise, schedule, settings)
    if isinstance(settings, Psld):
        return psld(prior, f, noise, schedule, settings)
    return resample(prior, f, noise, schedule, settings)


def store(shard: Work, done: Drawn) -> None:
    """Writes the shard's file, whole or not at all."""
    shard.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = shard.out.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        np.savez(
            stream,
            particles=done.particles.astype(np.float32),
            indices=np.array([item.index for item in shard.items]),
            seconds=done.seconds,
            counts=json.dumps(done.counts),
        )
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(shard.out)


def stored(shard: Work) -> Drawn:
    """Reads the shard's file; ValueError if it is of other items."""
    with np.load(shard.out, allow_pickle=False) as file:
        if file["indices"].tolist() != [item.index for item in shard.items]:
            raise ValueError(f"{shard.out} holds other items: delete it")
        return Drawn(file["particles"], float(file["seconds"]), json.loads(str(file["counts"])))


def draw_all(todo: Sequence[Work], processes: int) -> None:
    """Draws and stores every shard that is not there, each on one thread; says how far it is."""
    missing = [shard for shard in todo if not shard.out.is_file()]
    print(f"{len(todo) - len(missing)} of {len(todo)} shards are there", flush=True)
    if not missing:
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(processes, _open, (missing[0].prior,)) as pool:
        for i, (name, rate) in enumerate(pool.imap_unordered(_draw, missing), 1):
            spent = time.perf_counter() - start
            left = spent / i * (len(missing) - i)
            print(f"{i}/{len(missing)} {name}: {rate:.0f} particle-steps/s, {left / 60:.0f} min left", flush=True)


_tools: list[Any] = []  # of this process


def _open(prior: Path) -> None:
    _tools.append(Tools(prior))


def _draw(shard: Work) -> tuple[str, float]:
    done = draw(shard, settings_of(shard.task, shard.method, shard.setup), _tools[0])
    store(shard, done)
    steps = len(shard.items) * shard.setup.particles * (shard.setup.steps - 1)
    return f"{shard.task} {shard.method} {shard.out.stem}", steps / done.seconds
