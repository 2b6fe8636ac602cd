"""The pull-back of GroupNorm with an optional SiLU, channels last, recomputed from x and its statistics.

Two launches with the same grid: sums over each group, then the cotangent of x.
"""

from __future__ import annotations

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


@triton.jit(do_not_specialize=[*SIZES, "x_biases", "silu", "add"])
def pull_apply(  # type: ignore[no-untyped-def]
    cotangent, x, mean, rstd, weight, bias, x_bias, partial, added, out, pixels, channels, groups, size, width, chunk,
    x_biases, silu, add,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out [samples, pixels, channels], with `added` if `add` is 1; if 0, it is not read. Backwards, as `apply`."""
    channel, inside, group, group_inside, member = block_of(width, channels, size, BLOCK, GROUPS, ALIGN)
    sample = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * chunk
    last = tl.minimum(first + chunk, pixels)
    m, r, w, b = per_channel(
        mean, rstd, weight, bias, x_bias, sample, channel, inside, channels, groups, size, x_biases
    )
    values = pixels.to(tl.float32) * size
    plain, projected = _means(partial, sample, group, group_inside, member, groups, values, CHUNKS)
    scale, plain, projected = r * w, plain * r, projected * r * r
    steps = tl.cdiv(last - first, ROWS)
    for i in tl.range(0, steps, num_stages=3):
        pixel = first + (steps - 1 - i) * ROWS + tl.arange(0, ROWS)
        mask = (pixel < last)[:, None] & inside[None, :]
        offset = (sample * pixels + pixel)[:, None] * channels + channel[None, :]  # int64 [ROWS, BLOCK]
        centred = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) - m[None, :]
        given = tl.load(cotangent + offset, mask=mask, other=0.0).to(tl.float32)
        wanted = (pixel < last * add)[:, None] & inside[None, :]
        other = tl.load(added + offset, mask=wanted, other=0.0).to(tl.float32)
        given *= _slope(centred * scale[None, :] + b[None, :], silu)
        pulled = given * scale[None, :] - plain[None, :] - centred * projected[None, :] + other
        tl.store(out + offset, pulled.to(out.dtype.element_ty), mask=mask)


def group_norm_pull(
    cotangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool,
    added: Tensor | None = None, x_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launch both; arguments and result as in naive.group_norm_pull."""
    samples, channels = x.shape[0], x.shape[-1]
    pixels = x.shape[1] * x.shape[2]
    divided = tiles.divide(samples, pixels, channels, groups, x.element_size())
    partial = torch.empty(samples, divided.grid[1], 2, groups, device=x.device)
    out = torch.empty_like(x)
    sizes = (pixels, channels, groups, channels // groups, divided.width, divided.chunk)
    constants = {"ROWS": divided.rows, "BLOCK": divided.block, "GROUPS": tiles.GROUPS, "ALIGN": divided.align}
    row, rows = tiles.rows_of(x_bias, x)
    given = (cotangent, x, mean, rstd, weight, bias, row, partial)
    pull_sums[divided.grid](*given, *sizes, rows, int(silu), **constants, num_warps=tiles.WARPS)
    pull_apply[divided.grid](
        *given, x if added is None else added, out, *sizes, rows, int(silu), int(added is not None), **constants,
        CHUNKS=tiles.CHUNKS, num_warps=tiles.WARPS,
    )  # fmt: skip
    return out
