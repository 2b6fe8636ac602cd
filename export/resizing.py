"""Pooling by means and interpolation as products with two matrices: exact, with a pull-back that ONNX has.

Each of these maps is linear and works along rows and columns apart: y = R x C^T. A column of R is what the operation
itself makes of a one among zeros, so that every mode, border and alignment is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rlsd.export.graph import add_buffer, arguments, calls, replace

aten = torch.ops.aten


def plain_resizing(graph_module: fx.GraphModule) -> None:
    """Replaces each such operation on [..., H, W] by two matrix products, computed in float64 and rounded once."""
    for target, along in AXES.items():
        for node in calls(graph_module, target):
            x = node.args[0]
            value = x.meta["val"]  # type: ignore[union-attr]
            rows, columns = (along(node, axis, torch.eye(value.shape[axis - 2]).double()) for axis in (0, 1))
            left = add_buffer(graph_module, node, "rows", rows.to(value.dtype))
            right = add_buffer(graph_module, node, "columns", columns.T.to(value.dtype))
            with graph_module.graph.inserting_before(node):
                tall = graph_module.graph.call_function(aten.matmul.default, (left, x))
                tall.meta["val"] = value.new_empty([*value.shape[:-2], len(rows), value.shape[-1]], device="meta")
                result = graph_module.graph.call_function(aten.matmul.default, (tall, right))
            replace(node, result)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _pooled(node: fx.Node, axis: int, eye: Tensor) -> Tensor:
    _, *given, ceil, padded, divisor = arguments(node, None, None, [], [0], False, True, None)
    kernel, stride, padding = ([*each, *each][axis] if each else None for each in given)
    divisor = divisor if divisor is None or axis == 0 else 1
    strides = [kernel if stride is None else stride, 1]
    return aten.avg_pool2d(eye[None], [kernel, 1], strides, [padding, 0], ceil, padded, divisor)[0]


def _adapted(node: fx.Node, axis: int, eye: Tensor) -> Tensor:
    sizes: Any = node.args[1]
    return aten._adaptive_avg_pool2d(eye[None], [sizes[axis], len(eye)])[0]


def _interpolated(node: fx.Node, axis: int, eye: Tensor) -> Tensor:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, arguments(node, *[None] * len(names))))
    for name, neutral in (("output_size", len(eye)), ("scale_factors", 1.0)):
        values: Sequence[Any] | None = given[name]
        given[name] = values and [values[axis], neutral]
    return node.target(eye[None, None], *list(given.values())[1:])[0, 0]  # type: ignore[operator]


AXES: dict[Any, Callable[[fx.Node, int, Tensor], Tensor]] = {
    aten.avg_pool2d.default: _pooled,
    aten.adaptive_avg_pool2d.default: _adapted,
    aten._adaptive_avg_pool2d.default: _adapted,
    aten.upsample_nearest2d.vec: _interpolated,
    aten._upsample_nearest_exact2d.vec: _interpolated,
    aten.upsample_bilinear2d.vec: _interpolated,
    aten._upsample_bilinear2d_aa.vec: _interpolated,
    aten.upsample_bicubic2d.vec: _interpolated,
    aten._upsample_bicubic2d_aa.vec: _interpolated,
}
