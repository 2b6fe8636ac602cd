"""The kernels of repulsion, block-diagonal over jobs: job J owns rows offsets[J] .. offsets[J + 1] of phi.

Up to 64 particles a job, two launches: `distances`, then `crowd` (bandwidths, weights and gradient). Beyond, for each
strip of rows: `distances`, `bandwidths`, `gradient`. Between them lie, in global memory, contiguous:

    partials [J, splits, rows, width]   squared distances over one split of D; `bandwidths` puts weights in split 0
    squares  [J, splits, tiles]         sums of squares of T rows over one split of D
    weights  [., width]                 k_ij / sum of k, times MARK where i and j coincide; 0 on the diagonal

Distances are direct differences: the Gram form loses all digits of particles that are close together. A pair and
element costs 2 instructions (subtract, multiply-add) and every pair is computed once, so N = 4096, D = 384 is bound by
4096^2 / 2 x 384 x 2 lane-instructions: 0.22 ms at an H100's 132 x 128 lanes x 1.755 GHz, while T = 16 reads 1.6 GB
through L2 (0.3 ms at 5.5 TB/s). A Gram path through tl.dot is left out: three TF32 products would save 0.2 ms, beside
30 s of networks for as many particles, and their error is a share of s^2, not of d^2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlsd.kernels.repulsion import naive

ETA, TIE = tl.constexpr(naive.ETA), tl.constexpr(naive.TIE)
MARK = tl.constexpr(-(2.0**-100))  # negative to be found, and too small to count, so that sums need not look for it
IDLE = tl.constexpr(-(2**63))  # the step of a job that is under no repulsion now


@triton.jit
def distances(
    phi, offsets, partials, squares, D, stride, first, rows, width, tiles, chunk, mirror,
    T: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile of T x T squared distances over one split of D. Grid (row tiles x tiles, splits, J).

    first: the strip's first row, in its job. mirror: the strip has all rows, so tiles below the diagonal are copies.
    """
    tile, split, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(1)
    start = tl.load(offsets + job).to(tl.int64)
    n = tl.load(offsets + job + 1) - tl.load(offsets + job)
    top, left = first + tile // tiles * T, tile % tiles * T
    if (top >= n) | (left >= n) | ((mirror != 0) & (left < top)):
        return
    # Loads are three-dimensional so that a thread holds 4 neighbours in D: 16-byte loads, a cheap sum at the end.
    i, j = top + tl.arange(0, T)[:, None, None], left + tl.arange(0, T)[None, :, None]
    row_i, row_j = phi + (start + i) * stride, phi + (start + j) * stride
    sums = tl.zeros([T, T, BD], tl.float32)
    norms = tl.zeros([1, T, BD], tl.float32)
    for at in tl.range(split * chunk, tl.minimum((split + 1) * chunk, D), BD, num_stages=4):
        d = at + tl.arange(0, BD)[None, None, :]
        a = tl.load(row_i + d, mask=(i < n) & (d < D), other=0.0).to(tl.float32)
        b = tl.load(row_j + d, mask=(j < n) & (d < D), other=0.0).to(tl.float32)
        difference = a - b
        sums += difference * difference
        norms += b * b
    d2 = tl.sum(sums, 2)
    i, j = top + tl.arange(0, T)[:, None], left + tl.arange(0, T)[None, :]
    inside = (i < tl.minimum(n, first + rows)) & (j < n)
    slab = partials + (job.to(tl.int64) * splits + split) * rows * width
    tl.store(slab + (i - first).to(tl.int64) * width + j, d2, mask=inside)
    if (mirror != 0) & (left != top):
        tl.store(slab + j.to(tl.int64) * width + i, d2, mask=inside)
    if top == first:
        tl.store(squares + (job * splits + split) * tiles + left // T, tl.sum(tl.sum(norms, 2)))


@triton.jit
def square_scale(squares, n, count, tiles, T: tl.constexpr):
    """s^2, the mean square norm of a job's rows, 1 if that is 0. squares: the job's [splits, tiles], count values."""
    sums = tl.zeros([128], tl.float32)
    for at in range(0, count, 128):
        q = at + tl.arange(0, 128)
        sums += tl.load(squares + q, mask=(q < count) & (q % tiles * T < n), other=0.0)
    mean = tl.sum(sums) / n
    return tl.where(mean == 0, 1.0, mean)


@triton.jit
def bandwidth(median2, n, scale2):
    """h from the squared median distance, with its floor."""
    return tl.maximum(median2 / tl.log(tl.maximum(n - 1, 2).to(tl.float32)), ETA * ETA * scale2)


@triton.jit
def select(row, n, width, rank, BN: tl.constexpr):
    """The value of that rank (0: the smallest) among |row[0 .. width - 1]|, exactly, by bisection over bits.

    2 bits a round, from three counts that travel as one number: a round is a trip through the whole block. For n up to
    2^20 - BN.
    """
    found, step, none = (rank * 0).to(tl.uint32), tl.full([], 1 << 30, tl.uint32), tl.zeros([BN], tl.int32)
    for _ in range(0, 16):
        one, two, three = none, none, none
        for at in range(0, n, BN):
            j = at + tl.arange(0, BN)
            value = tl.abs(tl.load(row + j, mask=j < width, other=float("inf"))).to(tl.uint32, bitcast=True)
            one += (value < found + step).to(tl.int32)
            two += (value < found + 2 * step).to(tl.int32)
            three += (value < found + 3 * step).to(tl.int32)
        counts = tl.sum(one.to(tl.int64) + (two.to(tl.int64) << 20) + (three.to(tl.int64) << 40))
        below = tl.full([], (1 << 20) - 1, tl.int64)
        passed = (counts & below <= rank).to(tl.uint32) + (counts >> 20 & below <= rank).to(tl.uint32)
        found += step * (passed + (counts >> 40 <= rank).to(tl.uint32))
        step = step // 4
    return found.to(tl.float32, bitcast=True)


@triton.jit
def bandwidths(
    offsets, partials, squares, h, ties, first, rows, width, splits, tiles, T: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Partial distances to weights in place, for one row of the strip; h and ties [J, rows]. Grid (rows, J).

    On the way, distances of coincident particles are stored as negative, and those to oneself, and to columns n ..
    width - 1, as infinite. `width` is a multiple of 16, and masks that end there allow 16-byte loads.
    """
    r, job = tl.program_id(0), tl.program_id(1)
    n = tl.load(offsets + job + 1) - tl.load(offsets + job)
    i = first + r
    if i >= n:
        return
    slab = rows.to(tl.int64) * width
    row = partials + job * splits * slab + r.to(tl.int64) * width
    scale2 = square_scale(squares + job * splits * tiles, n, splits * tiles, tiles, T)
    ties_seen = tl.zeros([BN], tl.int32)
    for at in range(0, n, BN):
        j = at + tl.arange(0, BN)
        d2 = tl.zeros([BN], tl.float32)
        for split in range(0, splits):
            d2 += tl.load(row + split * slab + j, mask=j < width, other=0.0)
        tied = (d2 < TIE * TIE * scale2) & (j != i) & (j < n)
        ties_seen += tied.to(tl.int32)
        d2 = tl.where(tied, -ETA * ETA * scale2, tl.where((j == i) | (j >= n), float("inf"), d2))
        tl.store(row + j, d2, mask=j < width)
    tl.debug_barrier()
    h_i = bandwidth(select(row, n, width, (n - 2) // 2, BN), n, scale2)
    sums = tl.zeros([BN], tl.float32)
    for at in range(0, n, BN):
        j = at + tl.arange(0, BN)
        sums += tl.exp(-tl.abs(tl.load(row + j, mask=j < width, other=float("inf"))) / h_i)
    total = tl.sum(sums)
    for at in range(0, n, BN):
        j = at + tl.arange(0, BN)
        d2 = tl.load(row + j, mask=j < width, other=0.0)
        w = tl.exp(-tl.abs(d2) / h_i) / total
        tl.store(row + j, tl.where(total > 0, tl.where(d2 < 0, MARK * w, w), 0.0), mask=j < width)
    tl.store(h + tl.load(offsets + job).to(tl.int64) + i, tl.where(n > 1, h_i, 0.0))
    tl.store(ties + job * rows + r, tl.where(tl.sum(ties_seen) > 0, ETA * tl.sqrt(scale2), 0.0))
