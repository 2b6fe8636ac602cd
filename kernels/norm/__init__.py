"""GroupNorm+SiLU, its pull-back, bias and residual epilogues, and the upsampling interleave; channels last. And
for transformers, each in one pass, LayerNorm with the sum before it and the pull-backs of LayerNorm, GELU and softmax.

Weights and biases are float32: they are read once a program, so halves would save nothing, and rounding them would
move every value of a channel by up to 1/2000. A GroupNorm's x_bias alone has the type of x, being a row of a table
that a network computed, or a bias that a convolution would have added in that type.
"""

from __future__ import annotations

from rlsd.kernels.aot import Kernel
from rlsd.kernels.norm import elementwise, forward, pull, rows, tiles
from rlsd.kernels.norm.ops import (
    add_group_norm,
    add_layer_norm,
    bias_residual,
    gelu_pull,
    group_norm,
    group_norm_pull,
    group_norm_pull_phases,
    interleave,
    interleave_pull,
    layer_norm_pull,
    softmax_pull,
)

__all__ = [
    "KERNELS",
    "PRECISE_KERNELS",
    "add_group_norm",
    "add_layer_norm",
    "bias_residual",
    "gelu_pull",
    "group_norm",
    "group_norm_pull",
    "group_norm_pull_phases",
    "interleave",
    "interleave_pull",
    "layer_norm_pull",
    "softmax_pull",
]

_FLOAT = "*fp32"
_SIZES = {name: "i32:16" if name == "channels" else "i32" for name in ("pixels", "channels", *tiles.SIZES[1:])}
_AFFINE = {"weight": _FLOAT, "bias": _FLOAT}
_SILU = {"silu": "i32"}  # at run time: it costs nothing where memory is the bound
_SIZE = {"fp16": 2, "fp32": 4}
_PLANE = {"height": "i32", "width": "i32", "channels": "i32:16"}


def _norm(name: str, kind: str, function: object, signature: dict[str, str], block: int, **constants: object) -> Kernel:
    """A kernel of GroupNorm for channels that are multiples of 16 and `block` lanes."""
    size = _SIZE[kind]
    common = {"ROWS": tiles.TILE // size // block, "BLOCK": block, "GROUPS": tiles.GROUPS, "ALIGN": 16 // size}
    return Kernel(f"{name}_{block}_{kind}", function, signature, {**common, **constants}, tiles.WARPS)


def _copy(name: str, kind: str, function: object, signature: dict[str, str], **constants: object) -> Kernel:
    common = {"ROWS": elementwise.ROWS, "BLOCK": elementwise.BLOCK}
    return Kernel(f"{name}_{kind}", function, signature, {**common, **constants}, elementwise.WARPS)


def _kernels(kind: str) -> list[Kernel]:
    """All kernels for values of one type.

    Groups of 4, 8 and 16 channels, all of Stable Diffusion's decoder, fill 64 lanes; those of its noise predictor (10
    to 80) take 128 and need no pull-back.
    """
    data = f"*{kind}"
    sizes = {**_SIZES, "x_biases": "i32"}
    statistics = {"x": data, "residual": data, "x_bias": data, "total": data, "partial": _FLOAT, **sizes}
    apply = {
        "x": data, "partial": _FLOAT, **_AFFINE, "x_bias": data, "y": data, "mean_out": _FLOAT, "rstd_out": _FLOAT,
        **sizes, "epsilon": "fp32", **_SILU,
    }  # fmt: skip
    pulled = {
        "cotangent": data, "x": data, "mean": _FLOAT, "rstd": _FLOAT, **_AFFINE, "x_bias": data, "partial": _FLOAT,
    }  # fmt: skip
    added = {**pulled, "added": data, "out": data, **sizes, **_SILU, "add": "i32"}
    phases = {**added, "rows": "i32", "columns": "i32"}
    epilogue = {
        "x": data, "bias": _FLOAT, "residual": data, "y": data, "pixels": "i32", "channels": "i32:16", "add": "i32",
        **_SILU,
    }  # fmt: skip
    chunks, blocks = {"CHUNKS": tiles.CHUNKS}, {"BLOCKS": True}
    return [
        *(
            _norm(f"{name}group_norm_statistics", kind, forward.statistics, statistics, n, RESIDUAL=bool(name))
            for name in ("", "add_") for n in (64, 128)
        ),
        *(_norm("group_norm_apply", kind, forward.apply, apply, n, **chunks) for n in (64, 128)),
        _norm("group_norm_pull_sums", kind, pull.pull_sums, {**pulled, **sizes, **_SILU}, 64),
        _norm("group_norm_pull_apply", kind, pull.pull_apply, added, 64, **chunks, PHASES=False, rows=0, columns=0),
        *(
            [_norm("group_norm_pull_phases", kind, pull.pull_apply, phases, 64, **chunks, PHASES=True)]
            if kind == "fp16"  # islands of float32 do without
            else []
        ),
        _copy("bias_residual", kind, elementwise.bias_residual_kernel, epilogue),
        _copy(
            "interleave", kind, elementwise.interleave_kernel,
            {"phases": data, "bias": _FLOAT, "image": data, **_PLANE, "add": "i32"}, **blocks,
        ),
        _copy(
            "interleave_pull", kind, elementwise.interleave_pull_kernel, {"image": data, "phases": data, **_PLANE},
            **blocks,
        ),
        *_row_kernels(kind),
    ]  # fmt: skip


def _row_kernels(kind: str) -> list[Kernel]:
    """Those of transformers. Rows of a multiple of 16 columns are read 16 bytes at a time, others value by value."""
    data = f"*{kind}"
    normed = {
        "cotangent": data, "x": data, "weight": _FLOAT, "added": data, "out": data, "channels": "i32:16",
        "epsilon": "fp32", "add": "i32",
    }  # fmt: skip
    summed = {
        "x": data, "x_bias": _FLOAT, "residual": data, **_AFFINE, "y": data, "total": data, "channels": "i32:16",
        "epsilon": "fp32", "add": "i32",
    }  # fmt: skip
    flat = {"cotangent": data, "x": data, "out": data}
    pulled = {"cotangent": data, "y": data, "out": data, "columns": "i32", "scale": "fp32"}
    block = {"BLOCK": rows.BLOCK}
    return [
        *(
            Kernel(f"add_layer_norm_{n}_{kind}", rows.add_layer_norm_kernel, summed, {"BLOCK": n}, rows.warps(n))
            for n in rows.SUM_WIDTHS
        ),
        *(
            Kernel(f"layer_norm_pull_{n}_{kind}", rows.layer_norm_pull_kernel, normed, {"BLOCK": n}, rows.warps(n))
            for n in rows.WIDTHS
        ),
        Kernel(f"gelu_pull_{kind}", rows.gelu_pull_kernel, {**flat, "size": "i32:16"}, block, rows.warps(rows.BLOCK)),
        *(
            Kernel(
                f"softmax_pull_{name}_{kind}", rows.softmax_pull_kernel, {**pulled, "columns": columns},
                {"BLOCK": lanes}, rows.warps(lanes),
            )
            for name, columns, lanes in (("wide", "i32:16", rows.BLOCK), ("any", "i32", 256))
        ),
    ]  # fmt: skip


KERNELS = _kernels("fp16")
PRECISE_KERNELS = _kernels("fp32")  # for what does not fit into halves
