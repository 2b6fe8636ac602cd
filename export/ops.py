"""Torch operators that leave the exporter as one node of our own ONNX domain `rlsd`.

`group_norm` is GroupNorm with an optional SiLU behind it; `group_norm_pull` is its vector-Jacobian
product in x, recomputed from x and its statistics, so that nothing else has to be kept.
`interleave` ends a nearest-neighbour upsampling that was folded into the convolution behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("rlsd::group_norm", mutates_args=())
def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """act(weight * (x - mean) * rstd + bias) with act = SiLU if `silu`, else the identity.

    x: [B, C, *]; weight, bias: [C]. Returns y like x, and mean, rstd: [B, groups].
    """
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(-1)
    rstd = (grouped.var(-1, unbiased=False) + epsilon).rsqrt()
    y = _affine(_normalised(x, mean, rstd), weight, bias)
    return (torch.nn.functional.silu(y) if silu else y).contiguous(), mean, rstd


@group_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool) -> tuple[Tensor, ...]:
    statistics = x.new_empty(x.shape[0], groups)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


@torch.library.custom_op("rlsd::group_norm_pull", mutates_args=())
def group_norm_pull(
    cotangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool
) -> Tensor:
    """The cotangent of x, given that of y: [B, C, *]."""
    normalised = _normalised(x, mean, rstd)
    if silu:
        y = _affine(normalised, weight, bias)
        gate = torch.sigmoid(y)
        cotangent = cotangent * gate * (1 + y * (1 - gate))
    scaled = (cotangent * _per_channel(weight, x)).reshape(x.shape[0], groups, -1)
    normalised = normalised.reshape(scaled.shape)
    projected = scaled - scaled.mean(-1, keepdim=True) - normalised * (scaled * normalised).mean(-1, keepdim=True)
    return (projected * rstd[..., None]).reshape(x.shape).contiguous()


@group_norm_pull.register_fake
def _(
    cotangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool
) -> Tensor:
    return x.new_empty(x.shape)


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (x.dim() - 2))


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    grouped = x.reshape(*mean.shape, -1)
    return ((grouped - mean[..., None]) * rstd[..., None]).reshape(x.shape)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * _per_channel(weight, x) + _per_channel(bias, x)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, groups, _, silu = inputs
    ctx.save_for_backward(x, output[1], output[2], weight, bias)
    ctx.groups, ctx.silu = groups, silu


def _backward(ctx, cotangent, _mean, _rstd):  # type: ignore[no-untyped-def]
    if any(ctx.needs_input_grad[1:3]):
        raise NotImplementedError("rlsd::group_norm is for frozen networks: it has no gradient in weight and bias")
    return group_norm_pull(cotangent, *ctx.saved_tensors, ctx.groups, ctx.silu), None, None, None, None, None


group_norm.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("rlsd::interleave", mutates_args=())
def interleave(phases: Tensor) -> Tensor:
    """A pixel shuffle by 2 whose border of one pixel is cut off: [B, 4 C, H + 1, W + 1] -> [B, C, 2 H, 2 W]."""
    return torch.nn.functional.pixel_shuffle(phases, 2)[..., 1:-1, 1:-1].contiguous()


@interleave.register_fake
def _(phases: Tensor) -> Tensor:
    batch, channels, height, width = phases.shape
    return phases.new_empty(batch, channels // 4, 2 * height - 2, 2 * width - 2)


@torch.library.custom_op("rlsd::interleave_pull", mutates_args=())
def interleave_pull(cotangent: Tensor) -> Tensor:
    """The adjoint of `interleave`: [B, C, 2 H, 2 W] -> [B, 4 C, H + 1, W + 1]."""
    return torch.nn.functional.pixel_unshuffle(torch.nn.functional.pad(cotangent, (1, 1, 1, 1)), 2).contiguous()


@interleave_pull.register_fake
def _(cotangent: Tensor) -> Tensor:
    batch, channels, height, width = cotangent.shape
    return cotangent.new_empty(batch, 4 * channels, height // 2 + 1, width // 2 + 1)


interleave.register_autograd(lambda ctx, cotangent: interleave_pull(cotangent))
