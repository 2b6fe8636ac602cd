"""What a trace must hold, from engine/reference.py in float64: the loss where it takes its gradient, and bandwidths."""

from __future__ import annotations

from unittest import mock

import numpy as np
from tiny import M, Nets, P, Twin

from rlsd.engine import Job
from rlsd.engine import reference as oracle


class Witness(Twin):
    """Networks that remember the data loss [N] of each call for its gradient."""

    def __init__(self, nets: Nets, job: Job):
        super().__init__(nets, job)
        self.losses: list[np.ndarray] = []
        self.latents: list[np.ndarray] = []

    def data_gradient(self, x):
        self.losses.append(0.5 * ((self.measure(x) - self.y) ** 2).mean(1))
        return super().data_gradient(x)

    def decode(self, z):
        self.latents.append(z)
        return super().decode(z)


def bandwidths(phi: np.ndarray) -> np.ndarray:
    """h [N] by the published rule, for particles that are not close to each other."""
    n = len(phi)
    h = np.empty(n)
    for i in range(n):
        distances = sorted(np.linalg.norm(phi[i] - phi[j]) for j in range(n) if j != i)
        h[i] = distances[(n - 2) // 2] ** 2 / np.log(max(n - 1, 2))
    return h


def diversity(z: np.ndarray) -> np.ndarray:
    """Of each particle [N]: root mean square of its differences to the others."""
    squares = ((z[:, None] - z[None]) ** 2).mean(2)
    return np.sqrt(squares.sum(1) / (len(z) - 1)) if len(z) > 1 else np.full(1, np.nan)


def wanted_trace(nets: Nets, job: Job) -> np.ndarray:
    """[K - 1, N, 3]."""
    seen: list[tuple[int, np.ndarray]] = []
    true = oracle.repulsion

    def repulsion(phi, seed, item, step):
        seen.append((step, bandwidths(phi)))
        return true(phi, seed, item, step)

    witness = Witness(nets, job)
    space = "latent" if job.params.repulsion == "latent" else "features"
    with mock.patch.object(oracle, "repulsion", repulsion):
        oracle.rlsd(witness, nets.abar, M, P, job.particles, job.params, job.seed, job.item, 1, space)
    trace = np.full((job.params.steps - 1, job.particles, 3), np.nan)
    trace[:, :, 0] = witness.losses
    trace[:, :, 2] = [diversity(z) for z in witness.latents[:-1]]
    for step, h in seen:
        trace[step, :, 1] = h
    return trace
