"""Convolutions with few channels on one side: the definitions that the kernels must meet.

Everything is computed in float32 at least and rounded where a tensor is written; float64 stays float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsd.kernels.norm.naive import add_group_norm, group_norm, precise

TAPS = 9  # of a kernel of 3 x 3, row by row


def narrow_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, channels_first: bool = False) -> Tensor:
    """A 3x3 convolution of few channels, zeros around the image, whose result has its channels last.

    x: [B, H, W, I], or [B, I, H, W] with channels_first; weight: [K, O], whose row (3 a + b) I + i belongs to channel i
    of the pixel a - 1 rows below and b - 1 columns to the right, K >= 9 I, further rows are zeros; bias: [O].
    Returns [B, H, W, O] of x's type.
    """
    planes = x if channels_first else x.permute(0, 3, 1, 2)
    kernel = weight[: TAPS * planes.shape[1]].reshape(3, 3, planes.shape[1], -1).permute(3, 2, 0, 1)
    kind = precise(x.dtype)
    y = torch.nn.functional.conv2d(planes.to(kind), kernel.to(kind), padding=1).permute(0, 2, 3, 1)
    return (y if bias is None else y + bias).to(x.dtype).contiguous()


def group_norm_taps(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, planes: int, groups: int, epsilon: float, silu: bool,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What each pixel of y = group_norm(x, ...) gives to its neighbours in a 3x3 convolution to few channels.

    x: [B, H, W, C]; kernel: [C, K], whose column (3 a + b) P + p is for channel p of the P `planes` of the pixel that
    sees this one a - 1 rows below and b - 1 columns to the right; further columns are zeros. weight to x_bias: as for
    rlsd.kernels.norm.naive.group_norm. Returns the taps [B, 9 P, H, W], not rounded, and mean, rstd: [B, groups].
    """
    y, mean, rstd = group_norm(x, weight, bias, groups, epsilon, silu, x_bias)
    return _products(y, kernel, planes), mean, rstd


def add_group_norm_taps(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, planes: int, groups: int,
    epsilon: float, silu: bool, x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """group_norm_taps of total = x + residual + x_bias. Returns the taps, mean, rstd, total."""
    y, mean, rstd, total = add_group_norm(x, residual, weight, bias, groups, epsilon, silu, x_bias)
    return _products(y, kernel, planes), mean, rstd, total


def _products(y: Tensor, kernel: Tensor, planes: int) -> Tensor:
    kind = precise(y.dtype)
    return (y.to(kind) @ kernel[:, : TAPS * planes].to(kind)).permute(0, 3, 1, 2).contiguous()


def sum_taps(taps: Tensor, bias: Tensor) -> Tensor:
    """The convolution's result: what each pixel is given by its neighbours, plus bias.

    taps: [B, 9 P, H, W]; bias: [P]. Returns [B, P, H, W] of bias's type.
    """
    padded = torch.nn.functional.pad(taps, (1, 1, 1, 1))
    height, width, planes = taps.shape[2], taps.shape[3], bias.shape[0]
    total = bias.to(taps.dtype).reshape(1, -1, 1, 1)
    for tap in range(TAPS):
        row, column = divmod(tap, 3)
        total = total + padded[:, tap * planes : (tap + 1) * planes, row : row + height, column : column + width]
    return total.to(bias.dtype).contiguous()
