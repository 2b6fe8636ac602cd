"""What the operators of this room accept: a ValueError says in one sentence which argument is wrong, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlsd.kernels.norm.naive import precise

ORDERS = ("blocks", "shuffle")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def on_device(x: Tensor) -> bool:
    """Whether the Triton kernels run for x: on CUDA, but for float64."""
    return x.is_cuda and x.dtype != torch.float64


def image(name: str, value: Tensor) -> None:
    """[B, H, W, C], contiguous, floating-point, not empty."""
    if value.dim() != 4 or value.numel() == 0 or value.dtype not in FLOATS or not _packed(value):
        raise ValueError(
            f"{name} is {value.dtype} {list(value.shape)} with strides {list(value.stride())}, "
            "but must be a contiguous floating-point [B, H, W, C] that is not empty"
        )


def rows(name: str, value: Tensor) -> None:
    """[..., C], contiguous, floating-point, not empty."""
    if value.dim() < 2 or value.numel() == 0 or value.dtype not in FLOATS or not _packed(value):
        raise ValueError(
            f"{name} is {value.dtype} {list(value.shape)} with strides {list(value.stride())}, "
            "but must be a contiguous floating-point [..., C] that is not empty"
        )


def like(name: str, value: Tensor, x: Tensor) -> None:
    """Shape, type and device of x."""
    rows(name, value)
    if value.shape != x.shape or value.dtype != x.dtype or value.device != x.device:
        raise ValueError(f"{name} is {_said(value)}, but must be like x, {_said(x)}")


def x_bias(value: Tensor | None, x: Tensor) -> None:
    """[1 or B, 1, 1, C] of x's type, or nothing."""
    if value is None:
        return
    shaped = tuple(value.shape[1:]) == (1, 1, x.shape[3]) and value.shape[0] in (1, x.shape[0])
    if not shaped or value.dtype != x.dtype or value.device != x.device or not _packed(value):
        raise ValueError(
            f"x_bias is {_said(value)}, but must be contiguous [1 or B, 1, 1, C] with the type of x, {_said(x)}"
        )


def vector(name: str, value: Tensor, x: Tensor) -> None:
    """One value for each channel of x."""
    shaped = value.shape == x.shape[-1:] and _packed(value)
    if not shaped or value.dtype not in FLOATS or value.device != x.device:
        raise ValueError(
            f"{name} is {_said(value)}, but must be contiguous floating-point [{x.shape[-1]}] on {x.device}"
        )


def small(epsilon: float) -> None:
    """What is added to a variance."""
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}, but must be finite and at least 0")


def norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> None:
    """What every GroupNorm is given."""
    image("x", x)
    vector("weight", weight, x)
    vector("bias", bias, x)
    if groups < 1 or x.shape[3] % groups:
        raise ValueError(f"groups is {groups}, but must divide the {x.shape[3]} channels of x")
    small(epsilon)


def statistic(name: str, value: Tensor, x: Tensor, groups: int) -> None:
    """[B, groups], in the type that group_norm returns for x."""
    wanted, kind = (x.shape[0], groups), precise(x.dtype)
    shaped = value.shape == wanted and _packed(value)
    if not shaped or value.dtype != kind or value.device != x.device:
        raise ValueError(f"{name} is {_said(value)}, but must be contiguous {kind} {list(wanted)} on {x.device}")


def pulled(
    cotangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int,
    added: Tensor | None, first: Tensor | None,
) -> None:  # fmt: skip
    """What every pull-back of a GroupNorm is given; `first`: x_bias."""
    norm(x, weight, bias, groups, 0.0)
    x_bias(first, x)
    like("cotangent", cotangent, x)
    if added is not None:
        like("added", added, x)
    statistic("mean", mean, x, groups)
    statistic("rstd", rstd, x, groups)


def phases(value: Tensor) -> None:
    """[B, H + 1, W + 1, 4 C]."""
    image("phases", value)
    if value.shape[3] % 4 or min(value.shape[1:3]) < 2:
        raise ValueError(
            f"phases has shape {list(value.shape)}, but must be [B, H + 1, W + 1, 4 C], H and W at least 1"
        )


def interleaved(cotangent: Tensor) -> None:
    """[B, 2 H, 2 W, C]."""
    image("cotangent", cotangent)
    if cotangent.shape[1] % 2 or cotangent.shape[2] % 2:
        raise ValueError(f"cotangent has shape {list(cotangent.shape)}, but must be [B, 2 H, 2 W, C]")


def order(name: str) -> None:
    """Of the phases."""
    if name not in ORDERS:
        raise ValueError(f'order is "{name}", but must be one of {", ".join(ORDERS)}')


def frozen(needed: Sequence[bool]) -> None:
    """Whether weight or bias need a gradient."""
    if any(needed):
        raise NotImplementedError("the operators of rlsd.kernels.norm have no gradient in weight and bias")


def _packed(value: Tensor) -> bool:
    """Contiguous, as the kernels need it; the plain definitions, which run elsewhere, take any strides."""
    return value.is_contiguous() or not value.is_cuda


def _said(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}"
