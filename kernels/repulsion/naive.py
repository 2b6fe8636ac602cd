"""The plain definition of repulsion, in torch: the oracle of the kernels, and what runs on the CPU.

Same rules as engine/reference.py (bandwidth floor, lower median, coincident particles); any device, float32 or float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlsd.kernels.naive import normal

ETA, TIE = 1e-2, 1e-6  # floor of the root bandwidth, and what counts as coincident: shares of the features' scale


def repulsion(
    phi: Tensor, offsets: Tensor, seeds: Tensor, items: Tensor, steps: Tensor, largest: int = 0
) -> tuple[Tensor, Tensor]:
    """Repulsion within each job: phi [P, D] -> R [P, D], h [P]; the arguments are those of ops.repulsion."""
    ends = offsets.tolist()
    addresses = zip(seeds.tolist(), items.tolist(), steps.tolist())
    parts = [crowd(phi[a:b], *address) for a, b, address in zip(ends, ends[1:], addresses)]
    return torch.cat([R for R, _ in parts]), torch.cat([h for _, h in parts])


def crowd(phi: Tensor, seed: int, item: int, step: int) -> tuple[Tensor, Tensor]:
    """One job: R_i = sum_j 2 k_ij (phi_i - phi_j) / h_i / sum_{j != i} k_ij. phi [N, D] -> R [N, D], h [N]."""
    N, D = phi.shape
    if N < 2:
        return torch.zeros_like(phi), phi.new_zeros(N)
    s = (phi.square().sum() / N).sqrt()
    s = torch.where(s > 0, s, 1)
    others = ~torch.eye(N, dtype=torch.bool, device=phi.device)
    d = squared_distances(phi).sqrt()
    tied = (d < TIE * s) & others
    d = torch.where(tied, ETA * s, d)
    median = d[others].reshape(N, N - 1).sort(1).values[:, (N - 2) // 2]
    h = (median**2 / math.log(max(N - 1, 2))).maximum((ETA * s) ** 2)
    k = torch.where(others, (-(d**2) / h[:, None]).exp(), 0)
    g = weighted_differences(k * ~tied, phi)
    words = [value & 0xFFFFFFFF for value in (seed, seed >> 32, item, 2**31 + step)]
    for i, j in tied.nonzero().tolist():
        pair = normal(torch.tensor([[*words[:3], particle, words[3]] for particle in (i, j)]), D).double()
        xi = pair[0] - pair[1]
        g[i] += k[i, j] * ETA * s * (xi / xi.norm()).to(phi)
    total = k.sum(1)
    return torch.where((total > 0)[:, None], 2 * g / (h * total)[:, None], 0), h


def squared_distances(x: Tensor) -> Tensor:
    """||x_i - x_j||^2 by direct differences: x [N, D] -> [N, N]. Blocks of rows bound the memory."""
    return torch.cat([(rows[:, None] - x).square().sum(2) for rows in x.split(_block(x))])


def weighted_differences(weights: Tensor, x: Tensor) -> Tensor:
    """sum_j w_ij (x_i - x_j): weights [N, N], x [N, D] -> [N, D]."""
    blocks = zip(weights.split(_block(x)), x.split(_block(x)))
    return torch.cat([(w[..., None] * (rows[:, None] - x)).sum(1) for w, rows in blocks])


def _block(x: Tensor) -> int:
    return max(1, 2**24 // max(1, x.numel()))
