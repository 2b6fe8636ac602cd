"""Exact rewrites of sums, into the GroupNorm behind them and into a GroupNorm's pull-back, and of what stands behind
that: the pull-back of an interleave."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from rlsd.export.graph import arguments, calls, replace
from rlsd.kernels import norm

aten = torch.ops.aten


def fuse_sums(graph_module: fx.GraphModule) -> None:
    """A sum before a GroupNorm costs it no pass over memory of its own."""
    for node in calls(graph_module, torch.ops.rlsd.group_norm.default):
        _into_norm(graph_module, node)
    graph_module.graph.eliminate_dead_code()


def _into_norm(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """group_norm(x + residual), channels last -> rlsd::add_group_norm_nhwc, whose last result is the sum.

    What is the same for all pixels becomes the normalisation's x_bias, and the sum is never written.
    """
    total, weight, bias, groups, epsilon, silu, last = arguments(node, None, None, None, None, None, None, False)
    pair = terms(total)
    if not last or pair is None or total.meta["val"].dim() != 4:
        return
    if any(term.meta["val"].dtype != total.meta["val"].dtype for term in pair):
        return
    shape = tuple(total.meta["val"].shape)
    whole = [term for term in pair if tuple(term.meta["val"].shape) == shape]
    each = ((shape[0], 1, 1, shape[3]), (1, 1, 1, shape[3]))
    rows = [term for term in pair if tuple(term.meta["val"].shape) in each]
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


def fuse_pulled_sums(graph_module: fx.GraphModule) -> None:
    """In a pull-back: what is added to that of a LayerNorm, or GroupNorm with its channels last, is added inside."""
    ours = torch.ops.rlsd
    for target in (ours.group_norm_pull.default, ours.group_norm_pull_nhwc.default, ours.layer_norm_pull.default):
        for node in calls(graph_module, target):
            names = [argument.name for argument in target._schema.arguments]
            given = dict(zip(names, node.args))
            users = list(node.users)
            pair = terms(users[0]) if len(users) == 1 else None
            last = target is not ours.group_norm_pull.default or given.get("channels_last", False)
            if pair is None or pair[0] is pair[1] or not last or given.get("added") is not None:
                continue
            (added,) = [term for term in pair if term is not node]
            value, other = node.meta["val"], added.meta["val"]
            if other.shape != value.shape or other.dtype != value.dtype:
                continue
            total = users[0]
            place = names.index("added")
            with graph_module.graph.inserting_before(total):
                fused = graph_module.graph.call_function(target, (*node.args[:place], added, *node.args[place + 1 :]))
            replace(total, fused)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def fuse_pulled_phases(graph_module: fx.GraphModule) -> None:
    """In a pull-back: that of an interleave, channels last, behind that of a GroupNorm, to which nothing is added any
    more, is a matter of where the latter writes. In float32 they stay apart: bundles carry no such kernel."""
    ours = torch.ops.rlsd
    pulls, target = (
        (ours.group_norm_pull.default, ours.group_norm_pull_nhwc.default),
        ours.group_norm_pull_phases.default,
    )
    for node in calls(graph_module, ours.interleave_pull.default):
        pulled, last = arguments(node, None, False)
        if not last or pulled.target not in pulls or len(pulled.users) != 1 or node.meta["val"].dtype == torch.float32:
            continue
        given = dict(zip((argument.name for argument in pulled.target._schema.arguments), pulled.args))
        if not given.get("channels_last", pulled.target == ours.group_norm_pull_nhwc.default):
            continue
        wanted = tuple(given.get(argument.name) for argument in target._schema.arguments)
        with graph_module.graph.inserting_before(node):
            fused = graph_module.graph.call_function(target, wanted)
        replace(node, fused)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def terms(node: object) -> Sequence[fx.Node] | None:
    """The two values that a plain sum adds."""
    if not isinstance(node, fx.Node) or node.target != aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    if not all(isinstance(arg, fx.Node) and "val" in arg.meta for arg in node.args):
        return None
    return node.args  # type: ignore[return-value]


assert norm  # registers rlsd::add_group_norm_nhwc and its companions
