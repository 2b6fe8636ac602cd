"""ReSample: Song et al., "Solving Inverse Problems with Latent Diffusion Models via Hard Data Consistency", ICLR 2024.

Deterministic DDIM steps without any gradient through the UNet. Nothing is done in the first third of the steps; in
the second, every `every` steps, the prediction z0 is decoded, fitted to y among images and encoded again; in the last
it is fitted to y among latents, and so is the end. The fitted z0 is carried back to the noise level by stochastic
resampling, with the variance of the authors' code. As there, a fit stops where the residual reaches the noise. Their
code also takes DPS steps and repeats timesteps; the paper's algorithm does not, and neither does this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlsd.bench.quality.problem import START, Array, Measurement, Noise, Prior, Schedule, column, tweedie

RESAMPLING = 0x40000000  # stream of the resampling's noise, less the step's number


@dataclass(frozen=True)
class ReSample:
    """gamma: scale of the resampling's variance (40 in the paper). every: steps from fit to fit.

    pixel_steps, latent_steps: the most of a fit; last_steps: of the one at the end. pixel_rate, latent_rate: Adam's.
    """

    gamma: float = 40.0
    every: int = 5
    pixel_steps: int = 100
    pixel_rate: float = 1e-2
    latent_steps: int = 20
    last_steps: int = 50
    latent_rate: float = 5e-3


def resample(prior: Prior, f: Measurement, noise: Noise, schedule: Schedule, s: ReSample) -> Array:
    """Images [n, 1, H, W] of n particles."""
    enough, count = f.count * f.sigma**2, schedule.steps - 1

    def among_latents(z: Array) -> tuple[Array, Array]:
        x, decode_pull = prior.decode(z)
        r2, half = f.squared(x)
        return r2, decode_pull(half)

    z = noise(START)
    for k, t in enumerate(schedule.timesteps()[:-1]):
        abar, then = prior.abar[t], schedule.level(k + 1)
        eps, _ = prior.eps(z, t, keep=False)
        z0 = tweedie(z, eps, abar)
        z = schedule.step(z0, eps, k, 0.0, np.zeros_like(z))
        if 3 * k < count or k % s.every != 0:
            continue
        if 3 * k < 2 * count:
            x = fit(f.squared, prior.decode(z0, keep=False)[0], s.pixel_rate, s.pixel_steps, enough)
            z0 = prior.encode(x, keep=False)[0]
        else:
            z0 = fit(among_latents, z0, s.latent_rate, s.latent_steps, enough)
        if then == 1.0:  # the end, where nothing is to be resampled
            z = z0
            continue
        variance = s.gamma * (1 - then) / (1 - abar) * (1 - abar / then)
        total = variance + 1 - then
        mean = (variance * np.sqrt(then) * z0 + (1 - then) * z) / total
        z = mean + np.sqrt(variance * (1 - then) / total) * noise(RESAMPLING + k)
    return prior.decode(fit(among_latents, z, s.latent_rate, s.last_steps, enough), keep=False)[0]


def fit(loss: Callable[[Array], tuple[Array, Array]], start: Array, rate: float, steps: int, enough: float) -> Array:
    """Adam on each particle until its loss is at most `enough`. loss: value [n] -> loss [n], gradient."""
    value, m, v = start, np.zeros_like(start), np.zeros_like(start)
    for n in range(1, steps + 1):
        r2, g = loss(value)
        going = column(r2 > enough, value)
        if not going.any():
            break
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        value = value - going * rate * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
    return value
