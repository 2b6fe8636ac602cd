"""Bias and residual epilogue, and the phase interleave with its adjoint: one pass, channels last.

The interleave copies whole pixels when each phase is a block of channels ("blocks"): reads and writes of 16 bytes a
thread. In the order of a pixel shuffle a pixel's channels lie 4 apart on one side, which leaves accesses of one value;
whoever makes the phases with a convolution permutes its output channels instead, at no cost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlsd.kernels.norm.tiles import sigmoid

BLOCK, ROWS = 64, 64  # 128 bytes of halves a pixel; with 4 warps, four 16-byte accesses a thread
WARPS = 4


@triton.jit
def _tile(channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows [ROWS] and channels [BLOCK] of program axis 0, where the blocks of a row follow each other."""
    blocks = tl.cdiv(channels, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    return row, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=["pixels", "add", "silu"])
def bias_residual_kernel(  # type: ignore[no-untyped-def]
    x, bias, residual, y, pixels, channels, add, silu, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y = act(x + bias + residual): [pixels, channels], all samples together; residual is read if `add` is 1, not 0."""
    pixel, channel = _tile(channels, ROWS, BLOCK)
    inside = channel < channels
    mask = (pixel < pixels)[:, None] & inside[None, :]
    offset = pixel.to(tl.int64)[:, None] * channels + channel[None, :]  # [ROWS, BLOCK]
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    wanted = (pixel < pixels * add)[:, None] & inside[None, :]
    other = tl.load(residual + offset, mask=wanted, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :] + other
    value = tl.where(silu != 0, value * sigmoid(value), value)
    tl.store(y + offset, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _phase(channel, phase, channels, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a channel of a phase is among the 4 `channels` of a pixel of phases."""
    return phase * channels + channel if BLOCKS else 4 * channel + phase


@triton.jit(do_not_specialize=["height", "width", "add"])
def interleave_kernel(  # type: ignore[no-untyped-def]
    phases, bias, image, height, width, channels, add, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """image [samples, 2 height, 2 width, channels] from phases [samples, height + 1, width + 1, 4 channels], plus bias
    [channels], which is read if `add` is 1, not 0."""
    pixel, channel = _tile(channels, ROWS, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    row, column = pixel // (2 * width) + 1, pixel % (2 * width) + 1  # with the border that was cut off
    source = (sample * (height + 1) + row // 2) * (width + 1) + column // 2  # int64 [ROWS]
    phase = row % 2 * 2 + column % 2
    mask = (pixel < 4 * height * width)[:, None] & (channel < channels)[None, :]
    at = source[:, None] * 4 * channels + _phase(channel[None, :], phase[:, None], channels, BLOCKS)
    value = tl.load(phases + at, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=channel < channels * add, other=0.0).to(tl.float32)[None, :]
    target = (sample * 4 * height * width + pixel)[:, None] * channels + channel[None, :]
    tl.store(image + target, value.to(image.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width"])
def interleave_pull_kernel(  # type: ignore[no-untyped-def]
    image, phases, height, width, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """phases from image, zero where no pixel of the image is; a row of the tile is one phase of one pixel of phases."""
    index, channel = _tile(channels, ROWS, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    pixel, phase = index // 4, index % 4
    row = pixel // (width + 1) * 2 + phase // 2 - 1
    column = pixel % (width + 1) * 2 + phase % 2 - 1
    covered = (row >= 0) & (row < 2 * height) & (column >= 0) & (column < 2 * width)
    source = (sample * 2 * height + row) * 2 * width + column  # int64 [ROWS]
    mask = (pixel < (height + 1) * (width + 1))[:, None] & (channel < channels)[None, :]
    value = tl.load(image + source[:, None] * channels + channel[None, :], mask=mask & covered[:, None], other=0.0)
    target = (sample * (height + 1) * (width + 1) + pixel)[:, None] * 4 * channels
    target += _phase(channel[None, :], phase[:, None], channels, BLOCKS)
    tl.store(phases + target, value, mask=mask)


def _grid(rows: int, channels: int) -> tuple[int]:
    return (triton.cdiv(rows, ROWS) * triton.cdiv(channels, BLOCK),)


def bias_residual(x: Tensor, bias: Tensor, residual: Tensor | None = None, silu: bool = False) -> Tensor:
    """Launch; arguments and result as in naive.bias_residual."""
    channels = x.shape[-1]
    pixels = x.numel() // channels
    y = torch.empty_like(x)
    bias_residual_kernel[_grid(pixels, channels)](
        x, bias, x if residual is None else residual, y, pixels, channels, int(residual is not None), int(silu),
        ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return y


def interleave(phases: Tensor, order: str = "blocks", bias: Tensor | None = None) -> Tensor:
    """Launch; arguments and result as in naive.interleave."""
    samples, height, width, channels = phases.shape[0], phases.shape[1] - 1, phases.shape[2] - 1, phases.shape[3] // 4
    image = torch.empty(samples, 2 * height, 2 * width, channels, dtype=phases.dtype, device=phases.device)
    interleave_kernel[(*_grid(4 * height * width, channels), samples)](
        phases, phases if bias is None else bias, image, height, width, channels, int(bias is not None),
        ROWS=ROWS, BLOCK=BLOCK, BLOCKS=order == "blocks", num_warps=WARPS,
    )  # fmt: skip
    return image


def interleave_pull(cotangent: Tensor, order: str = "blocks") -> Tensor:
    """Launch; arguments and result as in naive.interleave_pull."""
    samples, height, width, channels = cotangent.shape[0], *(n // 2 for n in cotangent.shape[1:3]), cotangent.shape[3]
    shape = (samples, height + 1, width + 1, 4 * channels)
    phases = torch.empty(shape, dtype=cotangent.dtype, device=cotangent.device)
    interleave_pull_kernel[(*_grid(4 * (height + 1) * (width + 1), channels), samples)](
        cotangent, phases, height, width, channels, ROWS=ROWS, BLOCK=BLOCK, BLOCKS=order == "blocks", num_warps=WARPS
    )
    return phases
