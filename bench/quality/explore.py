"""Repulsion on phase retrieval, further than `tune` looks: among features and latents, weak and strong, short and long.

    python -m rlsd.bench.quality.explore --data FOLDER --work FOLDER [--images 24]

On training images, with the settings of chosen.json otherwise; lines go to bench/results/quality-tune.jsonl.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from rlsd.bench import measure
from rlsd.bench.quality.settings import SETUPS, settings_of
from rlsd.bench.quality.tune import Bench
from rlsd.engine import Params

TASK = "phase-retrieval"
TRIES = [  # repulsion, gamma, repulsion_until
    ("auto", 0.0, 1.0),
    *(("auto", gamma, until) for gamma, until in ((20.0, 0.5), (20.0, 0.25), (80.0, 0.25))),
    *(("latent", gamma, until) for gamma, until in ((5.0, 0.5), (20.0, 0.5), (20.0, 0.25), (80.0, 0.25), (20.0, 1.0))),
]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the Fashion-MNIST idx files")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--images", type=int, default=24)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    bench = Bench(options.data, options.work, TASK, options.images)
    plain = settings_of(TASK, "nonrepuls", SETUPS[TASK])
    assert isinstance(plain, Params)
    for repulsion, gamma, until in TRIES:
        line = bench.line("rlsd", replace(plain, repulsion=repulsion, gamma=gamma, repulsion_until=until))
        measure.record("quality-tune", [line])
        print(f"{repulsion} gamma {gamma:g} until {until:g}: best particle {line['psnr_best']:.2f} dB", flush=True)


if __name__ == "__main__":
    main()
