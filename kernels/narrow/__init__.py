"""3x3 convolutions with few channels on one side: of an image or a latent, or to one, a GroupNorm before it included.

Libraries fill up the few channels for the tensor cores, in passes of their own; here memory is the bound.
"""

from __future__ import annotations

from rlsd.kernels.aot import Kernel
from rlsd.kernels.narrow import triton_kernels as kernels
from rlsd.kernels.narrow.ops import add_group_norm_taps, group_norm_taps, narrow_conv, sum_taps
from rlsd.kernels.norm import tiles

__all__ = [
    "COLUMNS",
    "KERNELS",
    "add_group_norm_taps",
    "columns",
    "group_norm_taps",
    "matrix_from_few",
    "matrix_to_few",
    "narrow_conv",
    "sum_taps",
]

columns, COLUMNS = kernels.columns, kernels.COLUMNS
matrix_from_few, matrix_to_few = kernels.matrix_from_few, kernels.matrix_to_few

_HALF, _FLOAT = "*fp16", "*fp32"
_CONV = {"x": _HALF, "weight": _HALF, "bias": _FLOAT, "y": _HALF, "height": "i32", "width": "i32", "planes": "i32",
         "channels": "i32:16", "first": "i32", "add": "i32"}  # fmt: skip
_STATISTICS = {"mean": _FLOAT, "rstd": _FLOAT}
_FINISH = {"partial": _FLOAT, **_STATISTICS, **dict.fromkeys(("pixels", "groups", "size", "chunk", "chunks"), "i32"),
           "epsilon": "fp32"}  # fmt: skip
_TAPS = {"x": _HALF, **_STATISTICS, "weight": _FLOAT, "bias": _FLOAT, "x_bias": _HALF, "kernel": _HALF, "taps": _FLOAT,
         "pixels": "i32", "channels": "i32:16",
         **dict.fromkeys(("groups", "size", "x_biases", "silu", "count"), "i32")}  # fmt: skip
_SUM = {"taps": _FLOAT, "bias": _HALF, "y": _HALF, "height": "i32", "width": "i32", "planes": "i32"}


def _kernels() -> list[Kernel]:
    """Those of bundles, in halves. One for each number of columns that a neighbourhood takes in a matrix product."""
    conv = {"ROWS": kernels.ROWS, "BLOCK": kernels.BLOCK}
    taps = {"ROWS": kernels.TAP_ROWS, "BLOCK": kernels.TAP_BLOCK}
    finish = {"GROUPS": kernels.GROUPS, "CHUNKS": tiles.CHUNKS}
    return [
        *(
            Kernel(f"narrow_conv_{n}_fp16", kernels.narrow_conv_kernel, _CONV, {**conv, "TAPS": n}, kernels.WARPS)
            for n in kernels.COLUMNS
        ),
        Kernel("group_norm_finish_fp16", kernels.finish_kernel, _FINISH, finish),
        *(
            Kernel(f"group_norm_taps_{n}_fp16", kernels.taps_kernel, _TAPS, {**taps, "TAPS": n}, kernels.TAP_WARPS)
            for n in kernels.COLUMNS
        ),
        Kernel("sum_taps_fp16", kernels.sum_taps_kernel, _SUM, {"BLOCK": kernels.PIXELS}, kernels.SUM_WARPS),
    ]


KERNELS = _kernels()
