"""The pull-back of GroupNorm with an optional SiLU, channels last, recomputed from x and its statistics.

Two launches with the same grid: sums over each group, then the cotangent of x.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlsd.kernels.norm import tiles
from rlsd.kernels.norm.tiles import SIZES, bias_of, block_of, collect, sigmoid, spread


@triton.jit
def per_channel(  # type: ignore[no-untyped-def]
    mean, rstd, weight, bias, x_bias, sample, channel, inside, channels, groups, size, x_biases
):  # fmt: skip
    """Four [BLOCK]: the mean of x alone, rstd, weight and bias of each channel."""
    at = sample * groups + channel // size
    return (
        tl.load(mean + at, mask=inside, other=0.0) - bias_of(x_bias, sample, channel, inside, channels, x_biases),
        tl.load(rstd + at, mask=inside, other=0.0),
        tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32),
        tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32),
    )


@triton.jit
def _slope(y, silu):  # type: ignore[no-untyped-def]
    """The derivative of the activation at y."""
    gate = sigmoid(y)
    return tl.where(silu != 0, gate * (1.0 + y * (1.0 - gate)), 1.0)


@triton.jit(do_not_specialize=[*SIZES, "x_biases", "silu"])
def pull_sums(  # type: ignore[no-untyped-def]
    cotangent, x, mean, rstd, weight, bias, x_bias, partial, pixels, channels, groups, size, width, chunk, x_biases,
    silu, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Each group's sums of scaled and scaled * normalised in each chunk: partial [samples, chunks, 2, groups]."""
    channel, inside, group, group_inside, member = block_of(width, channels, size, BLOCK, GROUPS, ALIGN)
    sample = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, pixels)
    m, r, w, b = per_channel(
        mean, rstd, weight, bias, x_bias, sample, channel, inside, channels, groups, size, x_biases
    )
    scale = r * w
    plain = tl.zeros([ROWS, BLOCK], tl.float32)
    projected = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.range(0, tl.cdiv(last - first, ROWS), num_stages=3):
        pixel = first + i * ROWS + tl.arange(0, ROWS)
        mask = (pixel < last)[:, None] & inside[None, :]
        offset = (sample * pixels + pixel)[:, None] * channels + channel[None, :]  # int64 [ROWS, BLOCK]
        centred = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) - m[None, :]
        given = tl.load(cotangent + offset, mask=mask, other=0.0).to(tl.float32)  # 0 where nothing is: adds nothing
        given *= _slope(centred * scale[None, :] + b[None, :], silu)
        plain += given
        projected += given * centred
    # What belongs to a channel is multiplied once.
    at = partial + (sample * tl.num_programs(1) + tl.program_id(1)) * 2 * groups + group
    tl.store(at, collect(tl.sum(plain, 0) * w, member), mask=group_inside)
    tl.store(at + groups, collect(tl.sum(projected, 0) * scale, member), mask=group_inside)


@triton.jit
def _means(partial, sample, group, inside, member, groups, values, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two [BLOCK]: the sums over all chunks of each channel's group, divided by the group's number of values."""
    k = tl.arange(0, CHUNKS)
    at = partial + ((sample * tl.num_programs(1) + k) * 2 * groups)[:, None] + group[None, :]
    mask = (k < tl.num_programs(1))[:, None] & inside[None, :]
    plain = tl.sum(tl.load(at, mask=mask, other=0.0), 0) / values
    projected = tl.sum(tl.load(at + groups, mask=mask, other=0.0), 0) / values
    return spread(plain, member), spread(projected, member)


@triton.jit
def _pixel_of(row, pixels, columns):  # type: ignore[no-untyped-def]
    """The pixel of an image whose value is this row of an interleave's phases, and whether there is one."""
    across, place = columns // 2 + 1, row >> 2
    line = (place.to(tl.uint32) // across.to(tl.uint32)).to(tl.int32)
    above = 2 * line + ((row >> 1) & 1) - 1
    beside = 2 * (place - line * across) + (row & 1) - 1
    # Without a sign, -1 is large: two comparisons instead of four.
    covered = (above.to(tl.uint32) < (pixels // columns).to(tl.uint32)) & (beside.to(tl.uint32) < columns.to(tl.uint32))
    return above * columns + beside, covered


@triton.jit(do_not_specialize=[*SIZES, "x_biases", "silu", "add", "rows", "columns"])
def pull_apply(  # type: ignore[no-untyped-def]
    cotangent, x, mean, rstd, weight, bias, x_bias, partial, added, out, pixels, channels, groups, size, width, chunk,
    x_biases, silu, add, rows, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr, CHUNKS: tl.constexpr,
    PHASES: tl.constexpr,
):  # fmt: skip
    """out [samples, pixels, channels], with `added` if `add` is 1; if 0, it is not read. Backwards, as `apply`.

    With PHASES [samples, rows, channels], the phases of an image of `columns`, see naive.interleave_pull: zeros where
    no pixel is. chunk is of these rows then, as many chunks as there are partial results.
    """
    channel, inside, group, group_inside, member = block_of(width, channels, size, BLOCK, GROUPS, ALIGN)
    sample = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * chunk
    last = tl.minimum(first + chunk, rows if PHASES else pixels)
    m, r, w, b = per_channel(
        mean, rstd, weight, bias, x_bias, sample, channel, inside, channels, groups, size, x_biases
    )
    values = pixels.to(tl.float32) * size
    plain, projected = _means(partial, sample, group, group_inside, member, groups, values, CHUNKS)
    scale, plain, projected = r * w, plain * r, projected * r * r
    steps = tl.cdiv(last - first, ROWS)
    for i in tl.range(0, steps, num_stages=3):
        row = first + (steps - 1 - i) * ROWS + tl.arange(0, ROWS)
        written = (row < last)[:, None] & inside[None, :]
        pixel, mask = row, written
        if PHASES:
            pixel, covered = _pixel_of(row, pixels, columns)
            mask = written & covered[:, None]
        offset = (sample * pixels + pixel)[:, None] * channels + channel[None, :]  # int64 [ROWS, BLOCK]
        centred = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) - m[None, :]
        given = tl.load(cotangent + offset, mask=mask, other=0.0).to(tl.float32)
        wanted = (row < last * add)[:, None] & inside[None, :]
        if PHASES:
            wanted = wanted & covered[:, None]
        other = tl.load(added + offset, mask=wanted, other=0.0).to(tl.float32)
        given *= _slope(centred * scale[None, :] + b[None, :], silu)
        pulled = given * scale[None, :] - plain[None, :] - centred * projected[None, :] + other
        if PHASES:
            offset = (sample * rows + row)[:, None] * channels + channel[None, :]
            pulled = tl.where(mask, pulled, 0.0)
        tl.store(out + offset, pulled.to(out.dtype.element_ty), mask=written)


def group_norm_pull(
    cotangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool,
    added: Tensor | None = None, x_bias: Tensor | None = None, phases: bool = False,
) -> Tensor:  # fmt: skip
    """Launch both; arguments and result as in naive.group_norm_pull, with `phases` in group_norm_pull_phases."""
    samples, height, columns, channels = x.shape
    pixels = height * columns
    divided = tiles.divide(samples, pixels, channels, groups, x.element_size())
    partial = torch.empty(samples, divided.grid[1], 2, groups, device=x.device)
    shape = (samples, height // 2 + 1, columns // 2 + 1, 4 * channels) if phases else tuple(x.shape)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    rows_out = math.prod(shape[1:]) // channels
    part = triton.cdiv(rows_out, divided.grid[1] * divided.rows) * divided.rows  # of `rows_out` a program
    sizes = (pixels, channels, groups, channels // groups, divided.width)
    constants = {"ROWS": divided.rows, "BLOCK": divided.block, "GROUPS": tiles.GROUPS, "ALIGN": divided.align}
    row, rows = tiles.rows_of(x_bias, x)
    given = (cotangent, x, mean, rstd, weight, bias, row, partial)
    pull_sums[divided.grid](*given, *sizes, divided.chunk, rows, int(silu), **constants, num_warps=tiles.WARPS)
    pull_apply[divided.grid](
        *given, x if added is None else added, out, *sizes, part, rows, int(silu), int(added is not None), rows_out,
        columns, **constants, CHUNKS=tiles.CHUNKS, PHASES=phases, num_warps=tiles.WARPS,
    )  # fmt: skip
    return out
