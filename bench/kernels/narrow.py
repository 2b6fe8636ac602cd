"""3x3 convolutions with few channels on one side at the shapes of Stable Diffusion at 512 x 512, in halves.

Beside them what PyTorch has. From few channels: its convolution, channels last, as the result has to be; it pays a pass
over the few channels of x for that. To few channels: its GroupNorm, SiLU and convolution, all channels first, as x is
given to it: on a GPU its GroupNorm knows no other layout, and the result has to be so. It pays for no layout then but
what cuDNN, which tries out what it has, may do within its convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, group_norm, silu

from rlsd.bench.kernels import Case
from rlsd.kernels import narrow

GROUPS, EPSILON, HALF, FLOAT = 32, 1e-6, 2, 4
FROM_FEW = [(3, 128, 512), (4, 512, 64), (4, 320, 64)]  # channels, channels of the result, side of the square
TO_FEW = [(128, 3, 512), (320, 4, 64)]
BATCHES = (1, 8)


def _random(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def _kernel(device: torch.device, many: int, few: int, seed: int) -> Tensor:
    """[many, few, 3, 3], channels last."""
    kernel = _random(device, many, few, 3, 3, seed=seed) / (9 * few) ** 0.5
    return kernel.half().contiguous(memory_format=torch.channels_last)


def _from_few(device: torch.device, batch: int, few: int, many: int, side: int) -> Sequence[Any]:
    kernel = _kernel(device, many, few, 1)
    return _random(device, batch, few, side, side).half(), narrow.matrix_from_few(kernel), kernel


def _wide(x: Tensor, matrix: Tensor, _kernel: Tensor) -> Tensor:
    return narrow.narrow_conv(x, matrix, None, True)


def _plain_wide(x: Tensor, _matrix: Tensor, kernel: Tensor) -> Tensor:
    return conv2d(x.contiguous(memory_format=torch.channels_last), kernel, padding=1).permute(0, 2, 3, 1)


def _to_few(device: torch.device, batch: int, many: int, few: int, side: int) -> Sequence[Any]:
    kernel = _kernel(device, few, many, 1).contiguous()
    weight, bias = 1 + 0.1 * _random(device, many, seed=2), 0.1 * _random(device, many, seed=3)
    x, matrix = _random(device, batch, side, side, many).half(), narrow.matrix_to_few(kernel)
    return x, weight, bias, matrix, 0.1 * bias[:few].half(), x.permute(0, 3, 1, 2).contiguous(), kernel


def _planes(x: Tensor, weight: Tensor, bias: Tensor, matrix: Tensor, shift: Tensor, *_plain: Tensor) -> Tensor:
    taps, *_ = narrow.group_norm_taps(x, weight, bias, matrix, len(shift), GROUPS, EPSILON, True)
    return narrow.sum_taps(taps, shift)


def _plain_planes(
    _x: Tensor, weight: Tensor, bias: Tensor, _matrix: Tensor, shift: Tensor, planes: Tensor, kernel: Tensor
) -> Tensor:
    y = group_norm(planes, GROUPS, weight.to(planes.dtype), bias.to(planes.dtype), EPSILON)
    return conv2d(silu(y), kernel, shift, padding=1).contiguous()


def _cases(batch: int) -> list[Case]:
    """Each tensor counts once; the taps in between are ours, and do not."""
    found = []
    for few, many, side in FROM_FEW:
        pixels, title = batch * side * side, f"conv {few} to {many} channels {batch}x{side}x{side}"
        moved = HALF * (pixels * (few + many) + 9 * few * many)
        make = lambda device, at=(batch, few, many, side): _from_few(device, *at)  # noqa: E731
        found.append(Case(title, make, _wide, _plain_wide, moved, 2 * 9 * few * many * pixels, True))  # type: ignore[arg-type]
    for many, few, side in TO_FEW:
        pixels, title = batch * side * side, f"GroupNorm+SiLU+conv {many} to {few} channels {batch}x{side}x{side}"
        moved = HALF * (pixels * (few + many) + 9 * few * many + few) + 2 * FLOAT * many
        make = lambda device, at=(batch, many, few, side): _to_few(device, *at)  # noqa: E731
        found.append(Case(title, make, _planes, _plain_planes, moved, 2 * 9 * few * many * pixels, True))  # type: ignore[arg-type]
    return found


CASES = [case for batch in BATCHES for case in _cases(batch)]
