"""How a channels-last tensor is divided among programs, and what the kernels of this room share.

A program of the GroupNorm kernels handles `width` channels (whole groups) of `chunk` pixels of one sample; the grid is
(blocks of channels, chunks, samples), both for the statistics and for what is made of them. Blocks come first, so
that the programs which run together read whole rows. The division does not depend on the number of samples, and no
sum crosses samples: a sample's result is the same in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

TILE = 8192  # bytes in flight per tensor and program; 8 warps: two 16-byte accesses a thread
CHUNKS = 128  # chunks of a sample at most: each program merges the partial results of all of them
STEPS = 8  # tiles of a program at least: merging costs as much as several (bench/NOTES.md)
GROUPS = 16  # groups in a block at most
WARPS = 8
SIZES = ["pixels", "groups", "size", "width", "chunk"]  # any value: 1 and multiples of 16 are nothing special


@dataclass(frozen=True)
class Division:
    """block: lanes for channels, a power of two. width: channels in a block. rows: pixels in a tile of rows x block.

    chunk: pixels of a program, a multiple of rows. align: what starts and ends of blocks are divisible by, so that
    16 bytes can be accessed at once (1 if they cannot).
    """

    block: int
    width: int
    rows: int
    chunk: int
    align: int
    grid: tuple[int, int, int]


def divide(samples: int, pixels: int, channels: int, groups: int, itemsize: int) -> Division:
    """The division of [samples, pixels, channels] with values of `itemsize` bytes; groups divides channels."""
    size = channels // groups
    block = 64 if 64 % size == 0 else max(128, triton.next_power_of_2(size))
    vector = 16 // itemsize
    most = min(groups, GROUPS, block // size)
    aligned = [n for n in range(1, most + 1) if channels % vector == 0 and (n * size % vector == 0 or n == groups)]
    width = size * (aligned[-1] if aligned else most)
    rows = max(1, TILE // itemsize // block)
    chunk = rows * max(STEPS, triton.cdiv(pixels, rows * CHUNKS))
    grid = (triton.cdiv(channels, width), triton.cdiv(pixels, chunk), samples)
    return Division(block, width, rows, chunk, vector if aligned else 1, grid)


def rows_of(x_bias: Tensor | None, x: Tensor) -> tuple[Tensor, int]:
    """For `bias_of`: x_bias [1 or B, 1, 1, C] and its rows, or anything and 0."""
    return (x, 0) if x_bias is None else (x_bias, x_bias.shape[0])


@triton.jit
def block_of(width, channels, size, BLOCK: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's channels [BLOCK] and groups [GROUPS], which of them exist, and who is in which group."""
    start = tl.multiple_of(tl.program_id(0) * width, ALIGN)
    end = tl.multiple_of(tl.minimum(start + width, channels), ALIGN)
    channel = start + tl.arange(0, BLOCK)
    group = start // size + tl.arange(0, GROUPS)
    member = (channel // size)[:, None] == group[None, :]  # [BLOCK, GROUPS]
    return channel, channel < end, group, group * size < end, member


@triton.jit
def bias_of(x_bias, sample, channel, inside, channels, x_biases):  # type: ignore[no-untyped-def]
    """What is added to each channel [BLOCK] of the sample: of `x_biases` rows, one for each sample, one for all (1), or
    none (0), where x_bias is not read."""
    row = tl.where(x_biases > 1, sample, 0)
    wanted = tl.where(x_biases > 0, inside, False)  # `&` of the two: Triton 3.9's interpreter refuses such a mask
    return tl.load(x_bias + row * channels + channel, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def collect(value, member):  # type: ignore[no-untyped-def]
    """Sums over each group's channels: [BLOCK] -> [GROUPS]."""
    return tl.sum(tl.where(member, value[:, None], 0.0), 0)


@triton.jit
def spread(value, member):  # type: ignore[no-untyped-def]
    """Each channel's group's value: [GROUPS] -> [BLOCK]."""
    return tl.sum(tl.where(member, value[None, :], 0.0), 1)


@triton.jit
def sigmoid(y):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-y)) in float32. The square of a reciprocal root takes half the instructions of a division."""
    root = tl.rsqrt(1.0 + tl.exp2(y * -1.4426950408889634))  # log2(e)
    return root * root
