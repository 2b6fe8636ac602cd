"""GroupNorm and its neighbours with the channels last: the definitions that the kernels must meet.

Everything is computed in float32 at least and rounded once, to the type of the input; float64 stays float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def precise(kind: torch.dtype) -> torch.dtype:
    """The type in which statistics are kept and sums are made: float32, or float64 where the input is float64."""
    return torch.promote_types(kind, torch.float32)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool, x_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """act(weight * (x - mean) * rstd + bias), act = SiLU if `silu`, else the identity (Wu and He, 2018).

    x: [B, H, W, C]; weight, bias: [C]; x_bias: [1 or B, 1, 1, C], added to x first. Returns y like x, and mean, rstd:
    [B, groups].
    """
    grouped = _biased(x, x_bias).unflatten(-1, (groups, -1))  # [B, H, W, groups, C / groups]
    mean = grouped.mean((1, 2, 4))
    rstd = (grouped.var((1, 2, 4), unbiased=False) + epsilon).rsqrt()
    y = _normalised(x, mean, rstd, x_bias) * weight + bias
    return (torch.nn.functional.silu(y) if silu else y).to(x.dtype), mean, rstd


def add_group_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """group_norm of total = x + residual + x_bias. Returns y, mean, rstd, total."""
    total = _biased(x.to(precise(x.dtype)) + residual, x_bias).to(x.dtype)
    return *group_norm(total, weight, bias, groups, epsilon, silu), total


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
    """The cotangent of x, given that of y, plus `added` (what reaches x on another way): all [B, H, W, C].

    x_bias: as for group_norm; x is without it, mean and rstd are those of x + x_bias.
    """
    normalised = _normalised(x, mean, rstd, x_bias)
    scaled = cotangent.to(precise(x.dtype)) * weight
    if silu:
        y = normalised * weight + bias
        gate = torch.sigmoid(y)
        scaled = scaled * gate * (1 + y * (1 - gate))
    scaled, normalised = (t.unflatten(-1, (groups, -1)) for t in (scaled, normalised))
    means = [t.mean((1, 2, 4), keepdim=True) for t in (scaled, scaled * normalised)]
    pulled = ((scaled - means[0] - normalised * means[1]) * rstd[:, None, None, :, None]).flatten(-2)
    return (pulled if added is None else pulled + added).to(x.dtype)


def _biased(x: Tensor, x_bias: Tensor | None) -> Tensor:
    x = x.to(precise(x.dtype))
    return x if x_bias is None else x + x_bias


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor, x_bias: Tensor | None) -> Tensor:
    grouped = _biased(x, x_bias).unflatten(-1, (mean.shape[1], -1))
    return ((grouped - mean[:, None, None, :, None]) * rstd[:, None, None, :, None]).flatten(-2)


def bias_residual(x: Tensor, bias: Tensor, residual: Tensor | None = None, silu: bool = False) -> Tensor:
    """act(x + bias + residual): x, residual [B, H, W, C]; bias [C]."""
    y = x.to(precise(x.dtype)) + bias
    y = y if residual is None else y + residual
    return (torch.nn.functional.silu(y) if silu else y).to(x.dtype)


def interleave(phases: Tensor, order: str = "blocks", bias: Tensor | None = None) -> Tensor:
    """Four phases to one image, plus bias [C]: [B, H + 1, W + 1, 4 C] -> [B, 2 H, 2 W, C].

    Phase (a, b) of pixel (h, w) becomes pixel (2 h + a - 1, 2 w + b - 1); what falls outside is dropped. Phase (a, b)
    of channel c is channel (2 a + b) C + c where order is "blocks", and 4 c + 2 a + b, as in a pixel shuffle, where
    it is "shuffle".
    """
    batch, height, width, channels = phases.shape
    if order == "shuffle":
        apart = phases.reshape(batch, height, width, channels // 4, 2, 2).permute(0, 1, 4, 2, 5, 3)
    else:
        apart = phases.reshape(batch, height, width, 2, 2, channels // 4).permute(0, 1, 3, 2, 4, 5)
    image = apart.reshape(batch, 2 * height, 2 * width, -1)[:, 1:-1, 1:-1]
    return image.contiguous() if bias is None else (image.to(precise(image.dtype)) + bias).to(image.dtype)


def interleave_pull(cotangent: Tensor, order: str = "blocks") -> Tensor:
    """The adjoint of `interleave`: [B, 2 H, 2 W, C] -> [B, H + 1, W + 1, 4 C], zero where something was dropped."""
    padded = torch.nn.functional.pad(cotangent, (0, 0, 1, 1, 1, 1))
    batch, height, width, channels = padded.shape
    apart = padded.reshape(batch, height // 2, 2, width // 2, 2, channels)  # [B, H + 1, a, W + 1, b, C]
    apart = apart.permute(0, 1, 3, 5, 2, 4) if order == "shuffle" else apart.permute(0, 1, 3, 2, 4, 5)
    return apart.reshape(batch, height // 2, width // 2, 4 * channels).contiguous()


def group_norm_pull_phases(cotangent: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """interleave_pull of group_norm_pull: [B, 2 H, 2 W, C] -> [B, H + 1, W + 1, 4 C]."""
    return interleave_pull(group_norm_pull(cotangent, x, *rest))


def add_layer_norm(
    x: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor, epsilon: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = weight * (total - mean) * rstd + bias along the last axis, and total = x + x_bias + residual, rounded first.

    x, residual: [..., C]; x_bias, weight, bias: [C]. Returns y, total, like x.
    """
    total = bias_residual(x, x_bias, residual)
    value = total.to(precise(x.dtype))
    y = torch.nn.functional.layer_norm(value, value.shape[-1:], weight.to(value.dtype), bias.to(value.dtype), epsilon)
    return y.to(x.dtype), total


def layer_norm_pull(
    cotangent: Tensor, x: Tensor, weight: Tensor, epsilon: float, added: Tensor | None = None
) -> Tensor:
    """The cotangent of x, given that of weight * (x - mean) * rstd + bias along the last axis (Ba et al., 2016).

    cotangent, x: [..., C]; weight: [C]; added: like x, what reaches x on another way.
    """
    value = x.to(precise(x.dtype))
    centred = value - value.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    normal, pulled = centred * rstd, cotangent * weight.to(value.dtype)
    projected = pulled - pulled.mean(-1, keepdim=True) - normal * (pulled * normal).mean(-1, keepdim=True)
    result = projected * rstd
    return (result if added is None else result + added).to(x.dtype)


def gelu_pull(cotangent: Tensor, x: Tensor) -> Tensor:
    """The cotangent of x, given that of x Phi(x), Phi the normal distribution (Hendrycks and Gimpel, 2016)."""
    value = x.to(precise(x.dtype))
    below = 0.5 + 0.5 * torch.erf(value * 0.5**0.5)
    density = torch.exp(-0.5 * value * value) * (2 * torch.pi) ** -0.5
    return (cotangent * (below + value * density)).to(x.dtype)


def softmax_pull(cotangent: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """The cotangent of x times scale, given that of y = softmax(x) along the last axis: [..., columns]."""
    value = y.to(precise(y.dtype))
    wanted = cotangent.to(value.dtype)
    return (value * (wanted - (value * wanted).sum(-1, keepdim=True)) * scale).to(y.dtype)
