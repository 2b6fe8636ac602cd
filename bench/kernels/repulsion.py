"""Repulsion: features (384 values) and Stable Diffusion latents (16384), up to 4096 particles.

N = 4096 at D = 16384 is left out: the plain definition in float64 alone would take minutes, for a crowd that no
Stable Diffusion run has. The plain definition works in blocks of rows where N x N x D does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlsd.bench.kernels import Case
from rlsd.kernels.repulsion import naive, repulsion


def _make(jobs: int, N: int, D: int) -> Callable[[torch.device], tuple[Any, ...]]:
    def make(device: torch.device) -> tuple[Any, ...]:
        phi = torch.randn(jobs * N, D, generator=torch.Generator().manual_seed(0)).to(device)
        offsets = torch.arange(0, jobs * N + 1, N, dtype=torch.int32, device=device)
        numbers = torch.arange(jobs, device=device)
        return phi, offsets, numbers, numbers, numbers, N

    return make


def moved(jobs: int, N: int, D: int) -> int:
    """phi read, R and h written."""
    return 4 * jobs * N * (2 * D + 1)


def operations(jobs: int, N: int, D: int) -> int:
    """A pair and value: subtract, square, add, once for both orders; subtract, multiply, add for each order."""
    return jobs * N * (N - 1) * D * 9 // 2


def _case(N: int, D: int, jobs: int = 1) -> Case:
    many = f"{jobs} x " if jobs > 1 else ""
    sizes = jobs, N, D
    name = f"repulsion {many}N={N} D={D}"
    return Case(name, _make(*sizes), repulsion, naive.repulsion, moved(*sizes), operations(*sizes))


CASES: list[Case] = [
    *(_case(N, D) for D in (384, 16384) for N in (4, 16, 64, 256, 1024)),
    _case(4096, 384),
    _case(4, 384, jobs=16),
]
