"""Exact rewrites of a product's bias: into what reads its result, so that it costs no pass over memory of its own.

On a GPU ONNX Runtime adds the bias of a convolution or of a linear layer in a second pass over the result. A GroupNorm
behind it takes the bias in without any; so does the sum of a residual stream, and the interleave that ends an
upsampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rlsd.export.fused_sums import terms
from rlsd.export.graph import add_buffer, arguments, calls, constant, replace
from rlsd.export.ops import LANES
from rlsd.kernels import norm
from rlsd.kernels.norm.naive import precise

aten = torch.ops.aten
X_BIAS = 7  # the number of that argument, of rlsd::group_norm and of rlsd::add_group_norm_nhwc


def fuse_biases(graph_module: fx.GraphModule) -> None:
    """Biases of products with their channels last: to the GroupNorm, sum or interleave behind them."""
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
    for node in calls(graph_module, aten.add.Tensor):
        _into_sum(graph_module, node)
    graph_module.graph.eliminate_dead_code()


@dataclass(frozen=True)
class Biased:
    """A convolution or linear layer whose result goes to one place only, if need be through a view, and its bias."""

    product: fx.Node
    bias: Tensor

    @staticmethod
    def behind(graph_module: fx.GraphModule, node: object) -> Biased | None:
        """What gives the value `node`, if it is one."""
        return product_of(graph_module, node) if isinstance(node, fx.Node) and len(node.users) == 1 else None

    def strip(self) -> Tensor:
        """The bias, in float32 at least, which the product adds no longer."""
        self.product.update_arg(2, None)
        return self.bias.to(precise(self.bias.dtype))


def product_of(graph_module: fx.GraphModule, node: fx.Node) -> Biased | None:
    """As Biased.behind, where all users of `node` will do without the bias."""
    source: object = node
    while isinstance(source, fx.Node) and _keeps_channels(source) and (source is node or len(source.users) == 1):
        source = source.args[0]
    known = (torch.ops.rlsd.conv_nhwc.default, torch.ops.rlsd.linear.default)
    if not isinstance(source, fx.Node) or source.target not in known or source.args[2] is None:
        return None
    bias = constant(graph_module, source.args[2])  # type: ignore[arg-type]
    if bias is None or (source is not node and len(source.users) != 1):
        return None
    return Biased(source, bias)


def _keeps_channels(node: fx.Node) -> bool:
    if node.target not in (aten.view.default, aten.reshape.default):
        return False
    return node.meta["val"].shape[-1] == node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]


def _into_norm(graph_module: fx.GraphModule, node: fx.Node, sources: Sequence) -> None:
    """The biases of `sources` become the normalisation's x_bias."""
    found = [biased for source in sources if (biased := Biased.behind(graph_module, source)) is not None]
    if not found:
        return
    kind = sources[0].meta["val"].dtype
    total = torch.stack([biased.strip() for biased in found]).sum(0).to(kind)
    shift = add_buffer(graph_module, node, "x_bias", total.reshape(1, 1, 1, -1))
    known = node.args[X_BIAS] if len(node.args) > X_BIAS else None
    if known is not None:  # where it depends on the timestep alone, a table will hold the sum
        with graph_module.graph.inserting_before(node):
            both = graph_module.graph.call_function(aten.add.Tensor, (known, shift))
        both.meta["val"] = known.meta["val"]  # type: ignore[union-attr]
        shift = both
    node.args = (*node.args[:X_BIAS], shift)


def _into_sum(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """product + residual -> rlsd::bias_residual_nhwc, which rounds once."""
    pair, value = terms(node), node.meta.get("val")
    if pair is None or pair[0] is pair[1]:
        return
    if any(term.meta["val"].shape != value.shape or term.meta["val"].dtype != value.dtype for term in pair):
        return
    found = [biased for term in pair if (biased := Biased.behind(graph_module, term)) is not None]
    if not found or node.meta["val"].shape[-1] % LANES != 0:
        return
    total = add_buffer(graph_module, node, "sum_bias", torch.stack([biased.strip() for biased in found]).sum(0))
    with graph_module.graph.inserting_before(node):
        fused = graph_module.graph.call_function(torch.ops.rlsd.bias_residual_nhwc.default, (pair[0], total, pair[1]))
    replace(node, fused)


def _into_interleave(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """An upsampling's phases all have the same bias."""
    phases, last, known = arguments(node, None, False, None)
    biased = Biased.behind(graph_module, phases)
    if biased is None or not last or known is not None:
        return
    first, *others = biased.bias.chunk(4)
    if all(torch.equal(first, other) for other in others):
        added = add_buffer(graph_module, node, "bias", biased.strip()[: len(first)])
        node.args = (phases, last, added)


assert norm  # registers rlsd::add_group_norm_nhwc
