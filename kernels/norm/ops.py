"""The torch operators of this room: tensors with their channels last, [B, H, W, C], on a GPU contiguous.

On CUDA the Triton kernels run (float64 excepted), elsewhere the plain definitions. Errors: ValueError that names the
argument. Gradients reach x, residual, x_bias and phases; weight and bias belong to frozen networks and get none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlsd.kernels.norm import checks, elementwise, forward, naive, pull, rows


@torch.library.custom_op("rlsd::group_norm_nhwc", mutates_args=())
def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool, x_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """act(weight * (x - mean) * rstd + bias), act = SiLU if `silu`, else the identity.

    x: [B, H, W, C]; weight, bias: [C]; x_bias: [1 or B, 1, 1, C] of x's type, added to x first, at no pass over memory.
    Returns y like x, and mean, rstd: [B, groups], in float32 (float64 for float64).
    """
    checks.norm(x, weight, bias, groups, epsilon)
    checks.x_bias(x_bias, x)
    run = forward.group_norm if checks.on_device(x) else naive.group_norm
    with torch.cuda.device_of(x):
        return run(x, weight, bias, groups, epsilon, silu, x_bias)[:3]


@group_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *rest: object) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *_statistics(x, groups)


@torch.library.custom_op("rlsd::add_group_norm_nhwc", mutates_args=())
def add_group_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """group_norm of total = x + residual + x_bias, in the same pass. residual: like x; x_bias: as for group_norm.

    Returns y, mean, rstd as group_norm does, and total like x.
    """
    checks.norm(x, weight, bias, groups, epsilon)
    checks.like("residual", residual, x)
    checks.x_bias(x_bias, x)
    if not checks.on_device(x):
        return naive.add_group_norm(x, residual, weight, bias, groups, epsilon, silu, x_bias)
    with torch.cuda.device_of(x):
        return forward.group_norm(x, weight, bias, groups, epsilon, silu, x_bias, residual)


@add_group_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, groups: int, *rest: object) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *_statistics(x, groups), torch.empty_like(x)


@torch.library.custom_op("rlsd::group_norm_pull_nhwc", mutates_args=())
def group_norm_pull(
    cotangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    silu: bool,
    added: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Tensor:
    """The cotangent of x, given that of y and what group_norm returned, plus `added`: all [B, H, W, C] like x.

    x_bias: as for group_norm; x is without it, mean and rstd are those of x + x_bias.
    """
    checks.pulled(cotangent, x, mean, rstd, weight, bias, groups, added, x_bias)
    run = pull.group_norm_pull if checks.on_device(x) else naive.group_norm_pull
    with torch.cuda.device_of(x):
        return run(cotangent, x, mean, rstd, weight, bias, groups, silu, added, x_bias)


@group_norm_pull.register_fake
def _(cotangent: Tensor, x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("rlsd::group_norm_pull_phases", mutates_args=())
def group_norm_pull_phases(
    cotangent: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    silu: bool,
    added: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> Tensor:
    """interleave_pull of group_norm_pull, whose arguments it has: [B, 2 H, 2 W, C] -> [B, H + 1, W + 1, 4 C].

    The phases are blocks of channels. Without gradients.
    """
    checks.pulled(cotangent, x, mean, rstd, weight, bias, groups, added, x_bias)
    checks.interleaved(cotangent)
    given = (cotangent, x, mean, rstd, weight, bias, groups, silu, added, x_bias)
    if not checks.on_device(x):
        return naive.group_norm_pull_phases(*given)
    with torch.cuda.device_of(x):
        return pull.group_norm_pull(*given, phases=True)


@group_norm_pull_phases.register_fake
def _(cotangent: Tensor, x: Tensor, *rest: object) -> Tensor:
    batch, height, width, channels = x.shape
    return x.new_empty(batch, height // 2 + 1, width // 2 + 1, 4 * channels)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, groups, _, silu, x_bias = inputs
    ctx.save_for_backward(x, output[1], output[2], weight, bias, x_bias)
    ctx.groups, ctx.silu = groups, silu
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx, cotangent, _mean, _rstd):  # type: ignore[no-untyped-def]
    checks.frozen(ctx.needs_input_grad[1:3])
    *known, x_bias = ctx.saved_tensors
    pulled = group_norm_pull(cotangent.contiguous(), *known, ctx.groups, ctx.silu, None, x_bias)
    return pulled, *[None] * 5, _summed(pulled, x_bias, ctx.needs_input_grad[6:])


def _summed(pulled: Tensor, x_bias: Tensor | None, needed: Sequence[bool]) -> Tensor | None:
    """The cotangent of what was added to every pixel; `needed` is empty where x_bias is left out."""
    return pulled.sum_to_size(x_bias.shape) if any(needed) and x_bias is not None else None


group_norm.register_autograd(_backward, setup_context=_keep)


def _keep_sum(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, weight, bias, groups, _, silu, x_bias = inputs
    ctx.save_for_backward(output[3], output[1], output[2], weight, bias)
    ctx.groups, ctx.silu, ctx.x_bias = groups, silu, None if x_bias is None else x_bias.new_empty(x_bias.shape)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # a total that nobody else uses has no cotangent to add


def _backward_sum(ctx, cotangent, _mean, _rstd, added):  # type: ignore[no-untyped-def]
    checks.frozen(ctx.needs_input_grad[2:4])
    added = None if added is None else added.contiguous()
    pulled = added
    if cotangent is not None:
        pulled = group_norm_pull(cotangent.contiguous(), *ctx.saved_tensors, ctx.groups, ctx.silu, added)
    if pulled is None:
        return (None,) * 8
    return pulled, pulled, *[None] * 5, _summed(pulled, ctx.x_bias, ctx.needs_input_grad[7:])


add_group_norm.register_autograd(_backward_sum, setup_context=_keep_sum)


@torch.library.custom_op("rlsd::bias_residual_nhwc", mutates_args=())
def bias_residual(x: Tensor, bias: Tensor, residual: Tensor | None = None, silu: bool = False) -> Tensor:
    """act(x + bias + residual) in one pass, rounded once: x, residual [..., C]; bias [C].

    Gradients reach x and residual where `silu` is not set.
    """
    checks.rows("x", x)
    checks.vector("bias", bias, x)
    if residual is not None:
        checks.like("residual", residual, x)
    with torch.cuda.device_of(x):
        return (elementwise if checks.on_device(x) else naive).bias_residual(x, bias, residual, silu)


@bias_residual.register_fake
def _(x: Tensor, bias: Tensor, residual: Tensor | None = None, silu: bool = False) -> Tensor:
    return torch.empty_like(x)


def _keep_epilogue(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.added, ctx.silu = inputs[2] is not None, inputs[3]


def _backward_epilogue(ctx, cotangent):  # type: ignore[no-untyped-def]
    checks.frozen(ctx.needs_input_grad[1:2])
    if ctx.silu:
        raise NotImplementedError("rlsd::bias_residual_nhwc has no gradient behind a SiLU")
    return cotangent, None, cotangent if ctx.added else None, None


bias_residual.register_autograd(_backward_epilogue, setup_context=_keep_epilogue)


@torch.library.custom_op("rlsd::interleave_nhwc", mutates_args=())
def interleave(phases: Tensor, order: str = "blocks", bias: Tensor | None = None) -> Tensor:
    """Four phases to one image, less a border of one pixel: [B, H + 1, W + 1, 4 C] -> [B, 2 H, 2 W, C], plus bias [C].

    Phase (a, b) of channel c is channel (2 a + b) C + c where order is "blocks", which is the fast one, and
    4 c + 2 a + b, as in a pixel shuffle, where it is "shuffle".
    """
    checks.phases(phases)
    checks.order(order)
    if bias is not None:
        checks.vector("bias", bias, phases[..., : phases.shape[3] // 4])
    with torch.cuda.device_of(phases):
        return (elementwise if checks.on_device(phases) else naive).interleave(phases, order, bias)


@interleave.register_fake
def _(phases: Tensor, order: str = "blocks", bias: Tensor | None = None) -> Tensor:
    batch, height, width, channels = phases.shape
    return phases.new_empty(batch, 2 * height - 2, 2 * width - 2, channels // 4)


@torch.library.custom_op("rlsd::interleave_pull_nhwc", mutates_args=())
def interleave_pull(cotangent: Tensor, order: str = "blocks") -> Tensor:
    """The adjoint of `interleave`: [B, 2 H, 2 W, C] -> [B, H + 1, W + 1, 4 C]."""
    checks.interleaved(cotangent)
    checks.order(order)
    with torch.cuda.device_of(cotangent):
        return (elementwise if checks.on_device(cotangent) else naive).interleave_pull(cotangent, order)


@interleave_pull.register_fake
def _(cotangent: Tensor, order: str = "blocks") -> Tensor:
    batch, height, width, channels = cotangent.shape
    return cotangent.new_empty(batch, height // 2 + 1, width // 2 + 1, 4 * channels)


def _keep_order(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.order = inputs[1]


def _backward_interleave(ctx, cotangent):  # type: ignore[no-untyped-def]
    checks.frozen(ctx.needs_input_grad[2:])
    return interleave_pull(cotangent.contiguous(), ctx.order), None, None


interleave.register_autograd(_backward_interleave, setup_context=_keep_order)


@torch.library.custom_op("rlsd::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor, epsilon: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """LayerNorm along the last axis of total = x + x_bias + residual, in one pass. Without gradients.

    x, residual: [..., C]; x_bias, weight, bias: [C]. Returns y and total, both like x, total rounded before it is
    normalised.
    """
    checks.rows("x", x)
    for name, vector in (("x_bias", x_bias), ("weight", weight), ("bias", bias)):
        checks.vector(name, vector, x)
    checks.small(epsilon)
    if residual is not None:
        checks.like("residual", residual, x)
    with torch.cuda.device_of(x):
        return (rows if checks.on_device(x) else naive).add_layer_norm(x, x_bias, weight, bias, epsilon, residual)


@add_layer_norm.register_fake
def _(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("rlsd::layer_norm_pull", mutates_args=())
def layer_norm_pull(
    cotangent: Tensor, x: Tensor, weight: Tensor, epsilon: float, added: Tensor | None = None
) -> Tensor:
    """The cotangent of x, given that of its LayerNorm along the last axis, plus `added`: [..., C], weight [C]."""
    checks.rows("x", x)
    checks.like("cotangent", cotangent, x)
    checks.vector("weight", weight, x)
    checks.small(epsilon)
    if added is not None:
        checks.like("added", added, x)
    with torch.cuda.device_of(x):
        return (
            (rows if checks.on_device(x) else naive).layer_norm_pull(cotangent, x, weight, epsilon, added).contiguous()
        )


@layer_norm_pull.register_fake
def _(cotangent: Tensor, x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("rlsd::gelu_pull", mutates_args=())
def gelu_pull(cotangent: Tensor, x: Tensor) -> Tensor:
    """The cotangent of x, given that of GELU(x) in its exact form: like x, at least two axes."""
    checks.rows("x", x)
    checks.like("cotangent", cotangent, x)
    with torch.cuda.device_of(x):
        return (rows if checks.on_device(x) else naive).gelu_pull(cotangent, x).contiguous()


@gelu_pull.register_fake
def _(cotangent: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("rlsd::softmax_pull", mutates_args=())
def softmax_pull(cotangent: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """The cotangent of x times `scale`, given that of y = softmax(x) along the last axis: like y [..., columns]."""
    checks.rows("y", y)
    checks.like("cotangent", cotangent, y)
    with torch.cuda.device_of(y):
        return (rows if checks.on_device(y) else naive).softmax_pull(cotangent, y, scale).contiguous()


@softmax_pull.register_fake
def _(cotangent: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    return y.new_empty(y.shape)


def _statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    like = x.new_empty(x.shape[0], groups, dtype=naive.precise(x.dtype))
    return like, torch.empty_like(like)
