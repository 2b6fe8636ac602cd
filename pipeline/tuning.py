"""Measures which batches are fast on this machine's GPU, and writes it down beside the bundle for the engine."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlsd.engine import Engine, Job, Params, RlsdError, Status
from rlsd.engine.files import read_manifest
from rlsd.pipeline.errors import InputError

FILE = "tuning.txt"
WARM, MEASURED = 3, 7  # ticks


def tune(engine: Engine, note: Callable[[str], None]) -> Path:
    """Times a tick of every batch of the bundle and writes FILE into its folder. InputError on a CPU.

    From then on the engine divides particles among batches so that the measured times add up to the least. A batch
    that the memory does not allow gets a time that keeps the engine from it. The file counts only for this device and
    this bundle; delete it to be without. note: is told each figure.
    """
    if not engine.on_gpu:
        raise InputError(f"{engine.path}: batches are tuned on a GPU, and this bundle is for a CPU")
    batches = sorted({int(line.split()[1]) for line in engine.describe()["graph"] if line.startswith("denoiser ")})
    lines = ["rlsd-tuning 1", f"device {engine.describe()['device'][0]}", f"bundle {digest(engine.path)}"]
    for batch in batches:
        milliseconds = tick_time(engine, batch)
        note(f"batch {batch}: {milliseconds:.2f} ms a tick, {1e3 * batch / milliseconds:.1f} particle-steps/s")
        lines.append(f"batch {batch} {milliseconds:.4f}")
    path = engine.path / FILE
    with tempfile.NamedTemporaryFile("w", dir=engine.path, prefix=".tuning-", delete=False) as fresh:
        fresh.write("".join(line + "\n" for line in lines))
    os.chmod(fresh.name, 0o644)
    os.replace(fresh.name, path)  # a symbolic link of that name is replaced, not followed
    return path


def digest(bundle: Path) -> str:
    """The SHA-256 that ends the manifest."""
    return read_manifest(bundle)[-1].split()[1]


def tick_time(engine: Engine, batch: int) -> float:
    """Median milliseconds of a tick with `batch` particles without repulsion; 1e9 where the memory is too small."""
    name, operator = next(iter(engine.operators.items()))
    job = Job(
        y=np.zeros(operator.measurement_shape, np.float32),
        operator=name,
        operator_params={param: np.ones(shape, np.float32) for param, shape in operator.params.items()},
        particles=batch,
        params=Params(steps=min(engine.timesteps, WARM + MEASURED + 2)),
    )
    handle = engine.submit(job)
    times = []
    try:
        for _ in range(WARM + MEASURED):
            start = time.perf_counter()
            engine.tick()
            times.append(1e3 * (time.perf_counter() - start))
    except RlsdError as error:
        if error.status is not Status.OUT_OF_MEMORY:
            raise
        return 1e9
    finally:
        handle.release()
    return statistics.median(times[WARM:])
