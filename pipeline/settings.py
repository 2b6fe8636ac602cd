"""What one run does to all of its items: the task's preset with the user's changes, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite

from rlsd.engine import Params
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.tasks import Task

MAX_PARTICLES = 65536


@dataclass(frozen=True)
class Settings:
    """particles: N an item. seed: all random numbers derive from it. sigma: of the measurement's noise.

    label: the named context that the prior is conditioned on, None for none. Raises InputError.
    """

    params: Params
    particles: int
    seed: int = 0
    sigma: float = 0.0
    label: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.particles <= MAX_PARTICLES:
            raise InputError(f"particles is {self.particles}; allowed are 1 to {MAX_PARTICLES}")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed is {self.seed}; allowed are 0 to 2^64 - 1")
        if not (isfinite(self.sigma) and self.sigma >= 0):
            raise InputError(f"sigma is {self.sigma}; it must be 0 or more")
        if self.params.guidance != 1 and self.label is None:
            raise InputError(f"guidance is {self.params.guidance:g}, which needs a class to guide to: name one")

    def facts(self) -> dict[str, object]:
        """All of it for a report, in the symbols of the paper."""
        params = {key.rstrip("_"): value for key, value in asdict(self.params).items()}
        facts = {"particles": self.particles, "seed": self.seed, "sigma": self.sigma, "class": self.label}
        return {**facts, **params}


def settings_for(task: Task, family: str, changes: Mapping[str, object]) -> Settings:
    """The task's preset for a family of priors, with `changes`: fields of Params and Settings; None changes nothing.

    Raises InputError naming field, value and what is allowed.
    """
    values = {**task.preset(family)._asdict(), **{key: value for key, value in changes.items() if value is not None}}
    outer = {key: values.pop(key) for key in ("particles", "seed", "sigma", "label") if key in values}
    try:
        return Settings(Params(**values), **outer)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from None
