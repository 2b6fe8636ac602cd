"""What a graph is made of and what it costs: node kinds, floating-point operations, the memory that it keeps."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor, fx

from rlsd.export.graph import Precise, constant
from rlsd.kernels.narrow.naive import TAPS

aten = torch.ops.aten


def node_kinds(model: ir.Model) -> dict[str, int]:
    """How often each kind of node stands in the ONNX graph, the most frequent first."""
    return dict(Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph).most_common())


def operations(graph_module: fx.GraphModule) -> int:
    """Floating-point operations of all convolutions and matrix products, a multiplication and an addition each two."""
    return sum(_operations(node) for node in graph_module.graph.nodes if node.op == "call_function")


def _operations(node: fx.Node) -> int:
    ops, value = torch.ops.rlsd, node.meta.get("val")
    if node.target in (ops.conv_nhwc.default, aten.conv2d.default, aten.convolution.default):
        return 2 * value.numel() * math.prod(_shape(node, 1)[1:])
    if node.target == ops.narrow_conv.default:
        return 2 * value.numel() * TAPS * _shape(node, 0)[1 if node.args[3] else 3]
    if node.target in (ops.group_norm_taps.default, ops.add_group_norm_taps.default):
        planes = node.args[4 if node.target == ops.group_norm_taps.default else 5]
        return 2 * math.prod(_shape(node, 0)) * TAPS * planes  # type: ignore[operator]
    if node.target == ops.product.default:
        across = node.args[2]
        return 2 * value.numel() * _shape(node, 0)[1 if across[0] else 2]  # type: ignore[index]
    if node.target in (ops.attention.default, ops.wide_attention.default):
        return 4 * math.prod(_shape(node, 0)) * _shape(node, 1)[1]
    if node.target in (ops.linear.default, aten.mm.default, aten.bmm.default):
        return 2 * value.numel() * _shape(node, 0)[-1]
    if node.target == aten.addmm.default:
        return 2 * value.numel() * _shape(node, 1)[-1]
    return 0


def moved_bytes(graph_module: fx.GraphModule) -> int:
    """Bytes that the kernels of a graph for CUDA read and write in all, weights among them: each node its inputs and
    its results once, and what takes a second pass besides.

    A lower bound of what passes through memory but for what a cache saves; a library may move more.
    """
    called = (node for node in graph_module.graph.nodes if node.op == "call_function" and node.target not in _VIEWS)
    return sum(_moved(node) for node in called)


def _moved(node: fx.Node) -> int:
    ops, result = torch.ops.rlsd, _bytes(node.meta.get("val"))
    if result == 0 and isinstance(node.target, torch._ops.OpOverload):  # of several results, each has its own
        result = sum(_bytes(user.meta.get("val")) for user in node.users)
    sources = {source: _bytes(_value(source)) for source in node.all_input_nodes}
    twice = 0
    if node.target in (ops.group_norm.default, ops.group_norm_taps.default):
        twice = sources[node.args[0]]  # type: ignore[index]
    elif node.target in (ops.add_group_norm_nhwc.default, ops.add_group_norm_taps.default):
        twice = sources[node.args[0]]  # type: ignore[index] # the sum is read again
    elif node.target in (
        ops.group_norm_pull.default, ops.group_norm_pull_nhwc.default, ops.group_norm_pull_phases.default,
    ):  # fmt: skip
        twice = sum(sources[x] for x in dict.fromkeys(node.args[:2]))  # type: ignore[index]
    elif node.target == ops.wide_attention.default:
        query, key, value = (sources[x] for x in node.args)  # type: ignore[index]
        scores = query // _shape(node, 0)[-1] * _shape(node, 1)[1]
        # The result is like the query. Scores and probabilities are written and read, whoever asks for them.
        return 2 * query + key + value + 4 * scores
    elif node.target in (ops.conv_nhwc.default, ops.linear.default) and node.args[2] is not None:
        twice = 2 * result  # the bias, in a pass of its own
    elif node.target in (aten.index_select.default, aten.embedding.default):
        return 2 * result  # rows of a table
    return sum(sources.values()) + result + twice


def _value(node: fx.Node) -> object:
    known = constant(node.graph.owning_module, node)
    return node.meta.get("val") if known is None else known


def peak_bytes(graph_module: fx.GraphModule) -> int:
    """The size of one block for all that a run holds of what is neither input, output nor weight.

    Each value lies in the smallest gap that holds it, from where it is made to its last use, as ONNX Runtime plans it;
    a view takes nothing, and keeps what it shows. A library's own workspaces come on top.
    """
    nodes = list(graph_module.graph.nodes)
    outputs = set(graph_module.graph.find_nodes(op="output")[0].all_input_nodes)
    shown: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        is_view = node.target in _VIEWS and node.target is not operator.getitem
        shown[node] = shown[node.args[0]] if is_view else node  # type: ignore[index]
    until = {shown[source]: place for place, node in enumerate(nodes) for source in node.all_input_nodes}
    held: list[tuple[int, int, fx.Node]] = []  # where it begins and ends, in that order
    peak = 0
    for place, node in enumerate(nodes):
        for value in _results(node):
            size = _bytes(value.meta.get("val"))
            if size > 0 and value in until and value not in outputs:
                start = _smallest_gap(held, size)
                held = sorted([*held, (start, start + size, value)], key=operator.itemgetter(0))
                peak = max(peak, start + size)
        held = [each for each in held if until[each[2]] > place]
    return peak


def _results(node: fx.Node) -> list[fx.Node]:
    """The values that a node makes: itself, or those of its several results that somebody takes."""
    if node.op != "call_function" or node.target in _VIEWS:
        return []
    parts = [user for user in node.users if user.target is operator.getitem]
    return parts or [node]


def _smallest_gap(held: Sequence[tuple[int, int, object]], size: int) -> int:
    """Where `size` bytes fit most closely between what is held, or behind it."""
    end, gaps = 0, []
    for start, stop, _ in held:
        if start - end >= size:
            gaps.append((start - end, end))
        end = max(end, stop)
    return min(gaps)[1] if gaps else end


_VIEWS = {
    operator.getitem, aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.detach.default, aten.slice.Tensor,
}  # fmt: skip


def _bytes(value: object) -> int:
    return sum(v.numel() * v.element_size() for v in _several(value) if isinstance(v, Tensor))


def _shape(node: fx.Node, number: int) -> Sequence[int]:
    """The shape of an argument: of a value by its meta, of a constant by itself."""
    source = node.args[number]
    assert isinstance(source, fx.Node)
    known = constant(node.graph.owning_module, source)
    return source.meta["val"].shape if known is None else known.shape


def largest_values(graph_module: fx.GraphModule, args: Sequence[Tensor]) -> dict[str, float]:
    """The largest magnitude of each node's result, computed in float32, by node: of what is not known to be wider."""
    found: dict[str, float] = {}

    class Watch(Precise):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            pairs = zip(_several(result), _several(n.meta.get("val")))
            known = [v for v, kind in pairs if not isinstance(kind, Tensor) or kind.dtype == torch.float16]
            values = [v for v in known if isinstance(v, Tensor) and v.is_floating_point()]
            if n.op == "call_function" and values:
                found[n.name] = max(float(v.abs().max()) for v in values)
            return result

    with torch.no_grad():
        Watch(graph_module).run(*args)
    return found


def _several(value: object) -> Sequence[object]:
    return value if isinstance(value, (tuple, list)) else (value,)
