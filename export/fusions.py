"""Exact rewrites of what stands between convolutions and normalisations: attention, gates, matrix products."""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from rlsd.export import fused_ops
from rlsd.export.graph import add_buffer, arguments, calls, constant, remove, replace
from rlsd.export.ops import LANES
from rlsd.kernels.norm import rows

aten = torch.ops.aten


def drop_no_ops(graph_module: fx.GraphModule) -> None:
    """Removes what computes nothing at run time: dropout, checks, copies, casts to the same type, divisions by 1.

    A detach stays, since a pull-back may be traced yet: rlsd.export.graph.drop_detach is for later.
    """
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target == aten._assert_tensor_metadata.default:
            graph_module.graph.erase_node(node)
        elif _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def _does_nothing(node: fx.Node) -> bool:
    if node.target in (aten.dropout.default, aten.clone.default, aten.contiguous.default):
        return True
    if node.target in (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default):
        return node.meta["val"].dtype == node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    if node.target in (aten.view.default, aten.reshape.default):
        return node.meta["val"].shape == node.args[0].meta["val"].shape  # type: ignore[union-attr]
    if node.target not in (aten.div.Tensor, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor):
        return False
    neutral = 1 if node.target in (aten.div.Tensor, aten.mul.Tensor) else 0
    by_itself = isinstance(node.args[1], (int, float)) and node.args[1] == neutral
    return by_itself and node.meta["val"].dtype == node.args[0].meta["val"].dtype  # type: ignore[union-attr]


def fuse_attention(graph_module: fx.GraphModule) -> None:
    """Attention with the reshapes into heads around it: one node, `rlsd::attention` or `rlsd::wide_attention`."""
    for node in calls(graph_module, aten.scaled_dot_product_attention.default):
        q, k, v, mask, dropout, causal, scale = arguments(node, None, None, None, None, 0.0, False, None)
        width = node.meta["val"].shape[-1]
        sources = [_before_heads(x) for x in (q, k, v)]
        joined = _behind_heads(node)
        plain = (
            (mask is None or _hides_nothing(graph_module, mask))
            and dropout == 0
            and not causal
            and (scale is None or math.isclose(scale, width**-0.5))
        )
        if not plain or joined is None or any(source is None for source in sources):
            continue
        shapes = [x.meta["val"].shape for x in (q, k, v)]
        if len({(shape[1], shape[3]) for shape in shapes}) != 1:
            continue  # ours have as many heads of keys and values as of queries, and as wide
        heads = node.meta["val"].shape[1]
        graph, ours = graph_module.graph, torch.ops.rlsd
        with graph.inserting_before(joined):
            if fused_ops.is_wide(joined.meta["val"].shape[-1], heads):
                both = graph.call_function(ours.wide_attention.default, tuple(sources))
                fused = graph.call_function(operator.getitem, (both, 0))
            else:
                fused = graph.call_function(ours.attention.default, (*sources, heads))
        replace(joined, fused)
        remove(joined)


def _hides_nothing(graph_module: fx.GraphModule, mask: fx.Node) -> bool:
    """Whether the mask is a constant that is true everywhere, which is how transformers says that there is none."""
    value = _constant_value(graph_module, mask)
    return value is not None and value.dtype == torch.bool and bool(value.all())


def _constant_value(graph_module: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """The value of a node that depends on no input of the graph."""
    if node.op != "call_function":
        return constant(graph_module, node)
    known = {source: _constant_value(graph_module, source) for source in node.all_input_nodes}
    if any(value is None for value in known.values()):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: known[source])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _before_heads(node: fx.Node) -> fx.Node | None:
    """x [B, L, heads * width] behind view [B, L, heads, width] and transpose(1, 2)."""
    if node.target != aten.transpose.int or set(node.args[1:]) != {1, 2}:
        return None
    view = node.args[0]
    if view.target not in (aten.view.default, aten.reshape.default):  # type: ignore[union-attr]
        return None
    source = view.args[0]  # type: ignore[union-attr]
    return source if source.meta["val"].dim() == 3 else None  # type: ignore[union-attr]


def _behind_heads(node: fx.Node) -> fx.Node | None:
    """The reshape to [B, L, heads * width] behind transpose(1, 2), if nothing else uses the node."""
    for targets in ((aten.transpose.int,), (aten.reshape.default, aten.view.default, aten._unsafe_view.default)):
        users = list(node.users)
        if len(users) != 1 or users[0].target not in targets:
            return None
        node = users[0]
    return node if node.meta["val"].dim() == 3 else None


# Both halves together: what ONNX Runtime's CUDA kernel has (contrib_ops/cuda/diffusion/bias_split_gelu.cc).
GEGLU_WIDTHS = (2560, 5120, 6144, 10240, 12288)


def fuse_geglu(graph_module: fx.GraphModule) -> None:
    """A linear layer whose output's first half is multiplied by GELU of the second: the bias moves into the gate."""
    for node in calls(graph_module, aten.chunk.default):
        projection, count, axis = arguments(node, None, None, 0)
        parts = sorted(node.users, key=lambda user: user.args[1])  # type: ignore[arg-type,return-value]
        last = axis in (-1, node.args[0].meta["val"].dim() - 1)  # type: ignore[union-attr]
        if count != 2 or not last or len(parts) != 2 or projection.target != aten.linear.default:
            continue
        gates = [user for user in parts[1].users if user.target == aten.gelu.default and not user.kwargs]
        products = list(gates[0].users) if len(gates) == 1 else []
        if len(products) != 1 or products[0].target != aten.mul.Tensor or parts[0] not in products[0].args:
            continue
        x, weight, bias = arguments(projection, None, None, None)
        if bias is None or len(projection.users) != 1 or projection.meta["val"].shape[-1] not in GEGLU_WIDTHS:
            continue
        graph = graph_module.graph
        with graph.inserting_before(products[0]):
            plain = graph.call_function(aten.linear.default, (x, weight))
            plain.meta["val"] = projection.meta["val"]
            fused = graph.call_function(torch.ops.rlsd.geglu.default, (plain, bias))
        replace(products[0], fused)
    graph_module.graph.eliminate_dead_code()


def plain_linear(graph_module: fx.GraphModule) -> None:
    """Linear layers as one product with a weight transposed once and for all."""
    for node in calls(graph_module, aten.linear.default):
        x, weight, bias = arguments(node, None, None, None)
        value = constant(graph_module, weight)
        if value is None:
            continue
        stored = add_buffer(graph_module, node, "transposed", value.t())
        with graph_module.graph.inserting_before(node):
            product = graph_module.graph.call_function(torch.ops.rlsd.linear.default, (x, stored, bias))
        replace(node, product)


def fuse_rows(graph_module: fx.GraphModule) -> None:
    """LayerNorm and GELU whose pull-backs are one node: `rlsd::layer_norm`, `rlsd::gelu`. Others stay as they are."""
    ours = torch.ops.rlsd
    for node in calls(graph_module, aten.layer_norm.default):
        x, shape, weight, bias, epsilon, _ = arguments(node, None, None, None, None, 1e-5, True)
        channels = x.meta["val"].shape[-1]
        fits = list(shape) == [channels] and channels % LANES == 0 and channels <= rows.WIDTHS[-1]
        if fits and None not in (weight, bias):
            _put(graph_module, node, ours.layer_norm.default, (x, weight, bias, epsilon))
    for node in calls(graph_module, aten.gelu.default):
        x, kind = node.args[0], node.kwargs.get("approximate", "none")
        size = x.meta["val"].numel()
        if (
            kind == "none" and x.meta["val"].dim() >= 2 and size % LANES == 0 and size < 2**31
        ):  # the kernel counts in int32
            _put(graph_module, node, ours.gelu.default, (x,))


def _put(graph_module: fx.GraphModule, node: fx.Node, target: object, args: tuple) -> None:
    with graph_module.graph.inserting_before(node):
        fused = graph_module.graph.call_function(target, args)  # type: ignore[arg-type]
    replace(node, fused)
