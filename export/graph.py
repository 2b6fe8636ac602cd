"""Small tools for rewriting ATen graphs."""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def replace(node: fx.Node, other: fx.Node) -> None:
    """Puts `other` in the place of `node`, which dies with the next clean-up."""
    other.meta["val"] = node.meta["val"]  # its shape, for the rewrites that follow
    node.replace_all_uses_with(other)


def remove(node: fx.Node) -> None:
    """Erases a node that nobody uses, and those before it that only it used."""
    sources = [source for source in node.all_input_nodes if source.op != "placeholder"]
    node.graph.erase_node(node)
    for source in sources:
        if not source.users:
            remove(source)


def drop_detach(graph_module: fx.GraphModule) -> None:
    """Removes what only hides a value from differentiation, once that is done."""
    found = [node for target in (aten.detach.default, aten.alias.default) for node in calls(graph_module, target)]
    for node in found:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph_module.graph.erase_node(node)
    if found:
        graph_module.recompile()


def calls(graph_module: fx.GraphModule, target: object) -> list[fx.Node]:
    """All nodes that call `target`, in their order."""
    return [node for node in graph_module.graph.nodes if node.op == "call_function" and node.target == target]


def arguments(node: fx.Node, *defaults: object) -> list:
    """The node's arguments in their order, with `defaults` where it leaves them out."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args)) | dict(node.kwargs)
    return [given.get(name, default) for name, default in zip(names, defaults)]


def constant(graph_module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The weight or buffer that the node reads; None for any other node."""
    if node.op != "get_attr":
        return None
    value: object = graph_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else None


def add_buffer(graph_module: fx.GraphModule, beside: fx.Node, name: str, value: Tensor) -> fx.Node:
    """A new constant of the graph, named after the node that it is made for."""
    unique = f"{name}_{beside.name}"
    graph_module.register_buffer(unique, value.contiguous())
    with graph_module.graph.inserting_before(beside):
        return graph_module.graph.get_attr(unique)
