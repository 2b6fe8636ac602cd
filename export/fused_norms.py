"""Exact rewrite of a transformer's LayerNorm: the sum before it, biases and all, is made in the same pass.

For graphs that are not pulled back any more: the operator has no gradient.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from rlsd.export.fused_biases import product_of
from rlsd.export.graph import add_buffer, arguments, calls, constant, replace
from rlsd.export.ops import LANES
from rlsd.kernels import norm
from rlsd.kernels.norm import rows
from rlsd.kernels.norm.naive import precise

aten = torch.ops.aten
LARGEST_ROW = rows.SUM_WIDTHS[-1]


def fuse_layer_norms(graph_module: fx.GraphModule) -> None:
    """LayerNorm of a sum of rows, or of a biased product, to rlsd::add_layer_norm, whose last result is the sum."""
    for node in calls(graph_module, aten.layer_norm.default):
        x, shape, weight, bias, epsilon, _ = arguments(node, None, None, None, None, 1e-5, True)
        if list(shape) == [x.meta["val"].shape[-1]]:
            _fuse(graph_module, node, x, weight, bias, epsilon)
    for node in calls(graph_module, torch.ops.rlsd.layer_norm.default):
        _fuse(graph_module, node, *node.args)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _fuse(graph_module: fx.GraphModule, node: fx.Node, x, weight, bias, epsilon: float) -> None:  # type: ignore[no-untyped-def]
    channels = x.meta["val"].shape[-1]
    scale, shift = (constant(graph_module, row) if isinstance(row, fx.Node) else None for row in (weight, bias))
    if scale is None or shift is None or channels % LANES != 0 or channels > LARGEST_ROW:
        return
    terms = _summed(graph_module, x) or _biased(graph_module, x)
    if terms is None:
        return
    source, x_bias, residual = terms
    graph, behind = graph_module.graph, x.next
    rows = [
        add_buffer(graph_module, behind, name, row.to(precise(row.dtype)))
        for name, row in (("sum_bias", x_bias), ("norm_weight", scale), ("norm_bias", shift))
    ]
    with graph.inserting_before(behind):
        fused = graph.call_function(torch.ops.rlsd.add_layer_norm.default, (source, *rows, epsilon, residual))
        y, total = (graph.call_function(operator.getitem, (fused, place)) for place in (0, 1))
    total.meta["val"] = x.meta["val"]
    fused.meta["val"] = (x.meta["val"], x.meta["val"])
    for user in [user for user in x.users if user is not fused]:
        user.replace_input_with(x, total)
    replace(node, y)


def _summed(graph_module: fx.GraphModule, x: fx.Node) -> tuple[fx.Node, Tensor, fx.Node | None] | None:
    """The terms of x = rlsd::bias_residual_nhwc(...): a value, a bias, another value."""
    if x.target != torch.ops.rlsd.bias_residual_nhwc.default:
        return None
    source, bias, residual, silu = arguments(x, None, None, None, False)
    row = constant(graph_module, bias)
    return None if silu or row is None else (source, row, residual)


def _biased(graph_module: fx.GraphModule, x: fx.Node) -> tuple[fx.Node, Tensor, None] | None:
    """x, the result of a convolution or linear layer, which loses its bias here, and that bias."""
    found = product_of(graph_module, x)
    return None if found is None else (x, found.strip(), None)


assert norm  # registers rlsd::add_layer_norm
