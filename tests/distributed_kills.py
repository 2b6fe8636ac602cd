"""Kills one process of a measurement over several again and again, and compares the result with that of one process.

    python tests/distributed_kills.py --kills 100

Number of processes, whose turn it is, at which step, and the steps between snapshots are random; so is whether the
processes are killed once or several times until the measurement is done. The last line says how many results differed.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from bundle_factory import write_bundle
from rank import launch
from tiny import make_job, make_nets

from rlsd.engine import Engine, Params, Result

STEPS = 21


def one_measurement(draw: random.Random, bundle: Path, folder: Path) -> tuple[int, bool]:
    """The number of processes killed, and whether the result is that of one process."""
    size, every = draw.choice((2, 3)), draw.randint(1, 8)
    params = Params(steps=STEPS, gamma=3.0, lr_x=0.05, lr_z=0.05, repulsion=draw.choice(("features", "latent")))
    job = replace(make_job(make_nets(), particles=draw.randint(size, 9), params=params), trace=True)
    with Engine(bundle, threads=1) as engine:
        (alone,) = engine.reconstruct([job])
    kills = 0
    for _ in range(draw.randint(1, 3)):
        victim = draw.randrange(size)
        codes = launch(
            size, folder, bundle, [job], {"every": every, "signals": {victim: (draw.randrange(STEPS), signal.SIGKILL)}}
        )
        kills += codes[victim] == -signal.SIGKILL
        if codes == [0] * size:
            break
    else:
        assert launch(size, folder, bundle, [job], {"every": every}) == [0] * size
    return kills, (folder / "0.npz").read_bytes() == _saved(alone, folder)


def _saved(result: Result, folder: Path) -> bytes:
    path = folder / "alone.npz"
    np.savez(path, particles=result.particles, latents=result.latents, trace=result.trace[..., :2].copy())
    return path.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills processes that share one measurement.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, kills, measurements, different = random.Random(given.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as work:
        bundle = write_bundle(Path(work) / "bundle", make_nets(), 1)
        while kills < given.kills:
            folder = Path(work) / str(measurements)
            folder.mkdir()
            killed, same = one_measurement(draw, bundle, folder)
            kills, measurements, different = kills + killed, measurements + 1, different + (not same)
    print(f"{kills} kills in {measurements} measurements: {different} differences")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
