"""The algorithm's parameters, in the symbols of the paper, checked once."""

from __future__ import annotations

import ctypes as c
from dataclasses import dataclass, fields
from numbers import Integral, Real

from rlsd.engine import native

VARIANTS = {"rlsd": 1, "rlsd-nonaug": 2}
REPULSIONS = {"auto": 0, "features": 1, "latent": 2}

_RANGES = {
    "steps": (2, 1_000_000),
    "rho": (0, 1e6),
    "lambda_": (0, 1e6),
    "lr_x": (1e-12, 1e3),
    "lr_z": (1e-12, 1e3),
    "gamma": (0, 1e9),
    "repulsion_until": (0, 1),
    "guidance": (-1e3, 1e3),
    "beta1": (0, 1 - 1e-9),
    "beta2": (0, 1 - 1e-9),
    "adam_eps": (1e-30, 1),
}


@dataclass(frozen=True)
class Params:
    """Parameters of RLSD (arXiv 2406.16683); the defaults are those of the paper's half-face task, without repulsion.

    variant: "rlsd" (latents and images, coupled) or "rlsd-nonaug" (latents only). steps: K timesteps, of which the
    last is not visited. rho: weight of the coupling in the step of x. lambda_: weight of the score. lr_x, lr_z:
    Adam's learning rates. gamma: strength of the repulsion, 0 for none. repulsion_until: the first share of the
    steps in which it acts. repulsion: the space in which distances are measured; "auto" is the bundle's features, or
    the latents where it has none. guidance: classifier-free guidance scale, 1 for none. beta1, beta2, adam_eps:
    Adam's constants; epsilon 4e-8 and means per particle reproduce, for every N, what the paper tuned with
    4 particles (its tasks with 2 or 6 want 2e-8 or 6e-8, as the presets have it).
    Raises ValueError naming field, value and range.
    """

    variant: str = "rlsd"
    steps: int = 200
    rho: float = 0.07
    lambda_: float = 0.15
    lr_x: float = 0.4
    lr_z: float = 0.8
    gamma: float = 0.0
    repulsion_until: float = 1.0
    repulsion: str = "auto"
    guidance: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    adam_eps: float = 4e-8

    def __post_init__(self) -> None:
        for field, allowed in (("variant", VARIANTS), ("repulsion", REPULSIONS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}, allowed is {' or '.join(allowed)}")
        if not isinstance(self.steps, Integral):
            raise ValueError(f"steps is {self.steps!r}, allowed is a whole number")
        for field, (low, high) in _RANGES.items():
            value = getattr(self, field)
            if not (isinstance(value, Real) and low <= value <= high):
                raise ValueError(f"{field.rstrip('_')} is {value}, allowed is {low:g} to {high:g}")

    def struct(self) -> native.ParamsStruct:
        """These numbers as rlsd_params, for the C interface."""
        struct = native.ParamsStruct()
        native.check(native.library().rlsd_params_init(struct, c.sizeof(struct)))
        for field in fields(self):
            value = getattr(self, field.name)
            word = VARIANTS.get(value, REPULSIONS.get(value)) if isinstance(value, str) else None
            setattr(struct, field.name, word if word is not None else int(value) if field.name == "steps" else value)
        return struct
