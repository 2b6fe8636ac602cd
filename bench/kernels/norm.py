"""GroupNorm+SiLU both ways, epilogue and interleave, at the shapes of Stable Diffusion at 512 x 512, in halves.

All of them are bound by memory. `moved` counts each tensor once: GroupNorm reads x a second time, and its pull-back x
and the cotangent, which is free only where they stay in the L2 cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlsd.bench.kernels import Case
from rlsd.kernels import norm
from rlsd.kernels.norm import naive

GROUPS, EPSILON, HALF, FLOAT = 32, 1e-6, 2, 4
DECODER = [(512, 64), (512, 128), (512, 256), (256, 256), (256, 512), (128, 512)]  # channels, side of the square
NOISE_PREDICTOR = [
    (320, 64), (640, 64), (960, 64), (320, 32), (640, 32), (960, 32), (1280, 32), (1920, 32), (640, 16), (1280, 16),
    (1920, 16), (2560, 16), (1280, 8), (2560, 8),
]  # fmt: skip
UPSAMPLED = [(512, 64), (512, 128), (256, 256)]  # before the interleave
BATCHES = (1, 4)


def _random(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def _forward(device: torch.device, batch: int, channels: int, side: int) -> Sequence[Any]:
    x = _random(device, batch, side, side, channels).half()
    weight, bias = 1 + 0.1 * _random(device, channels, seed=1), 0.1 * _random(device, channels, seed=2)
    x_bias = _random(device, 1, 1, 1, channels, seed=5).half()  # as nearly all in a bundle have one
    return x, weight, bias, GROUPS, EPSILON, True, x_bias


def _sum(device: torch.device, batch: int, channels: int, side: int) -> Sequence[Any]:
    x, *rest = _forward(device, batch, channels, side)
    return x, _random(device, batch, side, side, channels, seed=3).half(), *rest


def _pull(device: torch.device, batch: int, channels: int, side: int) -> Sequence[Any]:
    x, weight, bias, groups, epsilon, silu, x_bias = _forward(device, batch, channels, side)
    _, mean, rstd = naive.group_norm(x, weight, bias, groups, epsilon, silu, x_bias)
    cotangent, added = (_random(device, *x.shape, seed=seed).half() for seed in (3, 4))
    return cotangent, x, mean, rstd, weight, bias, groups, silu, added, x_bias


def _epilogue(device: torch.device, batch: int, channels: int, side: int) -> Sequence[Any]:
    x, residual = (_random(device, batch, side, side, channels, seed=seed).half() for seed in (0, 1))
    return x, _random(device, channels, seed=2), residual, False


def _phases(device: torch.device, batch: int, channels: int, side: int) -> Sequence[Any]:
    return _random(device, batch, side + 1, side + 1, 4 * channels).half(), "blocks", _random(device, channels, seed=1)


def _image(device: torch.device, batch: int, channels: int, side: int) -> Sequence[Any]:
    return (_random(device, batch, 2 * side, 2 * side, channels).half(),)


def _values(batch: int, channels: int, side: int) -> int:
    return batch * channels * side * side


def _norm_bytes(tensors: int, batch: int, channels: int, side: int) -> int:
    """`tensors` of halves, x_bias, weight and bias, mean and rstd."""
    return HALF * (tensors * _values(batch, channels, side) + channels) + 2 * FLOAT * (channels + batch * GROUPS)


def _interleave_bytes(batch: int, channels: int, side: int) -> int:
    """The image on one side and the phases, border included, on the other."""
    return HALF * 4 * (_values(batch, channels, side) + _values(batch, channels, side + 1))


# Operations a value: sum 1, variance 3, normalisation 2, scale and shift 2, SiLU 4; the pull-back: normalisation 2,
# scale and shift 2, derivative of SiLU 7, weight 1, two sums 3, projection 4, rstd 1, addition 1.
FORWARD_OPERATIONS, PULL_OPERATIONS = 12, 21


def _case(
    name: str, at: tuple[int, int, int], make: Callable[..., Sequence[Any]], ours: Callable[..., Any],
    plain: Callable[..., Any], moved: int, operations: int,
) -> Case:  # fmt: skip
    batch, channels, side = at
    title = f"{name} {batch}x{side}x{side}x{channels}"
    return Case(title, lambda device: make(device, *at), ours, plain, moved, operations * _values(*at))


def _norm_cases(at: tuple[int, int, int], decoder: bool) -> list[Case]:
    cases = [
        _case(
            "GroupNorm+SiLU", at, _forward, norm.group_norm, naive.group_norm, _norm_bytes(2, *at), FORWARD_OPERATIONS
        )
    ]
    if decoder:
        cases.append(
            _case(
                "GroupNorm+SiLU pull", at, _pull, norm.group_norm_pull, naive.group_norm_pull, _norm_bytes(4, *at),
                PULL_OPERATIONS,
            )
        )  # fmt: skip
    cases.append(
        _case(
            "add+GroupNorm+SiLU", at, _sum, norm.add_group_norm, naive.add_group_norm, _norm_bytes(4, *at),
            FORWARD_OPERATIONS + 1,
        )
    )  # fmt: skip
    return cases


def _other_cases(batch: int) -> list[Case]:
    cases = []
    for channels, side in DECODER:
        at = (batch, channels, side)
        moved = 3 * HALF * _values(*at) + FLOAT * channels
        cases.append(_case("bias+residual", at, _epilogue, norm.bias_residual, naive.bias_residual, moved, 2))
    for channels, side in UPSAMPLED:
        at = (batch, channels, side)
        moved = _interleave_bytes(*at)
        cases.append(_case("interleave", at, _phases, norm.interleave, naive.interleave, moved, 0))
        cases.append(_case("interleave pull", at, _image, norm.interleave_pull, naive.interleave_pull, moved, 0))
        image = (batch, channels, 2 * side)
        both = norm.group_norm_pull_phases, naive.group_norm_pull_phases
        moved += _norm_bytes(2, *image)  # three tensors are read; what would be the fourth is the phases
        cases.append(_case("GroupNorm+SiLU pull to phases", image, _pull, *both, moved, PULL_OPERATIONS))
    return cases


def _summed_rows(device: torch.device, rows: int, width: int) -> Sequence[Any]:
    x, residual = (_random(device, rows, width, seed=seed).half() for seed in (0, 1))
    x_bias, weight, bias = (_random(device, width, seed=seed) for seed in (2, 3, 4))
    return x, x_bias, weight, bias, 1e-5, residual


def _row_cases(batch: int) -> list[Case]:
    """Of a vision transformer with 197 tokens of 384 channels, of the decoder's attention and the noise predictor's."""
    cases = []
    tokens, channels = batch * 197, 384
    norms, gates = tokens * channels, tokens * 4 * channels

    def like(*shape: int) -> Callable[[torch.device], Sequence[Any]]:
        return lambda device: [_random(device, *shape, seed=seed).half() for seed in (0, 1)]

    def pulled(device: torch.device) -> Sequence[Any]:
        weight = _random(device, channels)
        return (*like(tokens, channels)(device), weight, 1e-6, _random(device, tokens, channels).half())

    for rows, width in ((batch * 4096, 320), (batch * 1024, 640), (batch * 256, 1280)):  # the noise predictor's
        moved, values = 4 * HALF * rows * width + 3 * FLOAT * width, rows * width
        title = f"add+LayerNorm {rows}x{width}"
        make = functools.partial(_summed_rows, rows=rows, width=width)
        cases.append(Case(title, make, norm.add_layer_norm, naive.add_layer_norm, moved, 9 * values))
    title = f"LayerNorm pull {tokens}x{channels}"
    moved = 4 * HALF * norms + FLOAT * channels
    cases.append(Case(title, pulled, norm.layer_norm_pull, naive.layer_norm_pull, moved, 16 * norms))
    shape = (tokens, 4 * channels)
    title = f"GELU pull {tokens}x{4 * channels}"
    cases.append(Case(title, like(*shape), norm.gelu_pull, naive.gelu_pull, 3 * HALF * gates, 16 * gates))
    for rows, columns in ((batch * 6 * 197, 197), (batch * 4096, 4096)):
        values = rows * columns
        title = f"softmax pull {rows}x{columns}"
        moved = 3 * HALF * values
        cases.append(Case(title, like(rows, columns), norm.softmax_pull, naive.softmax_pull, moved, 6 * values))
    return cases


CASES: list[Case] = [
    case
    for batch in BATCHES
    for case in (
        *(c for channels, side in DECODER for c in _norm_cases((batch, channels, side), decoder=True)),
        *(c for channels, side in NOISE_PREDICTOR for c in _norm_cases((batch, channels, side), decoder=False)),
        *_other_cases(batch),
        *_row_cases(batch),
    )
]
