"""Public torch operators of this room: `torch.ops.rlsd.philox_normal`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsd.kernels.naive import normal
from rlsd.kernels.step import launch


@torch.library.custom_op("rlsd::philox_normal", mutates_args=())
def _philox_normal(seed: int, item: int, particle: int, stream: int, count: int, device: torch.device) -> Tensor:
    out = torch.empty(count, dtype=torch.float32, device=device)
    if count and out.is_cuda:
        with torch.cuda.device_of(out):
            launch.normal(out, seed, item, particle, stream)
    elif count:
        words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, item, particle, stream]
        out = normal(torch.tensor([words], device=device), count)[0]
    return out


@_philox_normal.register_fake
def _(seed: int, item: int, particle: int, stream: int, count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device=device)


def philox_normal(
    seed: int, item: int, particle: int, stream: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal numbers that are a function of their address alone: float32 [count] on `device`.

    seed: 64 bits; item, particle, stream: 32 bits each, unsigned. The numbers of rlsd.engine.normal (Philox4x32-10,
    Box-Muller in float64), whatever the device; those of a smaller count are the first of a larger one.
    Raises ValueError naming what is out of range.
    """
    bits = {"seed": 64, "item": 32, "particle": 32, "stream": 32, "count": 31}
    for name, value in zip(bits, (seed, item, particle, stream, count)):
        if not 0 <= value < 1 << bits[name]:
            raise ValueError(f"{name} is {value}, allowed is 0 to {(1 << bits[name]) - 1}")
    signed = (seed ^ 1 << 63) - (1 << 63)  # an operator's integers are int64
    return torch.ops.rlsd.philox_normal(signed, item, particle, stream, count, torch.device(device))
