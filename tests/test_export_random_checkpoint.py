"""Random checkpoints: the same bytes with every version of torch."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from rlsd.export.random_checkpoint import drawn, uniform


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 3))
        self.convolution, self.norm, self.linear = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 5)


def test_a_seed_gives_these_numbers() -> None:
    values = uniform(np.random.PCG64(0), (5,), 1.0)
    assert values.dtype == torch.float16 and values.tolist() == [
        0.0185394287109375,
        0.701171875,
        0.84228515625,
        0.27392578125,
        0.6806640625,
    ]


def test_a_network_is_drawn_whole() -> None:
    first, again = (drawn(Small, np.random.PCG64(7)).state_dict() for _ in range(2))
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in first.values())).hexdigest()
    assert digest == "32a6961e3b020fc5dee801422f8d997546ae88dc156e0394402c7006da8a628b"
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert first["norm.weight"].eq(1).all() and first["norm.bias"].eq(0).all()
    for name, bound in (("convolution.weight", 18**-0.5), ("linear.bias", 4**-0.5), ("token", 0.05)):
        assert first[name].dtype == torch.float16 and 0.3 * bound < first[name].abs().max() <= bound


def test_buffers_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="running_mean"):
        drawn(lambda: nn.BatchNorm2d(4), np.random.PCG64(7))
