"""GroupNorm with an optional SiLU, channels last, in two launches with the same grid.

The statistics are merged from means and centred second moments (Welford, 1962; Chan, Golub and LeVeque, 1983), never
from sums of squares, which cancel where the mean is large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlsd.kernels.norm import tiles
from rlsd.kernels.norm.tiles import SIZES, bias_of, block_of, collect, sigmoid, spread


@triton.jit(do_not_specialize=[*SIZES, "x_biases"])
def statistics(  # type: ignore[no-untyped-def]
    x, residual, x_bias, total, partial, pixels, channels, groups, size, width, chunk, x_biases,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Each group's mean and centred second moment of x + x_bias in each chunk: partial [samples, chunks, 2, groups].

    With RESIDUAL, of total = x + residual + x_bias, which is written too. x_bias: see tiles.bias_of.
    Every lane of the tile keeps the statistics of what passes it (Welford); they are merged at the end. A lane sees one
    channel, so that a bias which is not written moves its mean alone, at the end.
    """
    channel, inside, group, group_inside, member = block_of(width, channels, size, BLOCK, GROUPS, ALIGN)
    sample = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, pixels)
    row = tl.arange(0, ROWS)
    shift = bias_of(x_bias, sample, channel, inside, channels, x_biases)
    mean = tl.zeros([ROWS, BLOCK], tl.float32)
    moment = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.range(0, tl.cdiv(last - first, ROWS), num_stages=4):
        pixel = first + i * ROWS + row
        mask = (pixel < last)[:, None] & inside[None, :]
        offset = (sample * pixels + pixel)[:, None] * channels + channel[None, :]  # int64 [ROWS, BLOCK]
        value = tl.load(x + offset, mask=mask, other=0.0)
        if RESIDUAL:
            other = tl.load(residual + offset, mask=mask, other=0.0)
            # Rounded first: what is normalised is what is written.
            value = (value.to(tl.float32) + other.to(tl.float32) + shift[None, :]).to(total.dtype.element_ty)
            tl.store(total + offset, value, mask=mask)
        value = value.to(tl.float32)
        difference = tl.where(mask, value - mean, 0.0)
        mean += difference * (1.0 / (i + 1.0))
        moment += difference * (value - mean)
    if not RESIDUAL:
        mean += shift[None, :]
    seen = (tl.maximum(last - first - row + ROWS - 1, 0) // ROWS).to(tl.float32)[:, None]  # by each row of lanes
    values = (last - first).to(tl.float32) * size
    merged = collect(tl.sum(seen * mean, 0), member) / values  # [GROUPS]
    apart = mean - spread(merged, member)[None, :]
    merged += collect(tl.sum(seen * apart, 0), member) / values  # what rounding left
    merged_moment = collect(tl.sum(moment + seen * apart * apart, 0), member)
    at = partial + (sample * tl.num_programs(1) + tl.program_id(1)) * 2 * groups + group
    tl.store(at, merged, mask=group_inside)
    tl.store(at + groups, merged_moment, mask=group_inside)


@triton.jit
def merge(partial, sample, group, inside, pixels, groups, size, chunk, chunks, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and variance of the groups [GROUPS] over all chunks of the sample."""
    k = tl.arange(0, CHUNKS)
    count = tl.maximum(tl.minimum(pixels - k * chunk, chunk), 0).to(tl.float32) * size
    at = partial + ((sample * chunks + k) * 2 * groups)[:, None] + group[None, :]
    mask = (k < chunks)[:, None] & inside[None, :]
    means = tl.load(at, mask=mask, other=0.0)  # [CHUNKS, GROUPS]
    moments = tl.load(at + groups, mask=mask, other=0.0)
    # Differences from the first chunk's mean: sums of the means themselves would round at their size.
    first = tl.load(partial + sample * chunks * 2 * groups + group, mask=inside, other=0.0)
    values = tl.sum(count, 0)
    mean = first + tl.sum((means - first[None, :]) * count[:, None], 0) / values
    apart = means - mean[None, :]
    return mean, tl.sum(moments + count[:, None] * apart * apart, 0) / values


@triton.jit(do_not_specialize=[*SIZES, "x_biases", "epsilon", "silu"])
def apply(  # type: ignore[no-untyped-def]
    x, partial, weight, bias, x_bias, y, mean_out, rstd_out, pixels, channels, groups, size, width, chunk, x_biases,
    epsilon, silu,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """y [samples, pixels, channels], and mean, rstd [samples, groups], from the partial results of `statistics`.

    Everything runs backwards: what the statistics read last may still be in the L2 cache.
    """
    channel, inside, group, group_inside, member = block_of(width, channels, size, BLOCK, GROUPS, ALIGN)
    chunks = tl.num_programs(1)
    sample = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    first = (chunks - 1 - tl.program_id(1)) * chunk
    last = tl.minimum(first + chunk, pixels)

    mean, variance = merge(partial, sample, group, group_inside, pixels, groups, size, chunk, chunks, CHUNKS)
    rstd = tl.rsqrt(variance + epsilon)
    if first == 0:
        tl.store(mean_out + sample * groups + group, mean, mask=group_inside)
        tl.store(rstd_out + sample * groups + group, rstd, mask=group_inside)

    scale = spread(rstd, member) * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    centre = spread(mean, member) - bias_of(x_bias, sample, channel, inside, channels, x_biases)
    steps = tl.cdiv(last - first, ROWS)
    for i in tl.range(0, steps, num_stages=4):
        pixel = first + (steps - 1 - i) * ROWS + tl.arange(0, ROWS)
        mask = (pixel < last)[:, None] & inside[None, :]
        offset = (sample * pixels + pixel)[:, None] * channels + channel[None, :]  # int64 [ROWS, BLOCK]
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        # Centred first: scale * value + (shift - scale * centre) would cancel where the mean is large.
        value = (value - centre[None, :]) * scale[None, :] + shift[None, :]
        value = tl.where(silu != 0, value * sigmoid(value), value)
        tl.store(y + offset, value.to(y.dtype.element_ty), mask=mask)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool, x_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch both; arguments as in naive.add_group_norm. Returns y, mean, rstd, and total, which is x if alone."""
    samples, channels = x.shape[0], x.shape[-1]
    pixels = x.shape[1] * x.shape[2]
    divided = tiles.divide(samples, pixels, channels, groups, x.element_size())
    partial = torch.empty(samples, divided.grid[1], 2, groups, device=x.device)
    mean, rstd = (torch.empty(samples, groups, device=x.device) for _ in range(2))
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    sizes = (pixels, channels, groups, channels // groups, divided.width, divided.chunk)
    constants = {"ROWS": divided.rows, "BLOCK": divided.block, "GROUPS": tiles.GROUPS, "ALIGN": divided.align}
    row, rows = tiles.rows_of(x_bias, x)
    statistics[divided.grid](
        x, x if residual is None else residual, row, total, partial, *sizes, rows, **constants,
        RESIDUAL=residual is not None, num_warps=tiles.WARPS,
    )  # fmt: skip
    apply[divided.grid](
        total, partial, weight, bias, row, y, mean, rstd, *sizes, rows if residual is None else 0, epsilon, int(silu),
        **constants, CHUNKS=tiles.CHUNKS, num_warps=tiles.WARPS,
    )  # fmt: skip
    return y, mean, rstd, total
