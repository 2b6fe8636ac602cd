"""RLSD in NumPy on one screen, in the paper's symbols: the oracle of the native core.

Source: arXiv 2406.16683 and the authors' published runs. The networks are injected; every particle is computed on
its own, so that nothing depends on N but the repulsion. Random numbers are the engine's (Philox, addressed).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from rlsd.engine.native import normal
from rlsd.engine.params import Params

ETA, TIE = 1e-2, 1e-6  # floor of the root bandwidth, and what counts as coincident: shares of the features' scale


class Networks(Protocol):
    """The functions of a bundle on all particles at once: z [N, M], images [N, P], both flat, float64 or float32."""

    def denoise(self, z_t: np.ndarray, t: int) -> np.ndarray: ...
    def decode(self, z: np.ndarray) -> np.ndarray: ...
    def decode_pull(self, z: np.ndarray, cotangent: np.ndarray) -> np.ndarray: ...
    def features(self, image: np.ndarray) -> np.ndarray: ...
    def features_pull(self, image: np.ndarray, cotangent: np.ndarray) -> np.ndarray: ...
    def data_gradient(self, x: np.ndarray) -> np.ndarray: ...  # of (1/2) mean (y - f(x))^2, per particle


def rlsd(
    net: Networks, abar: np.ndarray, M: int, P: int, N: int, p: Params, seed: int, item: int, offset: int, space: str
) -> np.ndarray:
    """The N results [N, P]. abar: [T]. M, P: values of a latent and of an image. space: "features" or "latent"."""
    noise = lambda stream, size: np.stack([normal(seed, item, i, stream, size) for i in range(N)]).astype(float)  # noqa: E731
    z, x = noise(0xFFFFFFFF, M), noise(0xFFFFFFFE, P)
    adam_z, adam_x = Adam(p, p.lr_z), Adam(p, p.lr_x)
    D = net.decode(z)
    for k in range(p.steps - 1):
        t = min((p.steps - 1 - k) * (len(abar) // p.steps) + offset, len(abar) - 1)
        a = abar[t]
        weight = p.lambda_ * np.sqrt((1 - a) / a) / M  # lambda omega(t) / M
        eps = noise(k, M)
        n = net.denoise(np.sqrt(a) * z + np.sqrt(1 - a) * eps, t) - eps
        cotangent = (D - x) / P if p.variant == "rlsd" else net.data_gradient(D)
        if p.gamma > 0 and N > 1 and k < p.repulsion_until * (p.steps - 1):
            strength = p.gamma * np.sqrt(1 - a)
            if space == "features":
                R = repulsion(net.features(D), seed, item, k)
                cotangent = cotangent + net.features_pull(D, -weight * strength * R)
            else:
                n = n - strength * repulsion(z, seed, item, k)
        z = adam_z.step(z, weight * n + net.decode_pull(z, cotangent))
        D = net.decode(z)
        if p.variant == "rlsd":
            x = adam_x.step(x, net.data_gradient(x) + p.rho * (x - D) / P)
    return x if p.variant == "rlsd" else D


def repulsion(phi: np.ndarray, seed: int, item: int, step: int) -> np.ndarray:
    """sum_j 2 k_ij (phi_i - phi_j) / h_i, divided by sum_{j != i} k_ij: [N, D].

    h_i = median_{j != i}(d_ij)^2 / ln(max(N - 1, 2)), the lower middle as torch.median, and at least (ETA s)^2, where
    s is the features' root mean square norm (1 if that is 0): so N = 2 has a finite bandwidth. Coincident particles
    (d_ij < TIE s) count as ETA s apart, in a random direction addressed by the particles and the step.
    """
    N, D = phi.shape
    if N == 1:
        return np.zeros_like(phi)
    s = np.sqrt((phi**2).sum() / N) or 1.0
    difference = phi[:, None] - phi[None]
    d = np.sqrt((difference**2).sum(-1))
    for i, j in zip(*np.nonzero(d < TIE * s)):
        if i != j:
            xi = normal(seed, item, i, 0x80000000 + step, D) - normal(seed, item, j, 0x80000000 + step, D).astype(float)
            difference[i, j] = ETA * s * xi / np.linalg.norm(xi)
            d[i, j] = ETA * s
    others = ~np.eye(N, dtype=bool)
    median = np.sort(d[others].reshape(N, N - 1), 1)[:, (N - 2) // 2]
    h = np.maximum(median**2 / np.log(max(N - 1, 2)), (ETA * s) ** 2)
    k = np.exp(-(d**2) / h[:, None]) * others
    total = k.sum(1, keepdims=True)
    g = (2 * k / h[:, None])[..., None] * difference
    return np.divide(g.sum(1), total, out=np.zeros_like(phi), where=total > 0)


class Adam:
    """Adam (Kingma and Ba, 2015) with bias correction."""

    def __init__(self, p: Params, rate: float):
        self.p, self.rate, self.m, self.v, self.n = p, rate, np.zeros(1), np.zeros(1), 0

    def step(self, value: np.ndarray, g: np.ndarray) -> np.ndarray:
        p, self.n = self.p, self.n + 1
        self.m = p.beta1 * self.m + (1 - p.beta1) * g
        self.v = p.beta2 * self.v + (1 - p.beta2) * g**2
        m, v = self.m / (1 - p.beta1**self.n), self.v / (1 - p.beta2**self.n)
        return value - self.rate * m / (np.sqrt(v) + p.adam_eps)
