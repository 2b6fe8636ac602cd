"""Torch operators that leave the exporter as one node, or two, of what ONNX Runtime has for CUDA.

`conv_nhwc`, `linear`, `attention`, `wide_attention`, `layer_norm` and `gelu` carry their pull-backs; `geglu` stands in
noise predictors only, which need none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlsd.export.ops import LANES
from rlsd.kernels import norm
from rlsd.kernels.norm.naive import precise


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


@torch.library.custom_op("rlsd::product", mutates_args=())
def product(left: Tensor, right: Tensor, across: Sequence[bool], scale: float = 1.0) -> Tensor:
    """scale * left right, for each of a batch of matrices [B, M, K], [B, K, N]; `across`: which come transposed.

    Scaled before it is rounded: a product of halves need not fit into one by itself.
    """
    given = [x.to(precise(x.dtype)) for x in (left, right)]
    first, second = (x.transpose(1, 2) if turned else x for x, turned in zip(given, across))
    return (torch.bmm(first, second) * scale).to(left.dtype)


@product.register_fake
def _(left: Tensor, right: Tensor, across: Sequence[bool], scale: float = 1.0) -> Tensor:
    return left.new_empty(left.shape[0], left.shape[2 if across[0] else 1], right.shape[1 if across[1] else 2])


# Of attention's heads for which ONNX Runtime has a fast kernel: cuDNN's, or FlashAttention's. On an H100 its kernel for
# wider ones takes three times as long as two products and a softmax (bench/NOTES.md).
WIDEST_HEAD = 256


def is_wide(width: int, heads: int) -> bool:
    """Whether attention of so many channels in all is `wide_attention`."""
    return heads == 1 and width > WIDEST_HEAD


@torch.library.custom_op("rlsd::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(width)) v per head: query [B, L, heads * width], key and value [B, S, ...] -> like query."""
    q, k, v = (_apart(x, heads) for x in (query, key, value))
    return _together(product(_probabilities(q, k), v, [False, False]), heads)


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
    return torch.softmax(product(q, k, [False, True], q.shape[-1] ** -0.5), -1)


@torch.library.custom_op("rlsd::wide_attention", mutates_args=())
def wide_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of one head as two products and a softmax: query [B, L, C], key and value [B, S, C] -> like query.

    Returns the probabilities [B, L, S] as well, which the pull-back reads.
    """
    p = _probabilities(query, key)
    return product(p, value, [False, False]), p


@wide_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(*query.shape[:2], key.shape[1])


def _wide_keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _wide_backward(ctx, cotangent, _p):  # type: ignore[no-untyped-def]
    return _attention_pulled(*ctx.saved_tensors, cotangent)


wide_attention.register_autograd(_wide_backward, setup_context=_wide_keep)


def _attention_pulled(q: Tensor, k: Tensor, v: Tensor, p: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of q, k and v for c, that of the result, in batches of one head each."""
    scores = norm.softmax_pull(product(c, v, [False, True]), p, q.shape[-1] ** -0.5)
    return product(scores, k, [False, False]), product(scores, q, [True, False]), product(p, c, [True, False])


def _attention_keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, heads = inputs
    ctx.save_for_backward(*tensors)
    ctx.heads = heads


def _attention_backward(ctx, cotangent):  # type: ignore[no-untyped-def]
    """Recomputes the probabilities, which are far larger than queries, keys and values."""
    q, k, v, c = (_apart(x, ctx.heads) for x in (*ctx.saved_tensors, cotangent))
    pulled = _attention_pulled(q, k, v, _probabilities(q, k), c)
    return *(_together(x, ctx.heads) for x in pulled), None


attention.register_autograd(_attention_backward, setup_context=_attention_keep)


@torch.library.custom_op("rlsd::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """weight * (x - mean) * rstd + bias along the last axis: x [..., C]; weight, bias [C]."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, whatever the order of x


def _layer_norm_keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, epsilon = inputs
    ctx.save_for_backward(x, weight)
    ctx.epsilon = epsilon


def _layer_norm_backward(ctx, cotangent):  # type: ignore[no-untyped-def]
    if any(ctx.needs_input_grad[1:3]):
        raise NotImplementedError("rlsd::layer_norm is for frozen networks: it has no gradient in weight and bias")
    x, weight = ctx.saved_tensors
    return norm.layer_norm_pull(cotangent, x, weight.to(precise(x.dtype)), ctx.epsilon), None, None, None


layer_norm.register_autograd(_layer_norm_backward, setup_context=_layer_norm_keep)


@torch.library.custom_op("rlsd::gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    """x Phi(x), Phi the normal distribution, exactly: like x."""
    return torch.nn.functional.gelu(x)


@gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _gelu_keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[0])


def _gelu_backward(ctx, cotangent):  # type: ignore[no-untyped-def]
    return norm.gelu_pull(cotangent, ctx.saved_tensors[0])


gelu.register_autograd(_gelu_backward, setup_context=_gelu_keep)


@torch.library.custom_op("rlsd::geglu", mutates_args=())
def geglu(x: Tensor, bias: Tensor) -> Tensor:
    """The first half of x + bias [..., 2 C] times GELU of the second: [..., C]."""
    value, gate = (x + bias).chunk(2, -1)
    return value * torch.nn.functional.gelu(gate)


@geglu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
