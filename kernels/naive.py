"""Addressed random numbers in torch: the plain definition of philox.py, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal(address: Tensor, count: int) -> Tensor:
    """Standard normal numbers at B addresses: float32 [B, count].

    address: int64 [B, 5], the seed's low and high half, item, particle and stream, unsigned 32-bit values.
    Box-Muller in float64 on Philox4x32-10, four numbers to a counter (engine/src/philox.cpp).
    """
    block = torch.arange(-(-count // 4), device=address.device).expand(len(address), -1)
    low, high, item, particle, stream = (column[:, None].expand_as(block) for column in address.unbind(1))
    bits = torch.stack(philox((block, stream, particle, item), (low, high)), -1)
    uniform = (bits.double() + 0.5) * 2.0**-32
    radius, angle = (-2 * uniform[..., 0::2].log()).sqrt(), 2 * math.pi * uniform[..., 1::2]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)[:, :count].float()


def philox(c: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold unsigned 32-bit values."""
    for n in range(10):
        (high_a, low_a), (high_b, low_b) = _product(0xD2511F53, c[0]), _product(0xCD9E8D57, c[2])
        k0, k1 = (key[0] + n * 0x9E3779B9) & 0xFFFFFFFF, (key[1] + n * 0xBB67AE85) & 0xFFFFFFFF
        c = (high_b ^ c[1] ^ k0, low_b, high_a ^ c[3] ^ k1, low_a)
    return c


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of a b; in halves of b, since int64 does not hold the whole."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & 0xFFFFFFFF
