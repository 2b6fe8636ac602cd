"""The steps of latent DPS and PSLD against the objectives of the papers, differentiated numerically.

With K = 2 there is one step, and it ends at z0 - gradient: the objective's gradient in z_t can be read off.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rlsd.bench.quality.dps import Dps, dps
from rlsd.bench.quality.problem import START, Array, Noise, Pull, Schedule
from rlsd.bench.quality.psld import Psld, psld

SHAPE = (1, 2, 2)
GENERATOR = np.random.default_rng(11)
W, V, A = (GENERATOR.standard_normal((4, 4)) for _ in range(3))
SCHEDULE = Schedule(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), 2)
NOISE = Noise(9, ((0, 0), (0, 1), (3, 0)), SHAPE)
Y = GENERATOR.standard_normal((3, 4))


def rows(values: Array) -> Array:
    return values.reshape(len(values), -1)


class Curved:
    """Networks without any structure that could hide a wrong transposition; the decoder keeps z readable."""

    def __init__(self) -> None:
        self.abar, self.counts = SCHEDULE.abar, dict[str, int]()

    def eps(self, z_t: Array, t: int, keep: bool = True) -> tuple[Array, Pull]:
        inner = rows(z_t) @ W.T
        return np.sin(inner).reshape(z_t.shape), lambda c: ((rows(c) * np.cos(inner)) @ W).reshape(c.shape)

    def decode(self, z: Array, keep: bool = True) -> tuple[Array, Pull]:
        return np.sinh(z), lambda c: c * np.cosh(z)

    def encode(self, x: Array, keep: bool = True) -> tuple[Array, Pull]:
        inner = rows(x) @ V.T
        slope = 1 - np.tanh(inner) ** 2
        return np.tanh(inner).reshape(x.shape), lambda c: ((rows(c) * slope) @ V).reshape(c.shape)


class Product:
    """y = A x, or the same of x^2."""

    sigma, count = 0.1, 4

    def __init__(self, linear: bool):
        self.linear = linear

    def __call__(self, x: Array) -> Array:
        return rows(x if self.linear else x**2) @ A.T

    def squared(self, x: Array) -> tuple[Array, Array]:
        gap = self(x) - Y
        half = (gap @ A).reshape(x.shape)
        return np.square(gap).sum(1), half if self.linear else half * 2 * x

    def normal_map(self, x: Array) -> Array:
        return (rows(x) @ A.T @ A).reshape(x.shape)


def length(values: Array) -> Array:
    return np.sqrt(np.square(rows(values)).sum(1))


def prediction(z_t: Array) -> Array:
    abar = SCHEDULE.level(0)
    return (z_t - np.sqrt(1 - abar) * Curved().eps(z_t, 0)[0]) / np.sqrt(abar)


def numerical(objective: Callable[[Array], Array], z_t: Array, h: float = 1e-6) -> Array:
    gradient = np.zeros_like(z_t)
    for place in np.ndindex(SHAPE):
        step = np.zeros(SHAPE)
        step[place] = h
        gradient[(slice(None), *place)] = (objective(z_t + step) - objective(z_t - step)) / (2 * h)
    return gradient


@pytest.mark.parametrize("linear", [True, False])
def test_dps_steps_against_the_residuals_norm(linear: bool) -> None:
    f, z_t = Product(linear), NOISE(START).astype(np.float64)
    objective = lambda z: length(Y - f(np.sinh(prediction(z))))  # noqa: E731
    ended = np.arcsinh(dps(Curved(), f, NOISE, SCHEDULE, Dps(0.01)))
    np.testing.assert_allclose(ended, prediction(z_t) - 0.01 * numerical(objective, z_t), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("linear", [True, False])
def test_psld_steps_against_residual_and_gluing(linear: bool) -> None:
    """||z0 - E(A^T y + (I - A^T A) D(z0))|| for a linear A, ||z0 - E(D(z0))|| else."""
    f, z_t, omega, gamma = Product(linear), NOISE(START).astype(np.float64), 0.01, 0.02

    def objective(z: Array) -> Array:
        z0 = prediction(z)
        x = np.sinh(z0)
        put = x + ((Y - f(x)) @ A).reshape(x.shape) if linear else x
        return omega * length(Y - f(x)) + gamma * length(z0 - Curved().encode(put)[0])

    ended = np.arcsinh(psld(Curved(), f, NOISE, SCHEDULE, Psld(omega, gamma)))
    np.testing.assert_allclose(ended, prediction(z_t) - numerical(objective, z_t), rtol=1e-5, atol=1e-7)
