"""PSLD: Rout et al., "Solving Linear Inverse Problems Provably via Posterior Sampling with Latent Diffusion Models",
NeurIPS 2023, Algorithm 2.

Latent DPS with a second term that "glues" the latent to what the encoder makes of the decoded image once the
measurement is put into it: ||z0 - E(A^T y + (I - A^T A) D(z0))||. As in the authors' code both terms are norms, not
squares, and for super-resolution A^T is the upsampling that puts measured means back in full. The term is defined for
linear operators; for others (phase retrieval, HDR) there is no A^T y, and it becomes ||z0 - E(D(z0))||, which keeps z0
where encoder and decoder agree: our reading, not the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlsd.bench.quality.dps import norm
from rlsd.bench.quality.problem import START, Array, Measurement, Noise, Prior, Schedule, column, tweedie


@dataclass(frozen=True)
class Psld:
    """omega: weight of the residual's norm. gamma: of the gluing term. eta: 1 is ancestral, as in the paper.

    gain: squared length of A's rows where it is not 1 (a mean of n pixels: 1/n); A^T is divided by it in the gluing.
    """

    omega: float
    gamma: float
    eta: float = 1.0
    gain: float = 1.0


def psld(prior: Prior, f: Measurement, noise: Noise, schedule: Schedule, s: Psld) -> Array:
    """Images [n, 1, H, W] of n particles."""
    z = noise(START)
    for k, t in enumerate(schedule.timesteps()[:-1]):
        abar = prior.abar[t]
        eps, eps_pull = prior.eps(z, t)
        z0 = tweedie(z, eps, abar)
        x, decode_pull = prior.decode(z0)
        r2, half = f.squared(x)  # half = A^T (A x - y)
        glued, encode_pull = prior.encode(x - half / s.gain if f.linear else x)
        away = z0 - glued
        away = away / column(norm(np.square(away).sum((1, 2, 3))), away)
        back = -encode_pull(away)
        back = back - f.normal_map(back) / s.gain if f.linear else back
        g0 = s.gamma * away + decode_pull(s.omega * half / column(norm(r2), half) + s.gamma * back)
        g = (g0 - np.sqrt(1 - abar) * eps_pull(g0)) / np.sqrt(abar)
        z = schedule.step(z0, eps, k, s.eta, noise(k)) - g
    return prior.decode(z, keep=False)[0]
