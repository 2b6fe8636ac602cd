"""Torch operators that leave the exporter as one node, or two, of what ONNX Runtime has for CUDA.

`conv_nhwc`, `linear` and `attention` carry their pull-backs; `geglu` stands in noise predictors only, which need none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlsd.export.ops import LANES


@torch.library.custom_op("rlsd::conv_nhwc", mutates_args=())
def conv_nhwc(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """A convolution with the channels last: x [B, H, W, I], weight [O, kh, kw, I], bias [O] -> [B, H', W', O]."""
    first, kernel = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
    return torch.nn.functional.conv2d(first, kernel, bias, stride, padding).permute(0, 2, 3, 1).contiguous()


@conv_nhwc.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    sides = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[1:3], padding, weight.shape[1:3], stride)]
    return x.new_empty(x.shape[0], *sides, weight.shape[0])


def halves_the_image(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a convolution of images of an even height and width `size` is the common one of stride 2."""
    common = (list(kernel), list(stride), list(padding)) == ([3, 3], [2, 2], [1, 1])
    return common and all(n % 2 == 0 for n in size)


def _conv_keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, stride, padding = inputs
    ctx.save_for_backward(weight)
    ctx.stride, ctx.padding, ctx.size = stride, padding, x.shape[1:3]


def _conv_backward(ctx, cotangent):  # type: ignore[no-untyped-def]
    """The convolution with the rotated, transposed kernel; behind a stride of 2, with four whose results interleave."""
    (weight,) = ctx.saved_tensors
    if halves_the_image(ctx.size, weight.shape[1:3], ctx.stride, ctx.padding):
        channels = weight.shape[3]  # filled up with zeros, where the kernel that interleaves does not take so few
        filled = torch.nn.functional.pad(weight, (0, -channels % LANES))
        phases = conv_nhwc(cotangent, _halving_phases(filled), None, [1, 1], [1, 1])
        pulled = torch.ops.rlsd.interleave(phases, True)
        return pulled if channels == filled.shape[3] else pulled[..., :channels], None, None, None, None
    around = [k - 1 - p for k, p in zip(weight.shape[1:3], ctx.padding)]
    if any(s != 1 for s in ctx.stride) or any(p < 0 for p in around) or any(ctx.needs_input_grad[1:3]):
        raise NotImplementedError(
            "rlsd::conv_nhwc has a pull-back in x only, for stride 1 and padding below the kernel, or halving"
        )
    rotated = weight.flip(1, 2).permute(3, 1, 2, 0).contiguous()
    return conv_nhwc(cotangent, rotated, None, ctx.stride, around), None, None, None, None


def _halving_phases(weight: Tensor) -> Tensor:
    """The kernel [O, 3, 3, I] of a convolution of stride 2 -> [4 I, 2, 2, O], its pull-back for rlsd::interleave.

    Along one axis, the phase that lies on a pixel of the result sees it through the middle tap alone; the one between
    two of them sees them through the last tap and the first.
    """

    def pair(w: Tensor, axis: int) -> list[Tensor]:
        first, middle, last = w.unbind(axis)
        return [torch.stack([last, first], axis), torch.stack([torch.zeros_like(middle), middle], axis)]

    phases = [quarter for half in pair(weight, 1) for quarter in pair(half, 2)]  # each [O, 2, 2, I]
    return torch.stack(phases).permute(0, 4, 2, 3, 1).reshape(-1, 2, 2, weight.shape[0]).contiguous()


conv_nhwc.register_autograd(_conv_backward, setup_context=_conv_keep)


@torch.library.custom_op("rlsd::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I] times weight [I, O], plus bias [O]: a matrix product without the reshapes that ATen puts around it."""
    y = x @ weight
    return y if bias is None else y + bias


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def _linear_keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1])


def _linear_backward(ctx, cotangent):  # type: ignore[no-untyped-def]
    if any(ctx.needs_input_grad[1:]):
        raise NotImplementedError("rlsd::linear is for frozen networks: it has no gradient in weight and bias")
    return linear(cotangent, ctx.saved_tensors[0].t().contiguous(), None), None, None


linear.register_autograd(_linear_backward, setup_context=_linear_keep)


@torch.library.custom_op("rlsd::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(width)) v per head: query [B, L, heads * width], key and value [B, S, ...] -> like query."""
    q, k, v = (_apart(x, heads) for x in (query, key, value))
    return _together(torch.bmm(_probabilities(q, k), v), heads)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    return query.new_empty(query.shape)


def _apart(x: Tensor, heads: int) -> Tensor:
    """[B, L, heads * width] -> [B * heads, L, width]"""
    if heads == 1:
        return x
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2).reshape(x.shape[0] * heads, x.shape[1], -1)


def _together(x: Tensor, heads: int) -> Tensor:
    """The inverse of _apart, as a new tensor."""
    if heads == 1:
        return x
    return x.reshape(-1, heads, *x.shape[1:]).transpose(1, 2).reshape(x.shape[0] // heads, x.shape[1], -1)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """The scale is split over both factors: a product of halves must not overflow before it is scaled."""
    root = q.shape[-1] ** -0.25
    return torch.softmax(torch.bmm(q * root, (k * root).transpose(1, 2)), -1)


def _attention_keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, heads = inputs
    ctx.save_for_backward(*tensors)
    ctx.heads = heads


def _attention_backward(ctx, cotangent):  # type: ignore[no-untyped-def]
    """Recomputes the probabilities, which are far larger than queries, keys and values."""
    q, k, v, c = (_apart(x, ctx.heads) for x in (*ctx.saved_tensors, cotangent))
    p = _probabilities(q, k)
    wanted = torch.bmm(c, v.transpose(1, 2))
    scores = p * (wanted - (wanted * p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    pulled = (torch.bmm(scores, k), torch.bmm(scores.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), c))
    return *(_together(x, ctx.heads) for x in pulled), None


attention.register_autograd(_attention_backward, setup_context=_attention_keep)


@torch.library.custom_op("rlsd::geglu", mutates_args=())
def geglu(x: Tensor, bias: Tensor) -> Tensor:
    """The first half of x + bias [..., 2 C] times GELU of the second: [..., C]."""
    value, gate = (x + bias).chunk(2, -1)
    return value * torch.nn.functional.gelu(gate)


@geglu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
