"""What a sampler is given: a prior and a measurement of each particle, and addressed random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rlsd.engine import Engine, normal

Array = np.ndarray[Any, Any]
Pull = Callable[[Array], Array]

START = 0xFFFFFFFF  # the engine's stream of z's initial value: equal starts for all methods


class Prior(Protocol):
    """A latent diffusion model. Each function gives its value and its pull-back (cotangent of y -> of the input)."""

    abar: Array
    counts: dict[str, int]

    def eps(self, z_t: Array, t: int, keep: bool = True) -> tuple[Array, Pull]: ...
    def decode(self, z: Array, keep: bool = True) -> tuple[Array, Pull]: ...
    def encode(self, x: Array, keep: bool = True) -> tuple[Array, Pull]: ...


class Measurement(Protocol):
    """y = f(x) + N(0, sigma^2) of each particle. linear: whether f is."""

    sigma: float
    linear: bool

    @property
    def count(self) -> int:
        """Of values that were observed."""

    def squared(self, x: Array) -> tuple[Array, Array]:
        """||y - f(x)||^2 [n], and half its gradient in x."""

    def normal_map(self, x: Array) -> Array:
        """A^T A x of a linear f."""


@dataclass
class EngineMeasurement:
    """The measurement of particles by an operator of a bundle. y, params: one for each particle."""

    engine: Engine
    operator: str
    y: Array
    params: Mapping[str, Array]
    sigma: float
    linear: bool

    @property
    def count(self) -> int:
        """Values of y that were observed: under a mask, its ones."""
        return int(self.params["mask"][0].sum()) if "mask" in self.params else self.y[0].size

    def squared(self, x: Array) -> tuple[Array, Array]:
        """||y - f(x)||^2 [n], and half its gradient in x."""
        return self._against(x, self.y)

    def normal_map(self, x: Array) -> Array:
        """A^T A x."""
        return self._against(x, np.zeros_like(self.y))[1]

    def _against(self, x: Array, y: Array) -> tuple[Array, Array]:
        given = {"x": x.astype(np.float32, copy=False), "y": y, **self.params}
        found = self.engine.evaluate(f"operator.{self.operator}.loss", ["loss", "grad"], **given)
        size = self.y[0].size  # the graph gives the half of the mean, not the sum
        return 2 * size * found["loss"], size * found["grad"]


@dataclass(frozen=True)
class Noise:
    """Standard normal numbers of particles, addressed by (seed, item, particle, stream)."""

    seed: int
    addresses: tuple[tuple[int, int], ...]  # (item, particle) of each
    shape: tuple[int, ...]

    def __call__(self, stream: int) -> Array:
        size = int(np.prod(self.shape))
        drawn = [normal(self.seed, item, particle, stream, size) for item, particle in self.addresses]
        return np.stack(drawn).reshape(-1, *self.shape)


@dataclass(frozen=True)
class Schedule:
    """The timesteps that the engine visits with K steps, and DDIM between them.

    The engine spaces K timesteps and does not visit the last: K - 1 evaluations of the denoiser, for every method.
    """

    abar: Array
    steps: int
    offset: int = 1

    def timesteps(self) -> list[int]:
        """t_0 > t_1 > ... > t_{K-1}; the last is where the sampling ends."""
        unit, last = len(self.abar) // self.steps, len(self.abar) - 1
        return [min((self.steps - 1 - k) * unit + self.offset, last) for k in range(self.steps)]

    def level(self, k: int) -> float:
        """abar at t_k; 1 where the sampling ends."""
        return 1.0 if k == self.steps - 1 else float(self.abar[self.timesteps()[k]])

    def step(self, z0: Array, eps: Array, k: int, eta: float, noise: Array) -> Array:
        """z at t_{k+1} from the prediction z0 and eps at t_k (Song et al., DDIM, eq. 12); eta = 1 is ancestral."""
        now, then = self.level(k), self.level(k + 1)
        deviation = eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
        return np.sqrt(then) * z0 + np.sqrt(1 - then - deviation**2) * eps + deviation * noise


def tweedie(z_t: Array, eps: Array, abar: float) -> Array:
    """E[z_0 | z_t]."""
    return (z_t - np.sqrt(1 - abar) * eps) / np.sqrt(abar)


def column(values: Array, like: Array) -> Array:
    """[n] shaped to multiply `like` [n, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
