"""Circular and replicated padding as slices side by side: their pull-backs are slices and sums, which ONNX has."""

from __future__ import annotations

import torch
from torch import fx

from rlsd.export.graph import arguments, calls, replace

aten = torch.ops.aten


def plain_padding(graph_module: fx.GraphModule) -> None:
    """Replaces each aten.pad of these modes; torch would write into an empty tensor, or lacks the pull-back."""
    for node in calls(graph_module, aten.pad.default):
        x, widths, mode, _ = arguments(node, None, None, "constant", None)
        if mode in ("circular", "replicate") and min(widths) >= 0:
            with graph_module.graph.inserting_before(node):
                replace(node, _padded(graph_module.graph, x, list(widths), mode))


def _padded(graph: fx.Graph, x: fx.Node, widths: list[int], mode: str) -> fx.Node:
    shape = list(x.meta["val"].shape)
    value = x.meta["val"]
    for i in range(0, len(widths), 2):  # the last dimension first, as torch counts them
        dim, (before, after) = len(shape) - 1 - i // 2, widths[i : i + 2]
        size = shape[dim]
        edges = []
        for count, start in ((before, size - before), (after, 0)):
            if mode == "circular":
                edges.append(graph.call_function(aten.slice.Tensor, (x, dim, start, start + count)))
                continue
            start = size - 1 if edges else 0
            line = graph.call_function(aten.slice.Tensor, (x, dim, start, start + 1))
            edges.append(graph.call_function(aten.expand.default, (line, [*shape[:dim], count, *shape[dim + 1 :]])))
        parts = [part for part, count in ((edges[0], before), (x, size), (edges[1], after)) if count]
        shape[dim] += before + after
        if len(parts) > 1:
            x = graph.call_function(aten.cat.default, (parts, dim))
            x.meta["val"] = value.new_empty(shape, device="meta")
    return x
