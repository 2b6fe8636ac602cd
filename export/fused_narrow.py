"""Exact rewrites of 3x3 convolutions with few channels on one side, which memory bounds: to kernels made for them.

For graphs that are cut from their pull-backs: the operators have no gradients.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from rlsd.export.channels_last import FIRST, LAST
from rlsd.export.graph import add_buffer, arguments, calls, constant
from rlsd.export.ops import LANES
from rlsd.kernels import narrow
from rlsd.kernels.norm.naive import precise

aten = torch.ops.aten
SAVING = 18  # channels for one on the other side, from which taps in float32 are smaller than x in halves


def fuse_narrow(graph_module: fx.GraphModule) -> None:
    """rlsd::conv_nhwc from few channels to rlsd::narrow_conv, and to few channels behind a GroupNorm to
    rlsd::group_norm_taps and rlsd::sum_taps. Those in float32 stay: bundles carry no such kernels."""
    for node in calls(graph_module, torch.ops.rlsd.conv_nhwc.default):
        _, weight, _, stride, padding = node.args
        kernel = constant(graph_module, weight)  # type: ignore[arg-type]
        plain = (list(stride), list(padding)) == ([1, 1], [1, 1])  # type: ignore[call-overload]
        if kernel is None or not plain or kernel.shape[1:3] != (3, 3) or kernel.dtype == torch.float32:
            continue
        results, _, _, channels = kernel.shape
        if _is_narrow(channels) and results % LANES == 0:
            _from_few(graph_module, node, kernel)
        elif _is_narrow(results) and channels % LANES == 0 and channels >= SAVING * results:
            _to_few(graph_module, node, kernel)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _is_narrow(channels: int) -> bool:
    return 9 * channels <= narrow.COLUMNS[-1]


def _from_few(graph_module: fx.GraphModule, node: fx.Node, kernel: Tensor) -> None:
    """Of an image that was transposed only for this, the kernel reads the planes."""
    x, _, bias, *_ = node.args
    matrix = narrow.matrix_from_few(kernel.permute(FIRST))
    row = constant(graph_module, bias) if isinstance(bias, fx.Node) else None
    if (bias is None) != (row is None):
        return
    given: list[object] = [x, add_buffer(graph_module, node, "narrow_weight", matrix)]
    given.append(None if row is None else add_buffer(graph_module, node, "narrow_bias", row.to(precise(row.dtype))))
    first = x.target == aten.permute.default and list(x.args[1]) == LAST  # type: ignore[union-attr,arg-type]
    if first:
        given[0] = x.args[0]  # type: ignore[union-attr]
    with graph_module.graph.inserting_before(node):
        fused = graph_module.graph.call_function(torch.ops.rlsd.narrow_conv.default, (*given, first))  # type: ignore[arg-type]
    fused.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(fused)


def _to_few(graph_module: fx.GraphModule, node: fx.Node, kernel: Tensor) -> None:
    """Where a GroupNorm's result goes to this convolution alone, the convolution is a part of it."""
    x, _, bias, *_ = node.args
    norm, planes = _norm_of(x), kernel.shape[0]
    row = constant(graph_module, bias) if isinstance(bias, fx.Node) else kernel.new_zeros(planes)
    if norm is None or row is None:
        return
    graph, ours = graph_module.graph, torch.ops.rlsd
    columns = add_buffer(graph_module, norm, "narrow_kernel", narrow.matrix_to_few(kernel.permute(FIRST)))
    if norm.target == ours.group_norm.default:
        *given, groups, epsilon, silu, _, x_bias = arguments(norm, *[None] * 8)  # x, weight, bias first
        target = ours.group_norm_taps.default
    else:
        *given, groups, epsilon, silu, x_bias = arguments(norm, *[None] * 8)  # x, residual, weight, bias
        target = ours.add_group_norm_taps.default
    with graph.inserting_before(norm):
        fused = graph.call_function(target, (*given, columns, planes, groups, epsilon, silu, x_bias))
    value, source = node.meta["val"], norm.args[0].meta["val"]  # type: ignore[union-attr]
    kind = precise(value.dtype)
    taps = value.new_empty(value.shape[0], 9 * planes, *value.shape[1:3], dtype=kind)
    statistic = value.new_empty(value.shape[0], groups, dtype=kind)
    totals = [source] if target == ours.add_group_norm_taps.default else []
    fused.meta["val"] = (taps, statistic, statistic, *totals)
    for user in [*norm.users]:
        user.replace_input_with(norm, fused)
    x.meta["val"] = taps  # type: ignore[union-attr] # once the normalised value
    added = add_buffer(graph_module, node, "narrow_bias", row)
    with graph.inserting_before(node):
        image = graph.call_function(ours.sum_taps.default, (x, added))
        image.meta["val"] = value.permute(FIRST).contiguous()
        last = graph.call_function(aten.permute.default, (image, LAST))
        last.meta["val"] = value
    node.replace_all_uses_with(last)
    for user in [*last.users]:
        if user.target == aten.permute.default and list(user.args[1]) == FIRST:  # type: ignore[call-overload]
            user.replace_all_uses_with(image)


def _norm_of(x: object) -> fx.Node | None:
    """The GroupNorm, channels last, whose first result is x, which nobody else uses."""
    if not isinstance(x, fx.Node) or x.target is not operator.getitem or x.args[1] != 0 or len(x.users) != 1:
        return None
    norm = x.args[0]
    assert isinstance(norm, fx.Node)
    if norm.target == torch.ops.rlsd.group_norm.default:
        last = arguments(norm, *[None] * 6, False)[6]
    else:
        last = norm.target == torch.ops.rlsd.add_group_norm_nhwc.default
    return norm if last and norm.args[0].meta["val"].dtype != torch.float32 else None  # type: ignore[union-attr]
