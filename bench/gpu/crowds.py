"""D: repulsion among N particles with D features each, against PyTorch, torch.cdist and KeOps.

pytorch  direct differences, as a careful user writes them: exact for close particles, N x N x D in blocks of rows
cdist    torch.cdist by direct differences, and the gradient as a matrix product
keops    torch.cdist for the median, and KeOps' lazy N x N x D for kernel and gradient

Reference: float64. Ours and the others may err at most twice as much as `pytorch` does (and SLACK).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlsd.bench import measure
from rlsd.bench.gpu import LeftOut, Line, first_line
from rlsd.bench.gpu.steps import speedups, without_figure
from rlsd.bench.gpu.subject import Bench, Wrong, free
from rlsd.bench.gpu.timing import Clock, profiled
from rlsd.bench.kernels.repulsion import moved, operations
from rlsd.kernels.repulsion import naive, repulsion

FIRST = [(N, D) for D in (384, 16384) for N in (4, 16, 64, 256)]  # what the target is for
LAST = [(N, D) for D in (384, 16384) for N in (1024, 4096)]  # seconds each: last, or while a bundle is made
KEOPS_AT_MOST = 1024  # features; it compiles code that is unrolled over them
SLACK = 1e-5
ROUNDS, SECONDS = 30, 3.0  # of one size

Method = Callable[[Tensor], Tensor]


def crowd(bench: Bench, N: int, D: int) -> list[Line]:
    """Section D for one size."""
    phi = torch.randn(N, D, generator=torch.Generator().manual_seed(0)).to(bench.device)
    want = gram(phi.double())
    common: Line = {"section": "D", "case": f"N={N} D={D}", "particles": N, "features": D}
    runs, facts, lines = {}, {}, []
    plain = SLACK
    for name, method in METHODS.items():
        try:
            error = float((method(phi) - want).norm() / want.norm())
            plain = max(error, SLACK) if name == "pytorch" else plain
            if not error <= 2 * plain:
                raise Wrong(f"relative error {error:.1e}, allowed {2 * plain:.1e}")
            runs[name] = functools.partial(method, phi)
            seen = profiled(runs[name], bench.device)
            facts[name] = {"error": error, **{f"{key}_per_step": value for key, value in seen.items() if key != "idle"}}
        except Exception as problem:
            lines.append({**common, "method": name, **without_figure(problem)})
    del want
    free()
    times = measure.interleaved(runs, ROUNDS, Clock(bench.device, flush=True), SECONDS)
    least = bench.roof.seconds(operations(1, N, D), moved(1, N, D), halves=False)
    for name, values in times.items():
        line = {**common, "method": name, "unit": "ms", **measure.quartiles([1e3 * v for v in values]), **facts[name]}
        line |= {"rounds": len(values), "roofline_share": round(1e3 * least / line["median"], 4)}
        lines.append(line | ({"speedup": speedups(times)} if name == "engine" else {}))
    return lines


def ours(phi: Tensor) -> Tensor:
    """The kernels that the engine launches."""
    offsets, numbers = _addresses(len(phi), phi.device)
    return repulsion(phi, offsets, numbers, numbers, numbers, largest=len(phi))[0]


@functools.cache
def _addresses(N: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the job's rows begin and end, and its seed, item and step: the engine has them on the device."""
    return torch.tensor([0, N], dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int64, device=device)


def direct(phi: Tensor) -> Tensor:
    """R [N, D] by differences. phi [N, D]."""
    k, h = kernel(naive.squared_distances(phi))
    return naive.weighted_differences(2 * k / h[:, None], phi) / k.sum(1, keepdim=True)


def gram(phi: Tensor) -> Tensor:
    """R by matrix products: the reference in float64, where the cancellation of close particles costs nothing."""
    phi = phi - phi.mean(0)
    square = phi.square().sum(1)
    k, h = kernel((square[:, None] + square[None] - 2 * phi @ phi.T).clamp_min(0))
    return weighted(2 * k / h[:, None], phi) / k.sum(1, keepdim=True)


def cdist(phi: Tensor) -> Tensor:
    """R with PyTorch's own distances."""
    k, h = kernel(torch.cdist(phi, phi, compute_mode="donot_use_mm_for_euclid_dist").square())
    return weighted(2 * k / h[:, None], phi) / k.sum(1, keepdim=True)


def keops(phi: Tensor) -> Tensor:
    """R with kernel and gradient as KeOps' lazy tensors; it has no median."""
    if phi.shape[1] > KEOPS_AT_MOST:
        raise LeftOut(f"KeOps unrolls its code over the features: not tried for more than {KEOPS_AT_MOST}")
    try:
        from pykeops.torch import LazyTensor
    except Exception as error:  # it looks for compilers when it is imported
        raise LeftOut(f"pykeops does not work here: {first_line(error)}") from error
    _, h = kernel(torch.cdist(phi, phi, compute_mode="donot_use_mm_for_euclid_dist").square())
    x, y = LazyTensor(phi[:, None].contiguous()), LazyTensor(phi[None].contiguous())
    width = LazyTensor(h[:, None, None].contiguous())
    k = (-((x - y) ** 2).sum(-1) / width).exp()
    total = k.sum(1).reshape(len(phi), 1) - 1  # a particle does not repel itself
    return (k * (x - y)).sum(1).reshape(phi.shape) * (2 / h[:, None]) / total


def kernel(squared: Tensor) -> tuple[Tensor, Tensor]:
    """k [N, N] with a diagonal of zeros, and h [N], of squared distances [N, N]."""
    N = len(squared)
    others, itself = _others(N, squared.device)
    ordered = squared.masked_fill(itself, math.inf).sort(1).values  # a selection by `others` would wait for the device
    h = ordered[:, (N - 2) // 2] / math.log(max(N - 1, 2))
    return (-squared / h[:, None]).exp() * others, h


@functools.cache
def _others(N: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each pair whether they are two, or one. Made once, as what the engine's kernels are given is."""
    itself = torch.eye(N, dtype=torch.bool, device=device)
    return ~itself, itself


def weighted(weights: Tensor, phi: Tensor) -> Tensor:
    """sum_j w_ij (phi_i - phi_j)."""
    return weights.sum(1, keepdim=True) * phi - weights @ phi


METHODS: dict[str, Method] = {"pytorch": direct, "engine": ours, "cdist": cdist, "keops": keops}
