"""Exact rewrites of a convolution's bias: into what reads its result, so that it costs no pass over memory of its own.

On a GPU ONNX Runtime adds the bias of a convolution in a second pass over the result. A GroupNorm behind it takes the
bias in without any; so does the sum of a residual stream, and the interleave that ends an upsampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from rlsd.export import ops
from rlsd.export.fused_sums import bias_with_residual
from rlsd.export.graph import add_buffer, arguments, calls, constant
from rlsd.kernels import norm

aten = torch.ops.aten
X_BIAS = 7  # the number of that argument, of rlsd::group_norm and of rlsd::add_group_norm_nhwc


def fuse_biases(graph_module: fx.GraphModule) -> None:
    """Biases of convolutions with their channels last: to the GroupNorm, sum or interleave behind them."""
    ours = torch.ops.rlsd
    for node in calls(graph_module, ours.interleave.default):
        _into_interleave(graph_module, node)
    for node in calls(graph_module, ours.group_norm.default):
        *_, last = arguments(node, None, None, None, None, None, None, False)
        if last and node.args[0].meta["val"].dim() == 4:  # type: ignore[union-attr]
            _into_norm(graph_module, node, node.args[:1])
    for node in calls(graph_module, ours.add_group_norm_nhwc.default):
        if node.args[0] is not node.args[1]:
            _into_norm(graph_module, node, node.args[:2])
    for node in calls(graph_module, ours.conv_nhwc.default):
        bias_with_residual(graph_module, node)
    graph_module.graph.eliminate_dead_code()


def _bias_of(graph_module: fx.GraphModule, node: object) -> Tensor | None:
    """The bias of a convolution whose result goes to one place only."""
    if not isinstance(node, fx.Node) or node.target != torch.ops.rlsd.conv_nhwc.default or len(node.users) != 1:
        return None
    return None if node.args[2] is None else constant(graph_module, node.args[2])  # type: ignore[arg-type]


def _without_bias(node: fx.Node) -> None:
    node.update_arg(2, None)


def _into_norm(graph_module: fx.GraphModule, node: fx.Node, sources: Sequence) -> None:
    """The biases of `sources` become the normalisation's x_bias."""
    found = {source: bias for source in sources if (bias := _bias_of(graph_module, source)) is not None}
    if not found:
        return
    kind = next(iter(found)).meta["val"].dtype
    total = torch.stack([bias.to(ops.precise(kind)) for bias in found.values()]).sum(0).to(kind)
    shift = add_buffer(graph_module, node, "x_bias", total.reshape(1, 1, 1, -1))
    known = node.args[X_BIAS] if len(node.args) > X_BIAS else None
    if known is not None:  # of the timestep: it depends on nothing else, so that a table will hold the sum
        with graph_module.graph.inserting_before(node):
            both = graph_module.graph.call_function(aten.add.Tensor, (known, shift))
        both.meta["val"] = known.meta["val"]  # type: ignore[union-attr]
        shift = both
    node.args = (*node.args[:X_BIAS], shift)
    for source in found:
        _without_bias(source)


def _into_interleave(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """An upsampling's phases all have the same bias."""
    phases, last, known = arguments(node, None, False, None)
    bias = _bias_of(graph_module, phases)
    if bias is None or not last or known is not None:
        return
    each = bias.reshape(4, -1)
    if bool((each != each[0]).any()):
        return
    added = add_buffer(graph_module, node, "bias", each[0].to(ops.precise(each.dtype)))
    node.args = (phases, last, added)
    _without_bias(phases)


assert norm  # registers rlsd::add_group_norm_nhwc
