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

    label: the named context that the prior is conditioned on, None for none. prompt: a text in place of it.
    text_encoder: the checkpoint that turns the prompt into a context, default the one that the bundle names.
    each_labelled: the items have labels of their own, in place of this one. Raises InputError.
    """

    params: Params
    particles: int
    seed: int = 0
    sigma: float = 0.0
    label: str | None = None
    prompt: str | None = None
    text_encoder: str | None = None
    each_labelled: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.particles <= MAX_PARTICLES:
            raise InputError(f"particles is {self.particles}; allowed are 1 to {MAX_PARTICLES}")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed is {self.seed}; allowed are 0 to 2^64 - 1")
        if not (isfinite(self.sigma) and self.sigma >= 0):
            raise InputError(f"sigma is {self.sigma}; it must be 0 or more")
        if self.label is not None and self.prompt is not None:
            raise InputError(f"class {self.label!r} and prompt {self.prompt!r} are given; only one of them is allowed")
        if self.text_encoder is not None and self.prompt is None:
            raise InputError(f"text encoder {self.text_encoder} is given, but no prompt for it")
        if self.params.guidance != 1 and self.label is None and self.prompt is None and not self.each_labelled:
            raise InputError(
                f"guidance is {self.params.guidance:g}, which needs a class to guide to: name one, or give a prompt"
            )

    def facts(self) -> dict[str, object]:
        """All of it for a report, in the symbols of the paper."""
        params = {key.rstrip("_"): value for key, value in asdict(self.params).items()}
        facts: dict[str, object] = {"particles": self.particles, "seed": self.seed, "sigma": self.sigma}
        facts |= {"class": self.label, "prompt": self.prompt, "text_encoder": self.text_encoder}
        return {**facts, **params}


def settings_for(task: Task, family: str, changes: Mapping[str, object]) -> Settings:
    """The task's preset for a family of priors, with `changes`: fields of Params and Settings; None changes nothing.

    Raises InputError naming field, value and what is allowed.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    values = {**task.preset(family, str(changes.get("variant", "rlsd")))._asdict(), **changes}
    names = ("particles", "seed", "sigma", "label", "prompt", "text_encoder", "each_labelled")
    outer = {key: values.pop(key) for key in names if key in values}
    try:
        return Settings(Params(**values), **outer)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from None
