"""In one pass each: LayerNorm with the sum before it, and the pull-backs of LayerNorm, softmax and GELU.

Made for transformers. ONNX Runtime has no kernels for the pull-backs; of its elementwise ones a LayerNorm's takes
twenty. Its LayerNorm reaches a fifth of an H100's memory bandwidth on Stable Diffusion's rows (bench/NOTES.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTHS = (512, 1024)  # lanes of a row of a LayerNorm's pull-back, which one program handles
SUM_WIDTHS = (*WIDTHS, 2048)  # and of a LayerNorm with the sum before it
BLOCK = 1024  # values at once of the others
LANES = 256  # lanes of a warp's threads, 8 each: 16 bytes of halves


def warps(block: int) -> int:
    """Of a program with so many lanes."""
    return max(1, block // LANES)


@triton.jit(do_not_specialize=["add"])
def add_layer_norm_kernel(  # type: ignore[no-untyped-def]
    x, x_bias, residual, weight, bias, y, total, channels, epsilon, add, BLOCK: tl.constexpr
):
    """total = x + x_bias + residual, a row [channels], and y = weight * (total - mean) * rstd + bias. `residual` is
    read if `add` is 1, not 0."""
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    at = tl.program_id(0).to(tl.int64) * channels + channel
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(x_bias + channel, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(residual + at, mask=channel < channels * add, other=0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)  # first: what is normalised is what is written
    tl.store(total + at, rounded, mask=inside)
    tl.debug_barrier()  # where nobody wants the total, it lies in y
    value = rounded.to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / channels, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / channels + epsilon)
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) * rstd
    result = centred * scale + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["add"])
def layer_norm_pull_kernel(  # type: ignore[no-untyped-def]
    cotangent, x, weight, added, out, channels, epsilon, add, BLOCK: tl.constexpr
):
    """The cotangent of a row x [channels], given that of weight * (x - mean) * rstd + bias; `added` is read and added
    if `add` is 1, not 0. Mean and deviation are computed anew."""
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    at = tl.program_id(0).to(tl.int64) * channels + channel
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / channels, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / channels + epsilon)
    normal = centred * rstd
    pulled = tl.load(cotangent + at, mask=inside, other=0.0).to(tl.float32)
    pulled *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    projected = pulled - tl.sum(pulled, 0) / channels - normal * (tl.sum(pulled * normal, 0) / channels)
    result = projected * rstd + tl.load(added + at, mask=channel < channels * add, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gelu_pull_kernel(cotangent, x, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """cotangent times the derivative of x Phi(x), Phi the normal distribution: of `size` values."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 + 0.5 * tl.erf(value * 0.7071067811865476)
    density = tl.exp2(value * value * -0.7213475204444817) * 0.3989422804014327  # log2(e) / 2, 1 / sqrt(2 pi)
    pulled = tl.load(cotangent + at, mask=inside, other=0.0).to(tl.float32) * (below + value * density)
    tl.store(out + at, pulled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def softmax_pull_kernel(cotangent, y, out, columns, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y (cotangent - <y, cotangent>) scale for a row [columns] of y = softmax(x): the cotangent of x, times scale."""
    row = tl.program_id(0).to(tl.int64) * columns
    products = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(y + row + column, mask=column < columns, other=0.0).to(tl.float32)
        products += value * tl.load(cotangent + row + column, mask=column < columns, other=0.0).to(tl.float32)
    total = tl.sum(products, 0)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(y + row + column, mask=column < columns, other=0.0).to(tl.float32)
        wanted = tl.load(cotangent + row + column, mask=column < columns, other=0.0).to(tl.float32)
        tl.store(out + row + column, (value * (wanted - total) * scale).to(out.dtype.element_ty), mask=column < columns)


def add_layer_norm(
    x: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor, epsilon: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch; arguments and results as in naive.add_layer_norm."""
    channels, y, total = x.shape[-1], torch.empty_like(x), torch.empty_like(x)
    block = max(SUM_WIDTHS[0], triton.next_power_of_2(channels))
    add_layer_norm_kernel[(x.numel() // channels,)](
        x, x_bias, x if residual is None else residual, weight, bias, y, total, channels, epsilon,
        int(residual is not None), BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    return y, total


def layer_norm_pull(
    cotangent: Tensor, x: Tensor, weight: Tensor, epsilon: float, added: Tensor | None = None
) -> Tensor:
    """Launch; arguments and result as in naive.layer_norm_pull."""
    channels, out = x.shape[-1], torch.empty_like(x)
    block = max(WIDTHS[0], triton.next_power_of_2(channels))
    layer_norm_pull_kernel[(x.numel() // channels,)](
        cotangent, x, weight, x if added is None else added, out, channels, epsilon, int(added is not None),
        BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    return out


def gelu_pull(cotangent: Tensor, x: Tensor) -> Tensor:
    """Launch; arguments and result as in naive.gelu_pull."""
    size, out = x.numel(), torch.empty_like(x)
    gelu_pull_kernel[(triton.cdiv(size, BLOCK),)](cotangent, x, out, size, BLOCK=BLOCK, num_warps=warps(BLOCK))
    return out


def softmax_pull(cotangent: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """Launch; arguments and result as in naive.softmax_pull."""
    columns, out = y.shape[-1], torch.empty_like(y)
    softmax_pull_kernel[(y.numel() // columns,)](cotangent, y, out, columns, scale, BLOCK=BLOCK, num_warps=warps(BLOCK))
    return out
