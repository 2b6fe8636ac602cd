"""Small tools for rewriting ATen graphs."""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten


class Precise(fx.Interpreter):
    """Runs a graph in halves in float32: its inputs, weights and every result are widened. Its own casts still round.

    kept: the widened weights stay for further runs, which takes memory.
    """

    def __init__(self, graph_module: fx.GraphModule, kept: bool = False):
        super().__init__(graph_module)
        self._kept: dict[str, object] | None = {} if kept else None

    def run(self, *args: object) -> object:
        return super().run(*map(self.widened, args))

    def run_node(self, n: fx.Node) -> object:
        if n.target == aten._assert_tensor_metadata.default:
            return None  # it insists on the types that the trace saw
        if self._kept is not None and n.name in self._kept:
            return self._kept[n.name]
        result = super().run_node(n)
        result = tuple(map(self.widened, result)) if isinstance(result, tuple) else self.widened(result)
        if self._kept is not None and n.op == "get_attr":
            self._kept[n.name] = result
        return result

    @staticmethod
    def widened(value: object) -> object:
        """Halves as float32, all else as it is; some operators insist on the order of the trace."""
        if not isinstance(value, Tensor):
            return value
        return (value.float() if value.dtype == torch.float16 else value).contiguous()


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
