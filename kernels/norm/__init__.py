"""GroupNorm+SiLU, its pull-back, bias and residual epilogues, and the upsampling interleave; channels last.

Weights and biases are float32: they are read once a program, so halves would save nothing, and rounding them would
move every value of a channel by up to 1/2000.
"""

from __future__ import annotations

from rlsd.kernels.aot import Kernel
from rlsd.kernels.norm import elementwise, forward, pull, tiles
from rlsd.kernels.norm.ops import (
    add_group_norm,
    bias_residual,
    group_norm,
    group_norm_pull,
    interleave,
    interleave_pull,
)

__all__ = [
    "KERNELS",
    "add_group_norm",
    "bias_residual",
    "group_norm",
    "group_norm_pull",
    "interleave",
    "interleave_pull",
]

_HALF, _FLOAT = "*fp16", "*fp32"
_SIZES = {name: "i32:16" if name == "channels" else "i32" for name in ("pixels", "channels", *tiles.SIZES[1:])}
_STATISTICS = {"x": _HALF, "residual": _HALF, "total": _HALF, "partial": _FLOAT, **_SIZES, "residual_pixels": "i32"}
_AFFINE = {"weight": _FLOAT, "bias": _FLOAT}
_APPLY = {
    "x": _HALF, "partial": _FLOAT, **_AFFINE, "y": _HALF, "mean_out": _FLOAT, "rstd_out": _FLOAT, **_SIZES,
    "epsilon": "fp32", "silu": "i32",
}  # fmt: skip
_PULL = {"cotangent": _HALF, "x": _HALF, "mean": _FLOAT, "rstd": _FLOAT, **_AFFINE, "partial": _FLOAT}


def _norm(name: str, function: object, signature: dict[str, str], block: int, **constants: object) -> Kernel:
    """A kernel of GroupNorm for halves, for channels that are multiples of 16 and `block` lanes."""
    common = {"ROWS": tiles.TILE // block, "BLOCK": block, "GROUPS": tiles.GROUPS, "ALIGN": 8}
    return Kernel(f"{name}_{block}_fp16", function, signature, {**common, **constants}, tiles.WARPS)


def _copy(name: str, function: object, signature: dict[str, str], **constants: object) -> Kernel:
    common = {"ROWS": elementwise.ROWS, "BLOCK": elementwise.BLOCK}
    return Kernel(f"{name}_fp16", function, signature, {**common, **constants}, elementwise.WARPS)


# Groups of 4, 8 and 16 channels, all of Stable Diffusion's decoder, fill 64 lanes; those of its noise predictor (10 to
# 80) take 128 and need no pull-back. SiLU is a run-time argument: it costs nothing where memory is the bound.
_SILU = {"silu": "i32"}
KERNELS = [
    *(_norm("group_norm_statistics", forward.statistics, _STATISTICS, n, RESIDUAL=False) for n in (64, 128)),
    *(_norm("add_group_norm_statistics", forward.statistics, _STATISTICS, n, RESIDUAL=True) for n in (64, 128)),
    *(_norm("group_norm_apply", forward.apply, _APPLY, n, CHUNKS=tiles.CHUNKS) for n in (64, 128)),
    _norm("group_norm_pull_sums", pull.pull_sums, {**_PULL, **_SIZES, **_SILU}, 64),
    _norm(
        "group_norm_pull_apply", pull.pull_apply,
        {**_PULL, "added": _HALF, "out": _HALF, **_SIZES, **_SILU, "add": "i32"}, 64, CHUNKS=tiles.CHUNKS,
    ),
    _copy(
        "bias_residual", elementwise.bias_residual_kernel,
        {"x": _HALF, "bias": _FLOAT, "residual": _HALF, "y": _HALF, "pixels": "i32", "channels": "i32:16", "add": "i32",
         **_SILU},
    ),
    _copy(
        "interleave", elementwise.interleave_kernel,
        {"phases": _HALF, "image": _HALF, "height": "i32", "width": "i32", "channels": "i32:16"}, BLOCKS=True,
    ),
    _copy(
        "interleave_pull", elementwise.interleave_pull_kernel,
        {"image": _HALF, "phases": _HALF, "height": "i32", "width": "i32", "channels": "i32:16"}, BLOCKS=True,
    ),
]  # fmt: skip
