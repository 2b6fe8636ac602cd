"""Keeps in float32 what does not fit into halves: found by running the graph, not guessed.

A node is kept precise where its result is too large, and so is every node that takes such a result. Casts stand at the
shores only. What is derived from such a graph, a pull-back say, has its own casts there by differentiation.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, fx

from rlsd.export.census import largest_values
from rlsd.export.graph import add_buffer, constant

aten = torch.ops.aten
HALF_MAX = torch.finfo(torch.float16).max
LIMIT = HALF_MAX / 4  # four times more than was seen must still fit


def too_large(graph_module: fx.GraphModule, args: Sequence[Tensor]) -> frozenset[str]:
    """Names of the nodes of a graph in halves whose results exceed LIMIT when computed in float32 from `args`."""
    found = largest_values(graph_module, args)
    halves = {node.name for node in graph_module.graph.nodes if _is_half(node)}
    return frozenset(name for name, value in found.items() if name in halves and not value <= LIMIT)


def keep_precise(graph_module: fx.GraphModule, names: Collection[str]) -> list[str]:
    """Makes the nodes `names`, and those that take their results, compute in float32; returns what now does.

    Raises KeyError if the graph has no node of such a name.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    readers = {user for name in names for user in nodes[name].users if user.op == "call_function"}
    island = {_source(node) for node in (*(nodes[name] for name in names), *readers)}
    ordered = [node for node in graph_module.graph.nodes if node in island]
    for node in ordered:
        _compute_precisely(graph_module, node, island)
    for node in ordered:
        for result in (node, *_results(node)):
            _land(graph_module, result, island)
    graph_module.recompile()
    return [node.name for node in ordered]


def _source(node: fx.Node) -> fx.Node:
    """The node that computes: of a part of several results, the node that has them."""
    return node.args[0] if node.target is operator.getitem else node  # type: ignore[return-value]


def _results(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is operator.getitem]


def _is_half(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype == torch.float16


def _compute_precisely(graph_module: fx.GraphModule, node: fx.Node, island: Collection[fx.Node]) -> None:
    """Gives the node float32 arguments: constants anew, values of the island as they are, others by a cast."""

    def precise(source: fx.Node) -> fx.Node:
        value = constant(graph_module, source)
        if value is not None and value.dtype == torch.float16:
            return add_buffer(graph_module, node, f"precise_{source.name}", value.float())
        if value is not None or _source(source) in island or not _is_half(source):
            return source
        return _cast(graph_module, source, node, torch.float32)

    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), precise)


def _cast(graph_module: fx.GraphModule, source: fx.Node, before: fx.Node, kind: torch.dtype) -> fx.Node:
    with graph_module.graph.inserting_before(before):
        cast = graph_module.graph.call_function(aten.to.dtype, (source, kind))
    cast.meta["val"] = source.meta["val"].to(kind)
    return cast


def _land(graph_module: fx.GraphModule, result: fx.Node, island: Collection[fx.Node]) -> None:
    """What leaves the island becomes halves again."""
    if not _is_half(result):
        return
    outside = [user for user in result.users if _source(user) not in island]
    with graph_module.graph.inserting_after(result):
        cast = graph_module.graph.call_function(aten.to.dtype, (result, torch.float16)) if outside else None
    if cast is not None:
        cast.meta["val"] = result.meta["val"]
        for user in outside:
            user.replace_input_with(result, cast)
    result.meta["val"] = result.meta["val"].float()
