"""Cuts off what depends on one input alone: the keys and values of a context that stays the same for a whole job."""

from __future__ import annotations

from torch import fx

from rlsd.export.tabulate import depending_on_only


def precompute(graph_module: fx.GraphModule, number: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Two graphs: what depends on input `number` alone, input -> its results; and the rest.

    In place of that input the rest takes these results, behind its other inputs. graph_module is used up.
    """
    graph = graph_module.graph
    source = [node for node in graph.nodes if node.op == "placeholder"][number]
    alone = depending_on_only(graph, source)
    results = [node for node in alone if any(user not in alone for user in node.users)]
    if any(user not in alone for user in source.users):
        results.insert(0, source)
    before = fx.Graph()
    copies = {source: before.placeholder(source.name)}
    copies[source].meta = dict(source.meta)
    needed, pending = set(alone), list(alone)
    while pending:  # constants, and what is computed from constants only
        sources = [node for node in pending.pop().all_input_nodes if node is not source and node not in needed]
        needed.update(sources)
        pending += sources
    for node in graph.nodes:
        if node in needed:
            copies[node] = before.node_copy(node, lambda n: copies[n])
    before.output(tuple(copies[node] for node in results))
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for i, node in reversed(list(enumerate(results))):
        with graph.inserting_after(last):
            given = graph.placeholder(f"context_{i}")
        given.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(given)
    graph.eliminate_dead_code()
    graph.erase_node(source)
    graph.set_codegen(fx.graph.CodeGen())  # torch.export's own insists on the inputs that it saw
    return fx.GraphModule(graph_module, before), fx.GraphModule(graph_module, graph)
