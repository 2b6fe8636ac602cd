"""Every setting of the comparison.

All methods make steps - 1 evaluations of the denoiser for each particle (the engine does not visit the last of its
timesteps). nonrepuls is rlsd, and red-diff is nonaug, without repulsion and else with the same settings. chosen.json
is what `python -m rlsd.bench.quality.tune` found on training images, for every method by the same rule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlsd.bench.quality.dps import Dps
from rlsd.bench.quality.psld import Psld
from rlsd.bench.quality.resample import ReSample
from rlsd.engine import Params

Settings = Params | Dps | Psld | ReSample

SEED = 0
METHODS = ("rlsd", "nonrepuls", "nonaug", "red-diff", "dps", "psld", "resample")


@dataclass(frozen=True)
class Setup:
    """What all methods of a task share. sigma: of the measurement's noise; N particles; K = steps."""

    sigma: float
    particles: int
    steps: int


# Where much is open the particles are more and the steps more; the rest is less work.
SETUPS: Mapping[str, Setup] = {
    "half": Setup(0.05, 4, 50),
    "small-visible": Setup(0.3, 8, 100),
    "sr4": Setup(0.05, 4, 50),
    "gaussian-blur": Setup(0.05, 4, 50),
    "phase-retrieval": Setup(0.05, 6, 100),
    "hdr": Setup(0.05, 4, 50),
}
LINEAR = {"half", "small-visible", "sr4", "gaussian-blur"}

CHOSEN = Path(__file__).parent / "chosen.json"
KINDS: Mapping[str, Callable[..., Settings]] = {
    "rlsd": Params,
    "nonaug": Params,
    "dps": Dps,
    "psld": Psld,
    "resample": ReSample,
}
FAMILY = {"nonrepuls": "rlsd", "red-diff": "nonaug"}


def settings_of(task: str, method: str, setup: Setup) -> Settings:
    """The method's settings for a task as `tune` chose them, with the setup's number of steps.

    Raises ValueError for a task and method that was not tuned.
    """
    family = FAMILY.get(method, method)
    if not is_tuned(task, method):
        raise ValueError(f"method {family} was not tuned for {task}: python -m rlsd.bench.quality.tune does that")
    settings = KINDS[family](**json.loads(CHOSEN.read_text())[task][family])
    if not isinstance(settings, Params):
        return settings
    settings = replace(settings, steps=setup.steps)
    return settings if method == family else replace(settings, gamma=0.0)


def is_tuned(task: str, method: str) -> bool:
    """Whether `tune` has chosen settings for the method on the task."""
    return FAMILY.get(method, method) in json.loads(CHOSEN.read_text()).get(task, {})


def described(task: str, method: str, setup: Setup, seed: int = SEED) -> dict[str, Any]:
    """The same as plain values, with setup and seed: what a stored result depends on."""
    return {"task": task, "method": method, "seed": seed, **asdict(setup), **asdict(settings_of(task, method, setup))}
