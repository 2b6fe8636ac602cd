"""3x3 convolutions with few channels on one side, which memory bounds, not arithmetic.

From few channels to many, a pixel's neighbourhood fits into one row of a matrix product: the image is read from the
cache, the result written once. From many to few, each pixel is read once and multiplied with the kernel's 9 taps at a
time; the products are planes as large as the image, which a second kernel shifts and sums. A GroupNorm before it is
applied to what is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlsd.kernels.norm import tiles
from rlsd.kernels.norm.forward import merge, statistics
from rlsd.kernels.norm.pull import per_channel
from rlsd.kernels.norm.tiles import sigmoid

ROWS, BLOCK, WARPS = 64, 128, 4  # narrow_conv: pixels, channels of the result
TAP_ROWS, TAP_BLOCK, TAP_WARPS = 128, 64, 8  # taps: pixels, channels of x
PIXELS, SUM_WARPS = 1024, 4  # sum
COLUMNS = (32, 64)  # of a neighbourhood in a matrix product: up to 3 and 7 channels
GROUPS = tiles.GROUPS  # of a program that finishes statistics


def columns(narrow: int) -> int:
    """How many columns the matrix of a 3x3 kernel has for so many channels on the narrow side.

    Raises ValueError for more than a matrix product of these kernels takes.
    """
    for count in COLUMNS:
        if narrow >= 1 and 9 * narrow <= count:
            return count
    raise ValueError(f"{narrow} channels are not between 1 and {COLUMNS[-1] // 9}")


def matrix_from_few(kernel: Tensor) -> Tensor:
    """The kernel [O, I, 3, 3] of a convolution from few channels as narrow_conv takes it: [K, O], K of `columns`."""
    matrix = kernel.permute(2, 3, 1, 0).flatten(0, 2)
    return torch.nn.functional.pad(matrix, (0, 0, 0, columns(kernel.shape[1]) - len(matrix))).contiguous()


def matrix_to_few(kernel: Tensor) -> Tensor:
    """The kernel [P, C, 3, 3] of a convolution to few channels as group_norm_taps takes it: [C, K], K of `columns`."""
    matrix = kernel.permute(1, 2, 3, 0).flatten(1)
    return torch.nn.functional.pad(matrix, (0, columns(kernel.shape[0]) - matrix.shape[1])).contiguous()


@triton.jit(do_not_specialize=["height", "width", "planes", "first", "add"])
def narrow_conv_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, y, height, width, planes, channels, first, add,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """y [samples, height, width, channels]; x [samples, planes, height, width] if `first` is 1, else planes last.

    bias is read if `add` is 1, not 0.
    """
    blocks = tl.cdiv(channels, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    pixels = height * width
    column = tl.arange(0, TAPS)
    tap, plane = column // planes, column % planes
    above = (row // width)[:, None] + (tap // 3 - 1)[None, :]  # [ROWS, TAPS]
    beside = (row % width)[:, None] + (tap % 3 - 1)[None, :]
    seen = (above >= 0) & (above < height) & (beside >= 0) & (beside < width)
    seen = seen & (tap < 9)[None, :] & (row < pixels)[:, None]
    pixel = above * width + beside
    at = tl.where(first != 0, plane[None, :] * pixels + pixel, pixel * planes + plane[None, :])
    patch = tl.load(x + sample * planes * pixels + at, mask=seen, other=0.0)
    inside = channel < channels
    kernel = tl.load(weight + column[:, None] * channels + channel[None, :], mask=inside[None, :], other=0.0)
    value = tl.dot(patch, kernel, input_precision="ieee")  # float32 [ROWS, BLOCK]
    value += tl.load(bias + channel, mask=channel < channels * add, other=0.0).to(tl.float32)[None, :]
    target = (sample * pixels + row)[:, None] * channels + channel[None, :]
    tl.store(y + target, value.to(y.dtype.element_ty), mask=(row < pixels)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["pixels", "groups", "size", "chunk", "chunks", "epsilon"])
def finish_kernel(  # type: ignore[no-untyped-def]
    partial, mean, rstd, pixels, groups, size, chunk, chunks, epsilon, GROUPS: tl.constexpr, CHUNKS: tl.constexpr
):
    """mean, rstd [samples, groups] from the partial results of rlsd.kernels.norm.forward.statistics."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    sample = tl.program_id(1).to(tl.int64)
    inside = group < groups
    centre, variance = merge(partial, sample, group, inside, pixels, groups, size, chunk, chunks, CHUNKS)
    tl.store(mean + sample * groups + group, centre, mask=inside)
    tl.store(rstd + sample * groups + group, tl.rsqrt(variance + epsilon), mask=inside)


@triton.jit(do_not_specialize=["pixels", "groups", "size", "x_biases", "silu", "count"])
def taps_kernel(  # type: ignore[no-untyped-def]
    x, mean, rstd, weight, bias, x_bias, kernel, taps, pixels, channels, groups, size, x_biases, silu, count,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """taps [samples, count, pixels]: x [samples, pixels, channels], normalised and rounded, times kernel
    [channels, TAPS]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, TAPS)
    total = tl.zeros([ROWS, TAPS], tl.float32)
    for start in tl.range(0, channels, BLOCK, num_stages=1):  # few turns: nothing to fetch ahead
        channel = start + tl.arange(0, BLOCK)
        inside = channel < channels
        m, r, w, b = per_channel(
            mean, rstd, weight, bias, x_bias, sample, channel, inside, channels, groups, size, x_biases
        )
        offset = (sample * pixels + row)[:, None] * channels + channel[None, :]  # int64 [ROWS, BLOCK]
        value = tl.load(x + offset, mask=(row < pixels)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        value = (value - m[None, :]) * (r * w)[None, :] + b[None, :]
        value = tl.where(silu != 0, value * sigmoid(value), value).to(kernel.dtype.element_ty)
        part = tl.load(kernel + channel[:, None] * TAPS + column[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(value, part, total, input_precision="ieee")
    target = (sample * count + column)[None, :] * pixels + row[:, None]
    tl.store(taps + target, total, mask=(row < pixels)[:, None] & (column < count)[None, :])


@triton.jit(do_not_specialize=["height", "width", "planes"])
def sum_taps_kernel(taps, bias, y, height, width, planes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y [samples, planes, height, width] from taps [samples, 9 planes, height, width]."""
    pixels = height * width
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.program_id(1) % planes
    sample = (tl.program_id(1) // planes).to(tl.int64)
    row, column = pixel // width, pixel % width
    total = tl.load(bias + plane).to(tl.float32) + tl.zeros([BLOCK], tl.float32)
    for tap in tl.static_range(9):
        above, beside = row + (tap // 3 - 1), column + (tap % 3 - 1)
        seen = (pixel < pixels) & (above >= 0) & (above < height) & (beside >= 0) & (beside < width)
        source = (sample * 9 * planes + tap * planes + plane) * pixels
        total += tl.load(taps + source + above * width + beside, mask=seen, other=0.0)
    target = (sample * planes + plane) * pixels + pixel
    tl.store(y + target, total.to(y.dtype.element_ty), mask=pixel < pixels)


def narrow_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, channels_first: bool = False) -> Tensor:
    """Launch; arguments and result as in naive.narrow_conv, weight with as many rows as `columns` says."""
    samples, *rest = x.shape
    planes, height, width = rest if channels_first else (rest[2], rest[0], rest[1])
    channels = weight.shape[1]
    y = torch.empty(samples, height, width, channels, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(height * width, ROWS) * triton.cdiv(channels, BLOCK), samples)
    narrow_conv_kernel[grid](
        x, weight, x if bias is None else bias, y, height, width, planes, channels, int(channels_first),
        int(bias is not None), ROWS=ROWS, BLOCK=BLOCK, TAPS=columns(planes), num_warps=WARPS,
    )  # fmt: skip
    return y


def group_norm_taps(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, planes: int, groups: int, epsilon: float, silu: bool,
    x_bias: Tensor | None = None, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch all three; arguments as in naive.add_group_norm_taps, kernel with as many columns as `columns` says.

    Returns the taps, mean, rstd, and total, which is x if alone.
    """
    samples, height, width, channels = x.shape
    pixels, size, device = height * width, channels // groups, x.device
    divided = tiles.divide(samples, pixels, channels, groups, x.element_size())
    chunks = divided.grid[1]
    partial = torch.empty(samples, chunks, 2, groups, device=device)
    mean, rstd = (torch.empty(samples, groups, device=device) for _ in range(2))
    total = x if residual is None else torch.empty_like(x)
    row, rows = tiles.rows_of(x_bias, x)
    statistics[divided.grid](
        x, x if residual is None else residual, row, total, partial, pixels, channels, groups, size, divided.width,
        divided.chunk, rows, ROWS=divided.rows, BLOCK=divided.block, GROUPS=tiles.GROUPS, ALIGN=divided.align,
        RESIDUAL=residual is not None, num_warps=tiles.WARPS,
    )  # fmt: skip
    finish_kernel[triton.cdiv(groups, GROUPS), samples](
        partial, mean, rstd, pixels, groups, size, divided.chunk, chunks, epsilon, GROUPS=GROUPS, CHUNKS=tiles.CHUNKS
    )
    taps = torch.empty(samples, 9 * planes, height, width, device=device)
    taps_kernel[triton.cdiv(pixels, TAP_ROWS), samples](
        total, mean, rstd, weight, bias, row, kernel, taps, pixels, channels, groups, size,
        rows if residual is None else 0, int(silu), 9 * planes, ROWS=TAP_ROWS, BLOCK=TAP_BLOCK, TAPS=columns(planes),
        num_warps=TAP_WARPS,
    )  # fmt: skip
    return taps, mean, rstd, total


def sum_taps(taps: Tensor, bias: Tensor) -> Tensor:
    """Launch; arguments and result as in naive.sum_taps."""
    samples, _, height, width = taps.shape
    planes = bias.shape[0]
    y = torch.empty(samples, planes, height, width, dtype=bias.dtype, device=taps.device)
    grid = (triton.cdiv(height * width, PIXELS), samples * planes)
    sum_taps_kernel[grid](taps, bias, y, height, width, planes, BLOCK=PIXELS, num_warps=SUM_WARPS)
    return y
