"""Exact rewrites of sums: into the GroupNorm behind them, with a linear layer's bias, into a GroupNorm's pull-back."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from rlsd.export import ops
from rlsd.export.graph import add_buffer, arguments, calls, constant, replace
from rlsd.kernels import norm

aten = torch.ops.aten


def fuse_sums(graph_module: fx.GraphModule) -> None:
    """Sums before a GroupNorm, and a linear layer's bias with the residual behind it: one pass over memory each."""
    for node in calls(graph_module, torch.ops.rlsd.group_norm.default):
        _into_norm(graph_module, node)
    for node in calls(graph_module, torch.ops.rlsd.linear.default):
        bias_with_residual(graph_module, node)
    graph_module.graph.eliminate_dead_code()


def _into_norm(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """group_norm(x + residual), channels last -> rlsd::add_group_norm_nhwc, whose last result is the sum.

    What is the same for all pixels becomes the normalisation's x_bias, and the sum is never written.
    """
    total, weight, bias, groups, epsilon, silu, last = arguments(node, None, None, None, None, None, None, False)
    terms = _terms(total)
    if not last or terms is None or total.meta["val"].dim() != 4:
        return
    shape = tuple(total.meta["val"].shape)
    whole = [term for term in terms if tuple(term.meta["val"].shape) == shape]
    rows = [term for term in terms if tuple(term.meta["val"].shape) == (shape[0], 1, 1, shape[3])]
    if len(whole) == 1 and rows and rows != whole and len(total.users) == 1:
        node.args = (whole[0], *node.args[1:6], last, *rows)
        graph_module.graph.erase_node(total)
        return
    if len(whole) != 2:
        return
    graph = graph_module.graph
    with graph.inserting_after(total):
        # The weights may be read further down; the sum is needed here.
        anchor = graph.call_function(operator.getitem, (total, 3))
    with graph.inserting_before(anchor):
        given = (*whole, graph.get_attr(weight.target), graph.get_attr(bias.target), groups, epsilon, silu)
        fused = graph.call_function(torch.ops.rlsd.add_group_norm_nhwc.default, given)
    anchor.args = (fused, 3)
    anchor.meta["val"] = total.meta["val"]
    for user in list(node.users):
        user.replace_input_with(node, fused)
    total.replace_all_uses_with(anchor)
    graph.erase_node(node)
    graph.erase_node(total)


def bias_with_residual(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """product(x, weight, bias) + residual -> rlsd::bias_residual_nhwc(product(x, weight), bias, residual)."""
    x, weight, bias, *rest = node.args
    users = list(node.users)
    terms = _terms(users[0]) if len(users) == 1 else None
    shift = None if bias is None else constant(graph_module, bias)  # type: ignore[arg-type]
    if terms is None or shift is None or len(shift) % ops.LANES != 0:
        return
    (residual,) = [term for term in terms if term is not node] or [node]
    if residual is node or residual.meta["val"].shape != node.meta["val"].shape:
        return
    total = users[0]
    precise = add_buffer(graph_module, total, "precise_bias", shift.to(ops.precise(shift.dtype)))
    with graph_module.graph.inserting_before(total):
        product = graph_module.graph.call_function(node.target, (x, weight, None, *rest))  # type: ignore[arg-type]
        product.meta["val"] = node.meta["val"]
        fused = graph_module.graph.call_function(
            torch.ops.rlsd.bias_residual_nhwc.default, (product, precise, residual)
        )
    replace(total, fused)


def fuse_pulled_sums(graph_module: fx.GraphModule) -> None:
    """In a pull-back: what is added to that of a GroupNorm with its channels last is added inside of it."""
    ours = torch.ops.rlsd
    for target in (ours.group_norm_pull.default, ours.group_norm_pull_nhwc.default):
        for node in calls(graph_module, target):
            names = [argument.name for argument in target._schema.arguments]
            given = dict(zip(names, node.args))
            users = list(node.users)
            terms = _terms(users[0]) if len(users) == 1 else None
            last = target is ours.group_norm_pull_nhwc.default or given.get("channels_last", False)
            if terms is None or terms[0] is terms[1] or not last or given.get("added") is not None:
                continue
            (added,) = [term for term in terms if term is not node]
            value, other = node.meta["val"], added.meta["val"]
            if other.shape != value.shape or other.dtype != value.dtype:
                continue
            total = users[0]
            with graph_module.graph.inserting_before(total):
                fused = graph_module.graph.call_function(target, (*node.args[: len(names) - 1], added))
            replace(total, fused)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _terms(node: object) -> Sequence[fx.Node] | None:
    """The two values that a plain sum adds."""
    if not isinstance(node, fx.Node) or node.target != aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    if not all(isinstance(arg, fx.Node) and "val" in arg.meta for arg in node.args):
        return None
    return node.args  # type: ignore[return-value]


assert norm  # registers rlsd::add_group_norm_nhwc and its companions
