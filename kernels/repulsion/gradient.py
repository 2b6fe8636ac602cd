"""Kernels of repulsion: from weights (or, up to 64 particles, from distances) to the gradient. See distances.py."""

from __future__ import annotations

import triton
import triton.language as tl

from rlsd.kernels.philox import normals
from rlsd.kernels.repulsion.distances import ETA, IDLE, MARK, TIE, bandwidth


@triton.jit
def noise(block, i, j, stream, item, k0, k1):
    """Normal numbers of particle i less those of particle j, elements 4 block .. 4 block + 3: four float32 [B]."""
    second = tl.arange(0, 2)[:, None]  # both particles in one call: the code of Philox is long
    sign = 1.0 - 2.0 * second
    particle = tl.where(second == 0, i, j).to(tl.uint32)
    a, b, c, d = normals(block[None, :] + 0 * second, stream, particle, item, k0, k1)
    return tl.sum(a * sign, 0), tl.sum(b * sign, 0), tl.sum(c * sign, 0), tl.sum(d * sign, 0)


@triton.jit
def add_apart(out, length, i, j, left, values, job, seeds, items, steps, BD: tl.constexpr, B: tl.constexpr):
    """out[d] += length xi_d / |xi| in columns left .. left + BD - 1, of the first `values`.

    xi: the noise of i less that of j, `values` numbers. out: row i.
    """
    seed = tl.load(seeds + job)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    item, stream = tl.load(items + job).to(tl.uint32), tl.load(steps + job).to(tl.uint32) + 0x80000000
    squares = tl.zeros([B], tl.float32)
    for at in range(0, values, 4 * B):
        block = at // 4 + tl.arange(0, B)
        a, b, c, d = noise(block, i, j, stream, item, k0, k1)
        rest = values - 4 * block
        squares += tl.where(rest > 0, a * a, 0.0) + tl.where(rest > 1, b * b, 0.0)
        squares += tl.where(rest > 2, c * c, 0.0) + tl.where(rest > 3, d * d, 0.0)
    scale = length / tl.sqrt(tl.maximum(tl.sum(squares), 1e-30))
    for at in range(left, tl.minimum(left + BD, values), B):
        column = at + tl.arange(0, B)
        a, b, c, d = noise(column // 4, i, j, stream, item, k0, k1)
        lane = column % 4
        xi = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
        inside = column < values
        tl.store(out + column, tl.load(out + column, mask=inside, other=0.0) + scale * xi, mask=inside)
    tl.debug_barrier()


@triton.jit
def plain_sum(x, weights, start, n, top, left, D, stride, width, BI: tl.constexpr, BD: tl.constexpr):
    """sum_j w_ij (x_i - x_j) [BI, BD] for the rows i from `top`, whose weights begin at `weights`.

    j is the first axis, which the compiler spreads over threads last: a thread has all 8 terms of its sums.
    """
    row, d = tl.arange(0, BI)[None, :, None], left + tl.arange(0, BD)[None, None, :]
    a = tl.load(x + (start + top + row) * stride + d, mask=(top + row < n) & (d < D), other=0.0).to(tl.float32)
    sums = tl.zeros([BI, BD], tl.float32)
    for base in tl.range(0, n, 8, num_stages=3):
        j = base + tl.arange(0, 8)[:, None, None]
        w = tl.load(weights + row * width + j, mask=(top + row < n) & (j < n), other=0.0)
        b = tl.load(x + (start + j) * stride + d, mask=(j < n) & (d < D), other=0.0).to(tl.float32)
        sums += tl.sum(w * (a - b), 0)
    return sums


@triton.jit
def repel(
    sums, weights, out, h, length, start, n, top, left, D, values, width, job, seeds, items, steps,
    BI: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[i, d] = (2 / h_i) sums[i, d], sums [BI, BD] of w_ij (phi_i - phi_j). h: [BI].

    length: eta s if these rows have ties, else 0; only then are weights read, which other threads may have written.
    values: of a particle; what is behind them in its row of D is 0 and stays so.
    """
    row, d = tl.arange(0, BI), left + tl.arange(0, BD)
    # As on the CPU, a particle that is not a number makes its job's repulsion 0. So does being alone (h = 0).
    value = sums * (2.0 / h)[:, None]
    value = tl.where(value == value, value, 0.0)
    inside = (top + row < n)[:, None] & (d < D)[None, :]
    tl.store(out + (start + top + row)[:, None] * D + d[None, :], value, mask=inside)
    if length > 0:  # added to what is stored, so that the common case keeps its registers
        tl.debug_barrier()
        for r in range(0, tl.minimum(n - top, BI)):
            factor = tl.sum(tl.where(row == r, 2.0 / h, 0.0)) * length
            for j in range(0, n):
                w = tl.load(weights + r * width + j)
                if w < 0:
                    to = out + (start + top + r) * D
                    add_apart(to, w * factor / MARK, top + r, j, left, values, job, seeds, items, steps, BD, 64)


@triton.jit
def weigh(d2, i, j, n, scale2):
    """Weights [BI, BN] and bandwidths h [BI] from squared distances, and eta s if there are ties, else 0."""
    others = (i < n) & (j < n) & (i != j)
    tied = others & (d2 < TIE * TIE * scale2)
    d2 = tl.where(others, tl.where(tied, ETA * ETA * scale2, d2), float("inf"))
    # The value of rank r is the largest with at most r smaller ones. Sorting takes many steps, counting two: in one,
    # 64 values to compare with would not fit into a thread's registers.
    u, v = tl.split(tl.permute(tl.reshape(d2, [d2.shape[0], d2.shape[1] // 2, 2]), (1, 0, 2)))
    smaller = tl.sum((u[:, :, None] < d2[None, :, :]).to(tl.int32), 0)
    smaller += tl.sum((v[:, :, None] < d2[None, :, :]).to(tl.int32), 0)
    h = bandwidth(tl.max(tl.where(smaller <= (n - 2) // 2, d2, 0.0), 1), n, scale2)
    k = tl.where(others, tl.exp(-d2 / h[:, None]), 0.0)
    total = tl.sum(k, 1)
    w = tl.where((total > 0)[:, None], tl.where(tied, MARK * k, k) / total[:, None], 0.0)
    ties = tl.sum(tl.sum(tied.to(tl.int32), 1))
    return w, h, tl.where(ties > 0, ETA * tl.sqrt(scale2), 0.0)


@triton.jit
def crowd(
    phi, offsets, seeds, items, steps, partials, squares, weights, out, h, D, values, stride, splits, tiles,
    BI: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Bandwidths h, and R = out, of BI rows on BD columns; jobs of up to BN. Grid (D / BD, row blocks, J).

    The rows of jobs whose step is IDLE stay as they are.

    Every program reduces the partial distances of its rows again: that is cheaper than a third launch. partials has
    rows = width = BN, and at most BS splits; weights [D / BD, J, BN, BN] is private to each program, a way from one
    thread to another.
    """
    cut, block, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    top = block * BI
    # This kernel waits for memory: what does not depend on the job's size is read along with it, phi before its use.
    i, j = top + tl.arange(0, BI)[:, None], tl.arange(0, BN)[None, :]
    s, q = tl.arange(0, BS)[:, None], tl.arange(0, BS * (BN // T))
    part = partials + (job.to(tl.int64) * splits * BN + top) * BN + tl.arange(0, BI * BN)[None, :]
    parts = tl.load(part + s * BN * BN, mask=s < splits, other=0.0)  # behind n, anything
    norms = tl.load(squares + job * splits * tiles + q, mask=q < splits * tiles, other=0.0)
    start = tl.load(offsets + job).to(tl.int64)
    n = tl.load(offsets + job + 1) - tl.load(offsets + job)
    if (top >= n) | (tl.load(steps + job) == IDLE):
        return
    d, d_in = cut * BD + tl.arange(0, BD)[None, None, :], (cut * BD + tl.arange(0, BD) < D)[None, None, :]
    row, column = top + tl.arange(0, BI)[None, :, None], tl.arange(0, BN)[:, None, None]
    # The layout of what is read last, 4 columns of a row i to a thread, is that of the differences (see `plain_sum`).
    b = tl.load(phi + (start + column) * stride + d, mask=d_in & (column < n), other=0.0).to(tl.float32)
    a = tl.load(phi + (start + row) * stride + d, mask=d_in & (row < n), other=0.0).to(tl.float32)
    mean = tl.sum(tl.where(q % (BN // T) * T < n, norms, 0.0)) / n
    scale2 = tl.where(mean == 0, 1.0, mean)
    w, h_i, length = weigh(tl.reshape(tl.sum(parts, 0), [BI, BN]), i, j, n, scale2)
    own = weights + ((cut.to(tl.int64) * tl.num_programs(2) + job) * BN + top) * BN
    if length > 0:
        tl.store(own + tl.arange(0, BI)[:, None] * BN + j, w)
    rows = top + tl.arange(0, BI)
    tl.store(h + start + rows, tl.where(n > 1, h_i, 0.0), mask=rows < tl.where(cut == 0, n, 0))
    sums = tl.sum(tl.trans(w)[:, :, None] * (a - b), 0)
    repel(sums, own, out, h_i, length, start, n, top, cut * BD, D, values, BN, job, seeds, items, steps, BI, BD)


@triton.jit
def gradient(
    phi, offsets, seeds, items, steps, partials, h, ties, out, D, values, stride, first, rows, width, splits,
    BI: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """R = out of BI rows on BD columns, from the weights that `bandwidths` left. Grid (D / BD, rows / BI, J)."""
    cut, block, job = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(offsets + job).to(tl.int64)
    n = tl.load(offsets + job + 1) - tl.load(offsets + job)
    top = first + block * BI
    if top >= n:
        return
    row = block * BI + tl.arange(0, BI)
    valid = first + row < n
    h_i = tl.load(h + start + first + row, mask=valid, other=1.0)
    length = tl.max(tl.load(ties + job * rows + row, mask=valid, other=0.0))
    weights = partials + (job.to(tl.int64) * splits * rows + block * BI) * width
    sums = plain_sum(phi, weights, start, n, top, cut * BD, D, stride, width, BI, BD)
    repel(sums, weights, out, h_i, length, start, n, top, cut * BD, D, values, width, job, seeds, items, steps, BI, BD)


@triton.jit
def differences(x, weights, out, n, D, stride, width, BI: tl.constexpr, BD: tl.constexpr):
    """out[i] = sum_j w_ij (x_i - x_j), weights [n, width] of any sign. Grid (D / BD, n / BI)."""
    top, row = tl.program_id(1) * BI, tl.arange(0, BI)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    first = tl.program_id(1).to(tl.int64) * BI
    sums = plain_sum(x, weights + first * width, 0 * first, n, top, tl.program_id(0) * BD, D, stride, width, BI, BD)
    inside = (top + row < n)[:, None] & (d < D)[None, :]
    tl.store(out + (first + row)[:, None] * D + d[None, :], sums, mask=inside)
