"""Repulsion as torch operators, with the engine or without it (Stein variational gradient descent).

`rlsd::repulsion`, `rlsd::squared_distances` and `rlsd::weighted_differences`: CUDA tensors go through the Triton
kernels, CPU tensors through the plain definition. `repulsion` and `rbf` are what users call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlsd.kernels.repulsion import launch, naive

SCRATCH = 2**28  # bytes for the distances of large jobs, by default


def repulsion(
    phi: Tensor,
    offsets: Tensor | None = None,
    seeds: Tensor | int = 0,
    items: Tensor | int = 0,
    steps: Tensor | int = 0,
    largest: int | None = None,
    scratch: int = SCRATCH,
) -> tuple[Tensor, Tensor]:
    """R_i = sum_j 2 k_ij (phi_i - phi_j) / h_i / sum_{j != i} k_ij with k_ij = exp(-||phi_i - phi_j||^2 / h_i).

    i and j are particles of one job; h_i = median_{j != i}(d_ij)^2 / ln(max(N - 1, 2)), the lower middle, and at least
    (0.01 s)^2, where s is the root mean square norm of the job's features (1 if that is 0). Particles closer than
    1e-6 s count as 0.01 s apart, in a random direction addressed by seed, item, particles and step; each such pair
    costs 2 D random numbers for every 64 or 128 columns of R. N = 1 gives 0. Source: arXiv 2406.16683; the limits are
    those of rlsd.engine.reference.

    phi: [P, D] float32 or float16, with entries of magnitude 1e-16 to 1e16 or 0 (squares are float32).
    offsets: int32 [J + 1], from 0 to P ascending: job J owns rows offsets[J] .. offsets[J + 1] - 1; default one job.
    seeds, items, steps: int64 [J], or one number for all; a seed is taken modulo 2^64, the others modulo 2^32.
    largest: at least the number of particles of the largest job; needed with offsets, which stay on the device.
    scratch: bytes that the distances of jobs of more than 64 particles may take (at least 32 rows do).
    Returns R [P, D] and h [P], both float32. Deterministic, without host synchronisation on CUDA, without autograd.
    Up to 64 particles a job, two launches, and a job's result does not depend on the other jobs (nor on `largest`,
    within 4, 16 or 64). Raises ValueError for a wrong shape or size, TypeError for a wrong type of phi; what offsets
    hold is not checked.
    """
    if offsets is None:
        offsets, largest = _one_job(phi), len(phi)
    if largest is None:
        raise ValueError("largest is missing: it is needed with offsets, which are not read back from the device")
    addresses = [
        a if isinstance(a, Tensor) else torch.full((len(offsets) - 1,), a, dtype=torch.int64, device=phi.device)
        for a in (seeds, items, steps)
    ]
    return _repulsion(phi, offsets, *addresses, largest, scratch)


def rbf(x: Tensor, h: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """The kernel k(x_j, x_i) = exp(-||x_i - x_j||^2 / h) and the sum over j of its gradient in x_j, for SVGD.

    x: [N, D]. h: a number; [N] for a bandwidth per i; default the median of the squared distances over ln(max(N - 1,
    2)), a constant to autograd. Returns K [N, N] and sum_j grad_{x_j} k(x_j, x_i) [N, D], both with autograd; float32,
    or float64 for float64 on the CPU. Memory O(N^2), never N x N x D. Stein variational gradient descent (Liu and Wang,
    arXiv 1608.04471) on a Gaussian:

        x = torch.randn(100, 2)
        for _ in range(500):
            K, gradient = rbf(x)
            score = (mean - x) @ precision  # the gradient of log p at each particle
            x = x + 0.5 * (K @ score + gradient) / len(x)
    """
    d2 = squared_distances(x)
    if h is None:
        h = median_bandwidth(d2.detach())
    elif isinstance(h, Tensor) and h.dim() == 1:
        h = h[:, None]
    K = torch.exp(-d2 / h)
    return K, weighted_differences(2 / h * K, x)


def median_bandwidth(d2: Tensor) -> Tensor:
    """The lower median of the squared distances of all pairs over ln(max(N - 1, 2)), 1 if that is 0: [N, N] -> []."""
    N = len(d2)
    pairs = N * (N - 1) // 2  # each is there twice, behind the N zeros of the diagonal
    median = d2.flatten().sort().values[N + 2 * ((pairs - 1) // 2) if pairs else 0]
    return torch.where(median > 0, median / math.log(max(N - 1, 2)), 1)


@torch.library.custom_op("rlsd::repulsion", mutates_args=())
def _repulsion(
    phi: Tensor, offsets: Tensor, seeds: Tensor, items: Tensor, steps: Tensor, largest: int, scratch: int
) -> tuple[Tensor, Tensor]:
    _check("phi", phi, (torch.float32, torch.float16))
    jobs = len(offsets) - 1
    if not 1 <= jobs < 2**16 or not 1 <= largest <= 10**6:
        raise ValueError(f"{jobs} jobs, the largest of {largest}: 1 to 65535 jobs of 1 to 1000000 particles can be")
    for name, vector, kind, size in (
        ("offsets", offsets, torch.int32, jobs + 1),
        ("seeds", seeds, torch.int64, jobs),
        ("items", items, torch.int64, jobs),
        ("steps", steps, torch.int64, jobs),
    ):
        if vector.dtype != kind or vector.shape != (size,) or vector.device != phi.device:
            raise ValueError(f"{name} is {_words(vector)}: {kind} [{size}] on {phi.device} is needed")
    offsets, seeds, items, steps = (vector.contiguous() for vector in (offsets, seeds, items, steps))
    if phi.is_cuda:
        with torch.cuda.device_of(phi):
            return launch.repulsion(_rows(phi), offsets, seeds, items, steps, largest, scratch)
    return naive.repulsion(phi.float(), offsets, seeds, items, steps)


@_repulsion.register_fake
def _(phi: Tensor, offsets: Tensor, seeds: Tensor, items: Tensor, steps: Tensor, largest: int, scratch: int) -> Any:
    return phi.new_empty(phi.shape, dtype=torch.float32), phi.new_empty(len(phi), dtype=torch.float32)


@torch.library.custom_op("rlsd::squared_distances", mutates_args=())
def squared_distances(x: Tensor) -> Tensor:
    """||x_i - x_j||^2 by direct differences, without cancellation: x [N, D] -> [N, N], float32 (float64 on the CPU)."""
    _check("x", x, (torch.float32, torch.float16, torch.float64))
    if x.is_cuda:
        with torch.cuda.device_of(x):
            return launch.squared_distances(_rows(x))
    return naive.squared_distances(_wide(x))


@squared_distances.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(len(x), len(x), dtype=_result(x))


@torch.library.custom_op("rlsd::weighted_differences", mutates_args=())
def weighted_differences(weights: Tensor, x: Tensor) -> Tensor:
    """sum_j w_ij (x_i - x_j), without cancellation: weights [N, N] of the result's type, x [N, D] -> [N, D]."""
    _check("x", x, (torch.float32, torch.float16, torch.float64))
    if weights.shape != (len(x), len(x)) or weights.dtype != _result(x) or weights.device != x.device:
        raise ValueError(f"weights is {_words(weights)}: {_result(x)} [{len(x)}, {len(x)}] on {x.device} is needed")
    if x.is_cuda:
        with torch.cuda.device_of(x):
            return launch.weighted_differences(_rows(weights), _rows(x))
    return naive.weighted_differences(weights, _wide(x))


@weighted_differences.register_fake
def _(weights: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=_result(x))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _distances_backward(ctx: Any, cotangent: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return weighted_differences(2 * (cotangent + cotangent.T), x).to(x.dtype)


def _differences_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    weights, x = ctx.saved_tensors
    centred = x.to(cotangent.dtype) - x.to(cotangent.dtype).mean(0)
    of_weights = (cotangent * centred).sum(1, keepdim=True) - cotangent @ centred.T
    of_x = weights.sum(1, keepdim=True) * cotangent - weights.T @ cotangent
    return of_weights, of_x.to(x.dtype)


squared_distances.register_autograd(_distances_backward, setup_context=_keep)
weighted_differences.register_autograd(_differences_backward, setup_context=_keep)


def _check(name: str, x: Tensor, kinds: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in kinds or (x.is_cuda and x.dtype == torch.float64):
        raise TypeError(f"{name} is {_words(x)}: float32 or float16 is needed")
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"{name} is {_words(x)}: [particles, values] is needed, at least one of each")


def _words(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def _one_job(x: Tensor) -> Tensor:
    return torch.arange(0, len(x) + 1, max(1, len(x)), dtype=torch.int32, device=x.device)


def _result(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(_result(x))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
