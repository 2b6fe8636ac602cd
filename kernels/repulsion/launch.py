"""Launches of the repulsion kernels: how work is cut up, and what is allocated. No host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlsd.kernels.aot import Kernel
from rlsd.kernels.repulsion.distances import bandwidths, distances
from rlsd.kernels.repulsion.gradient import crowd, differences, gradient

TILE, ROW, STRIP = 16, 1024, 32  # rows of a tile of distances, values of a row at a time, rows of a block of gradients
CUT = 64  # columns of a gradient


@dataclass(frozen=True)
class Size:
    """Constants for jobs of up to `n` particles, up to 64: rows and columns of a tile of distances, the most splits of
    D; rows and columns of a gradient, and the warps that compute it. They and D alone decide the order of every sum,
    so that a job's result does not depend on the jobs beside it."""

    n: int
    tile: int
    columns: int
    splits: int
    rows: int
    cut: int
    warps: int


SIZES = (Size(4, 4, 128, 128, 4, 128, 4), Size(16, TILE, 32, 64, 8, 128, 8), Size(64, TILE, 32, 16, 4, 64, 4))


def repulsion(
    phi: Tensor, offsets: Tensor, seeds: Tensor, items: Tensor, steps: Tensor, largest: int, scratch: int
) -> tuple[Tensor, Tensor]:
    """R [P, D] and h [P], both float32, by the kernels; arguments as ops.repulsion, checked there."""
    out = torch.empty(phi.shape, dtype=torch.float32, device=phi.device)
    h = torch.empty(len(phi), dtype=torch.float32, device=phi.device)
    addresses = (offsets, seeds, items, steps)
    if largest <= SIZES[-1].n:
        _small(phi, addresses, out, h, next(size for size in SIZES if largest <= size.n))
    else:
        _large(phi, addresses, out, h, largest, scratch)
    return out, h


def _small(phi: Tensor, addresses: tuple[Tensor, ...], out: Tensor, h: Tensor, size: Size) -> None:
    D, jobs, tiles = phi.shape[1], len(addresses[1]), size.n // size.tile
    splits, chunk = _split(D, size.columns, size.splits)
    cuts = _ceil(D, size.cut)
    partials, squares = h.new_empty(jobs, splits, size.n, size.n), h.new_empty(jobs, splits, tiles)
    weights = h.new_empty(cuts, jobs, size.n, size.n)
    distances[(tiles * tiles, splits, jobs)](
        phi, addresses[0], partials, squares, D, phi.stride(0), 0, size.n, size.n, tiles, chunk, 1,
        T=size.tile, BD=size.columns,
    )  # fmt: skip
    crowd[(cuts, size.n // size.rows, jobs)](
        phi, *addresses, partials, squares, weights, out, h, D, D, phi.stride(0), splits, tiles,
        **_constants(size), num_warps=size.warps,
    )  # fmt: skip


def _large(phi: Tensor, addresses: tuple[Tensor, ...], out: Tensor, h: Tensor, largest: int, scratch: int) -> None:
    D, stride, jobs, tiles = phi.shape[1], phi.stride(0), len(addresses[1]), _ceil(largest, TILE)
    splits, chunk = _large_split(D, tiles)
    width = tiles * TILE
    rows = min(_ceil(largest, STRIP), max(1, scratch // (4 * jobs * splits * width * STRIP))) * STRIP
    partials, squares = h.new_empty(jobs, splits, rows, width), h.new_empty(jobs, splits, tiles)
    ties = h.new_empty(jobs, rows)
    for first in range(0, largest, rows):
        distances[(_ceil(min(rows, largest - first), TILE) * tiles, splits, jobs)](
            phi, addresses[0], partials, squares, D, stride, first, rows, width, tiles, chunk, int(rows >= largest),
            T=TILE, BD=32,
        )  # fmt: skip
        bandwidths[(rows, jobs)](
            addresses[0], partials, squares, h, ties, first, rows, width, splits, tiles, T=TILE, BN=ROW
        )  # fmt: skip
        gradient[(_ceil(D, CUT), rows // STRIP, jobs)](
            phi, *addresses, partials, h, ties, out, D, D, stride, first, rows, width, splits, BI=STRIP, BD=CUT
        )


def _constants(size: Size) -> dict[str, int]:
    return {"BI": size.rows, "BN": size.n, "BS": size.splits, "T": size.tile, "BD": size.cut}


def squared_distances(x: Tensor) -> Tensor:
    """||x_i - x_j||^2 [N, N] float32 by the kernel: x [N, D]."""
    N, D = x.shape
    tiles = _ceil(N, TILE)
    splits, chunk = _large_split(D, tiles)
    partials = torch.empty(splits, N, tiles * TILE, dtype=torch.float32, device=x.device)
    squares = partials.new_empty(splits, tiles)
    offsets = torch.arange(0, 2 * N, N, dtype=torch.int32, device=x.device)
    distances[(tiles * tiles, splits, 1)](
        x, offsets, partials, squares, D, x.stride(0), 0, N, tiles * TILE, tiles, chunk, 1, T=TILE, BD=32
    )
    return partials[:, :, :N].sum(0)


def weighted_differences(weights: Tensor, x: Tensor) -> Tensor:
    """sum_j w_ij (x_i - x_j) [N, D] float32 by the kernel: weights [N, N] float32, x [N, D]."""
    N, D = x.shape
    out = torch.empty(N, D, dtype=torch.float32, device=x.device)
    differences[(_ceil(D, CUT), _ceil(N, STRIP))](
        x, weights, out, N, D, x.stride(0), weights.stride(0), BI=STRIP, BD=CUT
    )
    return out


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _split(D: int, columns: int, most: int) -> tuple[int, int]:
    """At most so many splits of D, and the length of one, a multiple of `columns`."""
    chunk = _ceil(_ceil(D, most), columns) * columns
    return _ceil(D, chunk), chunk


def _large_split(D: int, tiles: int) -> tuple[int, int]:
    """Splits where there are few tiles for 132 multiprocessors; half of the tiles are copies."""
    return _split(D, 512, max(1, 512 // tiles**2))


_TYPES = {
    **dict.fromkeys(("phi", "partials", "squares", "weights", "ties", "out", "h"), "*fp32"),
    **{"offsets": "*i32", "seeds": "*i64", "items": "*i64", "steps": "*i64"},
    **dict.fromkeys(("D", "stride", "width", "chunk"), "i32:16"),
    **dict.fromkeys(("values", "first", "rows", "splits", "tiles", "mirror"), "i32"),
}


def _kernel(name: str, function: Any, types: dict[str, str] = _TYPES, **constants: int) -> Kernel:
    arguments = [name for name in function.arg_names if name not in constants]
    return Kernel(f"repulsion_{name}", function, {name: types[name] for name in arguments}, constants)


# D, the stride of a row and hence the length of a split must be multiples of 16.
KERNELS = [
    _kernel("distances_4", distances, {**_TYPES, "width": "i32"}, T=4, BD=SIZES[0].columns),  # 4 columns are not 16
    _kernel("distances_16", distances, T=TILE, BD=SIZES[1].columns),
    *(replace(_kernel(f"crowd_{size.n}", crowd, _TYPES, **_constants(size)), warps=size.warps) for size in SIZES),
    _kernel("bandwidths", bandwidths, T=TILE, BN=ROW),
    _kernel("gradient", gradient, BI=STRIP, BD=CUT),
]
