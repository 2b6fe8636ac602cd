"""Replaces what depends on the timestep alone (its embedding and every projection of it) by a table.

There are only T timesteps. Exact: the table holds the very values that the network would compute; of a network in
halves, these computed in float32, where no cast of its own asks for halves, and rounded at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rlsd.export.graph import Precise

aten = torch.ops.aten
LARGEST = 1 << 28  # elements of one table; beyond that the graph is left to compute it


def tabulate(graph_module: fx.GraphModule, number: int, count: int, known: dict[str, Tensor]) -> None:
    """Tabulates over input `number` of the graph, int64 [B] with values 0 .. count - 1; in place.

    known: the tables of the same graph for another batch, by node, else empty; filled with those made here. Matrix
    products round differently for different batches, so tables of their own would make results depend on the batch.
    """
    graph = graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    index = placeholders[number]
    alone = depending_on_only(graph, index)
    last = [node for node in alone if any(user not in alone for user in node.users)]
    batch = index.meta["val"].shape[0]
    last = [node for node in last if _per_sample(node, batch, count)]
    if not last:
        return
    if not known:
        known.update(zip([node.name for node in last], _tables(graph_module, index, last, batch, count)))
    for node in last:
        name = f"table_{node.name}"
        graph_module.register_buffer(name, known[node.name])
        with graph.inserting_before(node):
            rows = graph.call_function(aten.index_select.default, (graph.get_attr(name), 0, index))
        rows.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(rows)
    graph.eliminate_dead_code()
    graph_module.recompile()


def depending_on_only(graph: fx.Graph, index: fx.Node) -> dict[fx.Node, None]:
    """Nodes that depend on `index`, and else on constants only, in order."""
    constant: set[fx.Node] = set()
    alone: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op == "call_function":
            sources = node.all_input_nodes
            if all(source in constant for source in sources):
                constant.add(node)
            elif all(source is index or source in constant or source in alone for source in sources):
                alone[node] = None
    return alone


def _per_sample(node: fx.Node, batch: int, count: int) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != batch:
        return False
    return value.is_floating_point() and value.numel() // batch * count <= LARGEST


def _tables(
    graph_module: fx.GraphModule, index: fx.Node, wanted: list[fx.Node], batch: int, count: int
) -> list[Tensor]:
    """For each wanted node its value at every timestep, [count, ...], in its type."""
    part = fx.Graph()
    copies = {index: part.placeholder(index.name)}
    needed: set[fx.Node] = set()
    pending = list(wanted)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    for node in graph_module.graph.nodes:
        if node in needed and node is not index:
            copies[node] = part.node_copy(node, lambda n: copies[n])
    part.output(tuple(copies[node] for node in wanted))
    run = Precise(fx.GraphModule(graph_module, part), kept=True)  # in halves a CPU's products take ten times as long
    every = torch.arange(-(-count // batch) * batch).clamp(max=count - 1).split(batch)
    with torch.no_grad():
        rows = [run.run(steps) for steps in every]
    columns = (torch.cat(column)[:count] for column in zip(*rows))
    return [column.to(node.meta["val"].dtype).contiguous() for column, node in zip(columns, wanted)]
