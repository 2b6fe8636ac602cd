"""What the tests of kernels/norm share: seeded tensors on the device that there is, poisoned outputs, tolerance."""

from __future__ import annotations

import math

import pytest
import torch

from rlsd.kernels.norm import tiles

PAD = 64  # values beside each buffer
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# On a GPU PyTorch's convolutions round float32 to TF32 unless told not to; beside that our kernels could lose three
# digits unseen.
torch.backends.cudnn.allow_tf32 = False


def normal(shape, kind=torch.float32, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed + 31 * math.prod(shape))
    return (torch.randn(shape, generator=generator) + mean).to(kind).to(DEVICE)


def affine(channels, kind=torch.float32):
    return 1 + 0.5 * normal((channels,), kind, seed=1), normal((channels,), kind, seed=2)


def double(values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


@pytest.fixture(name="launching")
def launching_fixture(monkeypatch):
    """Outputs and workspaces begin as NaN, and nothing may be written beside them. Programs of one tile at least, so
    that small tensors have several chunks."""
    monkeypatch.setattr(tiles, "STEPS", 1)
    buffers = []

    def empty(*shape, dtype=torch.float32, device=None):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        buffers.append(torch.full((math.prod(shape) + 2 * PAD,), math.nan, dtype=dtype, device=device))
        return buffers[-1][PAD:-PAD].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: empty(tuple(x.shape), dtype=x.dtype, device=x.device))
    yield buffers
    for buffer in buffers:
        assert buffer[:PAD].isnan().all() and buffer[-PAD:].isnan().all(), "written beside a buffer"


def check(ours, plain, exact, tiny=2e-7):
    """`tiny`: the absolute term, in units of the largest exact value. On a GPU exponential, reciprocal root and
    quotient of float32 are approximations, a few units in the last place off; the interpreter computes them exactly.
    """
    if DEVICE.type == "cuda" and ours[0].dtype == torch.float32:
        tiny = max(tiny, 1e-6)
    for a, b, reference in zip(ours, plain, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.isfinite().all()
        if a.dtype == torch.bfloat16 and DEVICE.type == "cpu":  # the interpreter drops the bits that a GPU rounds
            b = (reference.float().view(torch.int32) & -65536).view(torch.float32)
        scale = reference.abs().max().item()
        mine, theirs = ((v.double() - reference).abs().max().item() for v in (a, b))
        assert mine <= 2 * theirs + tiny * max(scale, 1.0), (mine, theirs, scale)
