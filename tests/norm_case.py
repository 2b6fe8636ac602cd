"""What the tests of kernels/norm share: seeded tensors on the device that there is."""

from __future__ import annotations

import math

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def normal(shape, kind=torch.float32, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed + 31 * math.prod(shape))
    return (torch.randn(shape, generator=generator) + mean).to(kind).to(DEVICE)


def affine(channels, kind=torch.float32):
    return 1 + 0.5 * normal((channels,), kind, seed=1), normal((channels,), kind, seed=2)


def double(values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]
