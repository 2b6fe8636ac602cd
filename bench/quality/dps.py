"""DPS in latent space: Chung et al., "Diffusion Posterior Sampling for General Noisy Inverse Problems", ICLR 2023.

Algorithm 1 with z for x and f(D(.)) for the operator, as latent DPS is usually run: an ancestral step (eta = 1), then
a step of length zeta against the gradient of the residual's norm, which goes through the decoder and the UNet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlsd.bench.quality.problem import START, Array, Measurement, Noise, Prior, Schedule, column, tweedie


@dataclass(frozen=True)
class Dps:
    """zeta: length of the step against the gradient of ||y - f(D(z0))||. eta: 1 is ancestral, 0 deterministic."""

    zeta: float
    eta: float = 1.0


def dps(prior: Prior, f: Measurement, noise: Noise, schedule: Schedule, s: Dps) -> Array:
    """Images [n, 1, H, W] of n particles."""
    z = noise(START)
    for k, t in enumerate(schedule.timesteps()[:-1]):
        abar = prior.abar[t]
        eps, eps_pull = prior.eps(z, t)
        z0 = tweedie(z, eps, abar)
        x, decode_pull = prior.decode(z0)
        r2, half = f.squared(x)  # ||r||^2 and half its gradient in x: gradient of ||r|| = half / ||r||
        g0 = decode_pull(half / column(norm(r2), half))
        g = (g0 - np.sqrt(1 - abar) * eps_pull(g0)) / np.sqrt(abar)
        z = schedule.step(z0, eps, k, s.eta, noise(k)) - s.zeta * g
    return prior.decode(z, keep=False)[0]


def norm(squared: Array) -> Array:
    """The root, never 0, so that a gradient of length 0 may be divided by it."""
    return np.maximum(np.sqrt(squared), 1e-12)
