"""Torch operators that leave the exporter as one node of our own ONNX domain `rlsd`.

`group_norm` is GroupNorm with an optional SiLU behind it; `group_norm_pull` is its vector-Jacobian
product in x, recomputed from x and its statistics, so that nothing else has to be kept.
`interleave` ends a nearest-neighbour upsampling that was folded into the convolution behind it. `round_through`
leaves as ONNX's own Round, and is here for its gradient.

Images are [B, C, *], or [B, *, C] where `channels_last` is set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsd.kernels.norm import naive
from rlsd.kernels.norm.naive import precise

LANES = 16  # rlsd.kernels.norm: the channels of its compiled kernels are multiples of this


@torch.library.custom_op("rlsd::group_norm", mutates_args=())
def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool, channels_last: bool = False,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """act(weight * (x - mean) * rstd + bias) with act = SiLU if `silu`, else the identity.

    x: [B, C, *]; weight, bias: [C]; x_bias, where the channels are last: [1 or B, 1, 1, C] of x's type, added to x
    first. Returns y like x, and mean, rstd: [B, groups], in float32 where x is in halves. ValueError for an x_bias
    where the channels are not last.
    """
    _last_only("x_bias", x_bias, channels_last)
    first = _computed(x, channels_last, x_bias)
    grouped = first.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(-1)
    rstd = (grouped.var(-1, unbiased=False) + epsilon).rsqrt()
    y = _affine(_normalised(first, mean, rstd), weight, bias)
    return _stored(torch.nn.functional.silu(y) if silu else y, x, channels_last), mean, rstd


@group_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool, channels_last: bool = False,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    statistics = x.new_empty(x.shape[0], groups, dtype=precise(x.dtype))
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


@torch.library.custom_op("rlsd::group_norm_pull", mutates_args=())
def group_norm_pull(
    cotangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    silu: bool,
    channels_last: bool = False,
    added: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Tensor:
    """The cotangent of x, given that of y, plus `added`, what reaches x on another way: [B, C, *].

    x_bias: as for group_norm; x is without it, mean and rstd are those of x + x_bias.
    """
    _last_only("x_bias", x_bias, channels_last)
    normalised = _normalised(_computed(x, channels_last, x_bias), mean, rstd)
    pulled = _computed(cotangent, channels_last)
    if silu:
        y = _affine(normalised, weight, bias)
        gate = torch.sigmoid(y)
        pulled = pulled * gate * (1 + y * (1 - gate))
    scaled = (pulled * _per_channel(weight, pulled)).reshape(x.shape[0], groups, -1)
    grouped = normalised.reshape(scaled.shape)
    projected = scaled - scaled.mean(-1, keepdim=True) - grouped * (scaled * grouped).mean(-1, keepdim=True)
    result = (projected * rstd[..., None]).reshape(normalised.shape)
    return _stored(result if added is None else result + _computed(added, channels_last), x, channels_last)


@group_norm_pull.register_fake
def _(
    cotangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    silu: bool,
    channels_last: bool = False,
    added: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


def _last_only(name: str, value: Tensor | None, channels_last: bool) -> None:
    if value is not None and not channels_last:
        raise ValueError(f"{name} is given, which is possible with channels_last only")


def _computed(x: Tensor, channels_last: bool, x_bias: Tensor | None = None) -> Tensor:
    """x, plus x_bias, as [B, C, *], in at least float32."""
    value = x.to(precise(x.dtype)) if x_bias is None else x.to(precise(x.dtype)) + x_bias
    return value.movedim(-1, 1) if channels_last else value


def _stored(y: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    return (y.movedim(1, -1) if channels_last else y).to(like.dtype).contiguous()


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.to(x.dtype).reshape(1, -1, *[1] * (x.dim() - 2))


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    grouped = x.reshape(*mean.shape, -1)
    return ((grouped - mean[..., None]) * rstd[..., None]).reshape(x.shape)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * _per_channel(weight, x) + _per_channel(bias, x)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, groups, _, silu, channels_last, x_bias = inputs
    ctx.save_for_backward(x, output[1], output[2], weight, bias, x_bias)
    ctx.options = groups, silu, channels_last


def _backward(ctx, cotangent, _mean, _rstd):  # type: ignore[no-untyped-def]
    if any(ctx.needs_input_grad[1:3]):
        raise NotImplementedError("rlsd::group_norm is for frozen networks: it has no gradient in weight and bias")
    *known, x_bias = ctx.saved_tensors
    pulled = group_norm_pull(cotangent, *known, *ctx.options, None, x_bias)
    return pulled, *[None] * 6, pulled.sum_to_size(x_bias.shape) if any(ctx.needs_input_grad[7:]) else None


group_norm.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("rlsd::interleave", mutates_args=())
def interleave(phases: Tensor, channels_last: bool = False, bias: Tensor | None = None) -> Tensor:
    """Four phases to one image, whose border of one pixel is cut off: [B, 4 C, H + 1, W + 1] -> [B, C, 2 H, 2 W].

    Channel 4 c + 2 a + b is phase (a, b) of channel c, as in a pixel shuffle. With channels_last:
    [B, H + 1, W + 1, 4 C] -> [B, 2 H, 2 W, C], plus bias [C], and phase (a, b) of channel c is channel (2 a + b) C + c,
    so that neighbours in memory stay neighbours. ValueError for a bias without channels_last.
    """
    _last_only("bias", bias, channels_last)
    if not channels_last:
        return torch.nn.functional.pixel_shuffle(phases, 2)[..., 1:-1, 1:-1].contiguous()
    return naive.interleave(phases, bias=bias)


@interleave.register_fake
def _(phases: Tensor, channels_last: bool = False, bias: Tensor | None = None) -> Tensor:
    if channels_last:
        batch, height, width, channels = phases.shape
        return phases.new_empty(batch, 2 * height - 2, 2 * width - 2, channels // 4)
    batch, channels, height, width = phases.shape
    return phases.new_empty(batch, channels // 4, 2 * height - 2, 2 * width - 2)


@torch.library.custom_op("rlsd::interleave_pull", mutates_args=())
def interleave_pull(cotangent: Tensor, channels_last: bool = False) -> Tensor:
    """The adjoint of `interleave`: [B, C, 2 H, 2 W] -> [B, 4 C, H + 1, W + 1], or both with their channels last."""
    if not channels_last:
        return torch.nn.functional.pixel_unshuffle(torch.nn.functional.pad(cotangent, (1, 1, 1, 1)), 2).contiguous()
    return naive.interleave_pull(cotangent)


@interleave_pull.register_fake
def _(cotangent: Tensor, channels_last: bool = False) -> Tensor:
    if channels_last:
        batch, height, width, channels = cotangent.shape
        return cotangent.new_empty(batch, height // 2 + 1, width // 2 + 1, 4 * channels)
    batch, channels, height, width = cotangent.shape
    return cotangent.new_empty(batch, 4 * channels, height // 2 + 1, width // 2 + 1)


def _interleave_keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.channels_last = inputs[1]


def _interleave_backward(ctx, cotangent):  # type: ignore[no-untyped-def]
    if any(ctx.needs_input_grad[2:]):
        raise NotImplementedError("rlsd::interleave is for frozen networks: it has no gradient in bias")
    return interleave_pull(cotangent, ctx.channels_last), None, None


interleave.register_autograd(_interleave_backward, setup_context=_interleave_keep)


@torch.library.custom_op("rlsd::round_through", mutates_args=())
def round_through(x: Tensor) -> Tensor:
    """round(x), halves to even, whose gradient is taken as 1: the straight-through estimator (arXiv 1308.3432)."""
    return x.round()


@round_through.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


round_through.register_autograd(lambda ctx, cotangent: cotangent)
