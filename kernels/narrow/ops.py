"""The torch operators of this room. On CUDA the Triton kernels run (float64 excepted), elsewhere the plain definitions.

None has a gradient: they stand in graphs that are cut from their pull-backs already. Errors: ValueError that names the
argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsd.kernels.narrow import naive, triton_kernels
from rlsd.kernels.norm import checks


@torch.library.custom_op("rlsd::narrow_conv", mutates_args=())
def narrow_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, channels_first: bool = False) -> Tensor:
    """A 3x3 convolution of at most 7 channels, zeros around the image: x [B, H, W, I] -> [B, H, W, O], like x.

    channels_first: x is [B, I, H, W]. weight: [K, O] of x's type, row (3 a + b) I + i for channel i of the pixel a - 1
    rows below and b - 1 columns to the right; K is 32 for up to 3 channels, else 64, further rows are zeros. bias:
    [O].
    """
    checks.image("x", x)
    narrow = x.shape[1 if channels_first else 3]
    _matrix("weight", weight, x, (_columns(narrow), None))
    if bias is not None:
        checks.vector("bias", bias, weight)
    run = triton_kernels if checks.on_device(x) else naive
    with torch.cuda.device_of(x):
        return run.narrow_conv(x, weight, bias, channels_first)


@narrow_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None, channels_first: bool = False) -> Tensor:
    sides = x.shape[2:] if channels_first else x.shape[1:3]
    return x.new_empty(x.shape[0], *sides, weight.shape[1])


@torch.library.custom_op("rlsd::group_norm_taps", mutates_args=())
def group_norm_taps(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, planes: int, groups: int, epsilon: float, silu: bool,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The first half of a 3x3 convolution to P = `planes` channels, 7 at most, of rlsd::group_norm_nhwc(x, ...).

    x: [B, H, W, C]; kernel: [C, K] of x's type, column (3 a + b) P + p for channel p of the pixel that sees this one
    a - 1 rows below and b - 1 columns to the right; K is 32 for up to 3 planes, else 64, further columns are zeros.
    Returns what rlsd::sum_taps takes: [B, 9 P, H, W] in float32 (float64 for float64), and mean, rstd: [B, groups].
    """
    _checked(x, weight, bias, kernel, planes, groups, epsilon, x_bias)
    given = (x, weight, bias, kernel, planes, groups, epsilon, silu, x_bias)
    with torch.cuda.device_of(x):
        return (triton_kernels if checks.on_device(x) else naive).group_norm_taps(*given)[:3]  # type: ignore[return-value]


@group_norm_taps.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, planes: int, groups: int, *rest: object
) -> tuple[Tensor, ...]:
    return _results(x, planes, groups)


@torch.library.custom_op("rlsd::add_group_norm_taps", mutates_args=())
def add_group_norm_taps(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, planes: int, groups: int,
    epsilon: float, silu: bool, x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """group_norm_taps of total = x + residual + x_bias; residual: like x. Returns total, like x, as well."""
    _checked(x, weight, bias, kernel, planes, groups, epsilon, x_bias)
    checks.like("residual", residual, x)
    given = (weight, bias, kernel, planes, groups, epsilon, silu, x_bias)
    if not checks.on_device(x):
        return naive.add_group_norm_taps(x, residual, *given)
    with torch.cuda.device_of(x):
        return triton_kernels.group_norm_taps(x, *given, residual)


@add_group_norm_taps.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, planes: int, groups: int, *rest: object
) -> tuple[Tensor, ...]:
    return *_results(x, planes, groups), x.new_empty(x.shape)


@torch.library.custom_op("rlsd::sum_taps", mutates_args=())
def sum_taps(taps: Tensor, bias: Tensor) -> Tensor:
    """The second half: taps [B, 9 P, H, W] in float32 or float64, bias [P] -> [B, P, H, W] of bias's type."""
    checks.image("taps", taps)
    if taps.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"taps is {taps.dtype}, but must be float32 or float64")
    if bias.dim() != 1 or 9 * bias.shape[0] != taps.shape[1] or bias.device != taps.device:
        raise ValueError(f"bias has shape {list(bias.shape)} on {bias.device}, but taps {list(taps.shape)}")
    if not bias.is_contiguous() or not bias.is_floating_point():
        raise ValueError(f"bias is {bias.dtype} with stride {bias.stride(0)}, but must be contiguous floating point")
    with torch.cuda.device_of(taps):
        return (triton_kernels if checks.on_device(taps) else naive).sum_taps(taps, bias)


@sum_taps.register_fake
def _(taps: Tensor, bias: Tensor) -> Tensor:
    return taps.new_empty(taps.shape[0], bias.shape[0], *taps.shape[2:], dtype=bias.dtype)


def _columns(narrow: int) -> int:
    """As triton_kernels.columns; the ValueError names the argument."""
    try:
        return triton_kernels.columns(narrow)
    except ValueError as error:
        raise ValueError(f"x or planes: {error}") from None


def _checked(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, planes: int, groups: int, epsilon: float,
    x_bias: Tensor | None,
) -> None:  # fmt: skip
    checks.norm(x, weight, bias, groups, epsilon)
    checks.x_bias(x_bias, x)
    _matrix("kernel", kernel, x, (x.shape[3], _columns(planes)))


def _matrix(name: str, value: Tensor, x: Tensor, shape: tuple[int | None, int | None]) -> None:
    """Of x's type and device, with these rows and columns; None for any number."""
    shaped = value.dim() == 2 and all(wanted in (None, n) for n, wanted in zip(value.shape, shape))
    if not shaped or value.dtype != x.dtype or value.device != x.device or not value.is_contiguous():
        wanted = ["any" if n is None else n for n in shape]
        raise ValueError(
            f"{name} is {value.dtype} {list(value.shape)} on {value.device}, "
            f"but must be contiguous {x.dtype} {wanted} on {x.device}"
        )


def _results(x: Tensor, planes: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    kind = naive.precise(x.dtype)
    mean = x.new_empty(x.shape[0], groups, dtype=kind)
    return x.new_empty(x.shape[0], 9 * planes, *x.shape[1:3], dtype=kind), mean, torch.empty_like(mean)
